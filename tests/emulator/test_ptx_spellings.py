# ruff: noqa: E501 - lines of PTX are kept whole
"""Spellings without effect on values: hints, orders, scopes, types of equal width, fences."""

import itertools

import numpy as np
import pytest
from ptx_programs import run

AT = "mad.wide.u32 %d1, %r70, {n}, %d30; mad.wide.u32 %d2, %r70, {n}, %d31; mul.lo.u32 %r60, %r70, {n};"
HINTS = [f".L1::{h}" for h in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")] + [
    ".L2::64B",
    ".L2::128B",
    ".L2::256B",
]
SCOPES = ("cta", "gpu", "sys", "cluster")
LOADS = [f"global{h}" for h in HINTS] + [f"global.{c}" for c in ("ca", "cg", "cs", "lu", "cv")] + ["volatile.global"]
LOADS += [f"{order}.{scope}.global" for order in ("acquire", "relaxed") for scope in SCOPES]
STORES = [f"global{h}" for h in HINTS] + [f"global.{c}" for c in ("wb", "cg", "cs", "wt")] + ["volatile.global"]
STORES += [f"{order}.{scope}.global" for order in ("release", "relaxed") for scope in SCOPES]
WORDS = np.arange(64, dtype=np.uint64) * 0x9E3779B97F4A7C15


def copied(body: str, size: int) -> None:
    source, target = WORDS.view(np.uint8)[: 32 * size].copy(), np.zeros(32 * size, np.uint8)
    run(AT.format(n=size) + body, source, target, shared=32 * size)
    assert np.array_equal(source, target)


@pytest.mark.parametrize("words", LOADS)
def test_loads(words: str) -> None:
    copied(f"ld.{words}.b32 %r1, [%d1]; st.global.b32 [%d2], %r1;", 4)


@pytest.mark.parametrize("words", STORES)
def test_stores(words: str) -> None:
    copied(f"ld.global.b32 %r1, [%d1]; st.{words}.b32 [%d2], %r1;", 4)


@pytest.mark.parametrize(
    "kind", ["b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"]
)
@pytest.mark.parametrize("space", ["shared", "shared::cta", "volatile.shared", "local", "global"])
def test_types(kind: str, space: str) -> None:
    size = int(kind[1:]) // 8
    register = {1: "%h1", 2: "%h1", 4: "%r1", 8: "%d5"}[size]
    place = {"local": "%d6", "global": "%d2"}.get(space, "%r60")
    declare = ".local .align 8 .b8 depot[64]; mov.b64 %d6, depot;" if space == "local" else ""
    copied(
        f"{declare} ld.global.{kind} {register}, [%d1]; st.{space}.{kind} [{place}], {register}; ld.{space}.{kind} {register}, [{place}]; st.global.{kind} [%d2], {register};",
        size,
    )


@pytest.mark.parametrize("many", [2, 4])
def test_vectors_elsewhere(many: int) -> None:
    registers = "{" + ", ".join(f"%r{i}" for i in range(1, many + 1)) + "}"
    for space in ("volatile.global", "volatile.shared", "local", "global.ca"):
        place = {"volatile.shared": "%r60", "local": "%d6"}.get(space, "%d2")
        declare = ".local .align 16 .b8 depot[64]; mov.b64 %d6, depot;" if space == "local" else ""
        store = "global.wb" if space == "global.ca" else space
        copied(
            f"{declare} ld.global.v{many}.b32 {registers}, [%d1]; st.{store}.v{many}.b32 [{place}], {registers}; ld.{space}.v{many}.b32 {registers}, [{place}]; st.global.v{many}.b32 [%d2], {registers};",
            4 * many,
        )


def test_eight_words_at_once() -> None:
    registers = "{" + ", ".join(f"%r{i}" for i in range(1, 9)) + "}"
    source, target = np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
    run(f"{AT.format(n=32)} ld.global.v8.b32 {registers}, [%d1]; st.global.v8.b32 [%d2], {registers};", source, target)
    assert np.array_equal(source, target)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_parameters(size: int) -> None:
    """The first 8 * size bits of an address, whatever the type."""
    target = np.zeros(32, np.uint64)
    register = {1: "%h1", 2: "%h1", 4: "%r1", 8: "%d5"}[size]
    for letter in ("b", "u", "s", "f")[: 4 if size > 2 else 3]:
        run(
            f"{AT.format(n=8)} ld.param.{letter}{8 * size} {register}, [k0]; mov.b64 %d6, 0; st.global.b64 [%d1], %d6; st.global.b{8 * size} [%d1], {register};",
            target,
        )
        assert (target == ((1 << 40) + (1 << 39)) % (1 << 8 * size)).all()


@pytest.mark.parametrize(
    ("order", "scope"),
    list(itertools.product(["", ".relaxed", ".acquire", ".release", ".acq_rel"], ["", *(f".{s}" for s in SCOPES)])),
)
def test_orders_of_atomics(order: str, scope: str) -> None:
    """Atomics in the word order of the PTX ISA and in Triton's, with and without the old value; they sum 0 to 31."""
    for opcode, target in (("atom", "%r1, "), ("red", "")):
        cell = np.zeros(1, np.uint32)
        run(
            f"{opcode}{order}{scope}.global.add.u32 {target}[%d30], %r70; {opcode}.global{scope}{order}.add.u32 {target}[%d30], %r70;",
            cell,
        )
        assert cell[0] == 2 * 496
        for shared in (
            f"{opcode}{order}{scope}.shared",
            f"{opcode}.shared::cta{scope}{order}",
            f"{opcode}{order}{scope}.shared::cta",
            f"{opcode}.shared{scope}{order}",
        ):
            cell = np.zeros(1, np.uint32)
            run(
                f"mov.u32 %r2, 0; setp.eq.u32 %p1, %r70, 0; @%p1 st.shared.b32 [%r2], %r2; {shared}.add.u32 {target}[%r2], %r70; ld.shared.b32 %r3, [%r2]; @%p1 st.global.b32 [%d30], %r3;",
                cell,
                shared=16,
            )
            assert cell[0] == 496


KINDS = {"add.s32": "i4", "add.u64": "u8", "add.f64": "f8", "add.f32": "f4", "add.noftz.f16": "f2", "min.s64": "i8", "max.u64": "u8", "min.u64": "u8",
         "max.s64": "i8", "and.b64": "u8", "or.b64": "u8", "xor.b64": "u8", "xor.b32": "u4", "exch.b64": "u8"}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_atomics(kind: str) -> None:
    """One thread, so that the cell holds old op 5."""
    dtype = np.dtype(KINDS[kind])
    register = {2: "%h1", 4: "%r1", 8: "%d5"}[dtype.itemsize]
    for words in (
        f"atom.global.{kind} _,",
        f"atom.relaxed.gpu.global.{kind} _,",
        f"red.global.{kind}",
        f"red.gpu.global.{kind}".replace("red.gpu.global", "red.relaxed.gpu.global"),
    ):
        if words.startswith("red") and "exch" in kind:
            continue
        cell, operand = np.array([12], dtype), np.array([5], dtype)
        run(
            f"setp.eq.u32 %p1, %r70, 0; ld.global.b{8 * dtype.itemsize} {register}, [%d31]; @%p1 {words} [%d30], {register};",
            cell,
            operand,
        )
        assert cell[0] == {"add": 17, "min": 5, "max": 12, "and": 4, "or": 13, "xor": 9, "exc": 5}[kind[:3].rstrip(".")]


FENCES = [
    "membar.cta;",
    "membar.gl;",
    "membar.sys;",
    "fence.proxy.async;",
    "fence.proxy.async.global;",
    "fence.mbarrier_init.release.cluster;",
]
FENCES += [f"fence{order}.{scope};" for order in ("", ".sc", ".acq_rel") for scope in SCOPES]
FENCES += [
    "griddepcontrol.wait;",
    "griddepcontrol.launch_dependents;",
    "bar.warp.sync -1;",
    "tcgen05.fence::before_thread_sync;",
    "tcgen05.fence::after_thread_sync;",
]
FENCES += [
    "barrier.sync 0;",
    "barrier.sync.aligned 0;",
    "barrier.cta.sync 0;",
    "barrier.cta.sync.aligned 0, 32;",
    "bar.sync 0, 32;",
]


@pytest.mark.parametrize("line", FENCES)
def test_fences(line: str) -> None:
    copied(f"ld.global.b32 %r1, [%d1]; {line} st.global.b32 [%d2], %r1;", 4)


def test_mbarriers_of_threads() -> None:
    """32 arrivals complete a phase; afterwards the barrier is gone."""
    for space, test in itertools.product(("shared", "shared::cta"), ("try_wait", "test_wait")):
        copied(
            f"mov.u32 %r2, 0; setp.eq.u32 %p1, %r70, 0; @%p1 mbarrier.init.{space}.b64 [%r2], 32; mbarrier.arrive.{space}.b64 _, [%r2];"
            f"$W: mbarrier.{test}.parity.{space}.b64 %p2, [%r2], 0; @!%p2 bra $W; @%p1 mbarrier.inval.{space}.b64 [%r2];"
            "ld.global.b32 %r1, [%d1]; st.global.b32 [%d2], %r1;", 4,
        )  # fmt: skip


@pytest.mark.parametrize("many", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("shape", ["32x32b", "16x32bx2"])
def test_tensor_memory_holds_what_is_stored(shape: str, many: int) -> None:
    """Each thread gets back its own registers; in 16x32bx2 the upper lanes use the columns behind the lower ones'."""
    out = np.zeros((128, many), np.uint32)
    names = [f"%r{i}" for i in range(1, many + 1)] if many < 64 else [f"%q{i}" for i in range(many)]
    registers, split = "{" + ", ".join(names) + "}", f", {many}" if shape == "16x32bx2" else ""
    fill = "".join(f"mad.lo.u32 {name}, %r70, 1000, {i};" for i, name in enumerate(names))
    clear = "".join(f"mov.u32 {name}, 0;" for name in names)
    run(
        f".reg .b32 %q<64>; mov.u32 %r71, 0; setp.lt.u32 %p5, %r70, 32; @%p5 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r71], 128;"
        "@%p5 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned; bar.sync 0; ld.shared.b32 %r72, [%r71]; shr.u32 %r73, %r70, 5; shl.b32 %r73, %r73, 21; add.s32 %r73, %r72, %r73;"
        f"{fill} tcgen05.st.sync.aligned.{shape}.x{many}.b32 [%r73]{split}, {registers}; tcgen05.wait::st.sync.aligned; {clear}"
        f"tcgen05.ld.sync.aligned.{shape}.x{many}.b32 {registers}, [%r73]{split}; tcgen05.wait::ld.sync.aligned; bar.sync 0;"
        f"@%p5 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r72, 128; mad.wide.u32 %d1, %r70, {4 * many}, %d30;"
        + "".join(f"st.global.b32 [%d1 + {4 * i}], {name};" for i, name in enumerate(names)),
        out, threads=128, shared=16,
    )  # fmt: skip
    assert np.array_equal(out, np.arange(128)[:, None] * 1000 + np.arange(many))
