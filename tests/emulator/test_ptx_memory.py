# ruff: noqa: E501 - lines of PTX are kept whole
"""Loads, stores, atomics, copies, and exchanges between the lanes of a warp."""

import numpy as np
import pytest
from ptx_programs import run

WORDS = np.arange(1, 257, dtype=np.uint32) * 0x01020304
AT = "mad.wide.u32 %d{i}, %r70, {size}, %d{base};"


def at(i: int, size: int, base: int) -> str:
    return AT.format(i=i, size=size, base=base)


@pytest.mark.parametrize(
    "hint", ["", ".nc", ".L1::evict_first", ".L1::evict_last", ".L1::no_allocate", ".L2::128B", ".cg"]
)
@pytest.mark.parametrize(("vector", "bits"), [(v, b) for v in (1, 2, 4) for b in (8, 16, 32, 64) if v * b <= 128])
def test_vectors(hint: str, vector: int, bits: int) -> None:
    letter, size = {8: "%h", 16: "%h", 32: "%r", 64: "%d"}[bits], bits // 8 * vector
    names = [f"{letter}{1 + i}" for i in range(vector)]
    registers, many = "{" + ", ".join(names) + "}", f".v{vector}" if vector > 1 else ""
    operand = registers if vector > 1 else names[0]
    store = "" if hint in (".nc", ".L2::128B") else hint
    out, data = np.zeros(32 * size, np.uint8), WORDS.view(np.uint8)[: 32 * size].copy()
    run(
        f"{at(20, size, 30)} {at(21, size, 31)} ld.global{hint}{many}.b{bits} {operand}, [%d20];"
        f"mul.lo.u32 %r60, %r70, {size}; st.shared{many}.b{bits} [%r60], {operand};"
        f"ld.shared{many}.b{bits} {operand}, [%r60]; st.global{store}{many}.b{bits} [%d21], {operand};",
        data, out, shared=1024,
    )  # fmt: skip
    assert np.array_equal(out, data)


@pytest.mark.parametrize(("kind", "wide"), [("s8", np.int32), ("u8", np.uint32), ("s16", np.int32), ("u16", np.uint32)])
def test_narrow_loads_are_extended(kind: str, wide: type) -> None:
    source = np.arange(32).astype(np.dtype(f"{kind[0].replace('s', 'i')}{int(kind[1:]) // 8}")) * 37 - 7
    out = np.zeros(32, wide)
    run(
        f"{at(1, source.itemsize, 30)} {at(2, 4, 31)} ld.global.{kind} %r1, [%d1]; st.global.b32 [%d2], %r1;",
        source,
        out,
    )
    assert np.array_equal(out, source.astype(wide))


def test_a_wider_register_is_stored_narrow() -> None:
    out = np.zeros(32, np.uint8)
    run("cvt.u64.u32 %d1, %r70; add.s64 %d2, %d30, %d1; add.s32 %r1, %r70, 1000; st.global.b8 [%d2], %r1;", out)
    assert np.array_equal(out, np.arange(1000, 1032).astype(np.uint8))


def test_local_memory() -> None:
    out = np.zeros(32, np.uint32)
    run(
        ".local .align 8 .b8 depot[24]; mov.b64 %d1, depot; cvta.local.u64 %d2, %d1;"
        "add.s32 %r1, %r70, 3; st.local.v2.b32 [%d1 + 8], {%r70, %r1}; ld.local.b32 %r2, [%d1 + 12];"
        f"{at(3, 4, 30)} st.global.b32 [%d3], %r2;",
        out,
    )
    assert np.array_equal(out, np.arange(32) + 3)


def test_moves_pack_and_unpack() -> None:
    out = np.zeros((32, 4), np.uint32)
    run(
        "mov.b64 %d1, {%r70, 7}; mov.b64 {%r1, %r2}, %d1; mov.b32 {%h1, %h2}, %r70; mov.b32 %r3, {%h2, %h1};"
        f"mov.b64 %d2, {{%h1, %h2, %h1, %h2}}; mov.b64 {{_, %r4}}, %d2; {at(3, 16, 30)} st.global.v4.b32 [%d3], {{%r1, %r2, %r3, %r4}};",
        out,
    )  # fmt: skip
    t = np.arange(32)
    assert np.array_equal(out, np.stack([t, np.full(32, 7), t << 16, t], 1))


def test_special_registers() -> None:
    out = np.zeros((6, 64, 4), np.uint32)
    run(
        "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %laneid; mov.u32 %r4, %nctaid.x;"
        "mad.lo.u32 %r5, %r1, %r2, %r70; mad.wide.u32 %d1, %r5, 16, %d30; st.global.v4.b32 [%d1], {%r1, %r2, %r3, %r4};",
        out, threads=64, blocks=6,
    )  # fmt: skip
    block, thread = np.meshgrid(np.arange(6), np.arange(64), indexing="ij")
    expected = np.stack([block, np.full_like(block, 64), thread % 32, np.full_like(block, 6)], 2)
    assert np.array_equal(out, expected)


def test_a_sample_of_blocks() -> None:
    out = np.zeros(300, np.uint32)
    body = "mov.u32 %r1, %ctaid.x; mad.wide.u32 %d1, %r1, 4, %d30; mov.u32 %r2, 1; st.global.b32 [%d1], %r2;"
    counters = run(body, out, blocks=300, only=[3, 299, 150])
    assert np.flatnonzero(out).tolist() == [3, 150, 299]
    assert (counters.blocks, counters.blocks_in_grid) == (3, 300)
    with pytest.raises(ValueError, match="blocks must be numbers below 300, the size of the grid; got 300"):
        run(body, out, blocks=300, only=[300])


def test_blocks_of_a_batch_diverge() -> None:
    """Loops of different length, with a barrier in each turn."""
    out = np.zeros((200, 64), np.uint32)
    run(
        "mov.u32 %r1, %ctaid.x; mov.u32 %r2, 0; mov.u32 %r3, 0; mul.lo.u32 %r60, %r70, 4; xor.b32 %r61, %r60, 128;"
        "$L: st.shared.b32 [%r60], %r2; bar.sync 0; ld.shared.b32 %r4, [%r61]; add.s32 %r3, %r3, %r4; bar.sync 0;"
        "add.s32 %r2, %r2, 1; setp.le.u32 %p1, %r2, %r1; @%p1 bra $L;"
        "mad.lo.u32 %r5, %r1, 64, %r70; mad.wide.u32 %d1, %r5, 4, %d30; st.global.b32 [%d1], %r3;",
        out, threads=64, blocks=200, shared=256,
    )  # fmt: skip
    b = np.arange(200)
    assert np.array_equal(out, np.repeat((b * (b + 1) // 2)[:, None], 64, 1))


def test_lanes_diverge_and_meet() -> None:
    out = np.zeros(32, np.uint32)
    run(
        "and.b32 %r1, %r70, 1; setp.eq.s32 %p1, %r1, 0; @%p1 bra $A; mov.u32 %r2, 10; bra.uni $B; $A: mov.u32 %r2, 20;"
        f"$B: shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; {at(1, 4, 30)} st.global.b32 [%d1], %r3; setp.lt.u32 %p2, %r70, 8; @%p2 ret;"
        "mov.u32 %r4, 5; st.global.b32 [%d1], %r4;",
        out,
    )  # fmt: skip
    lane = np.arange(32)
    assert np.array_equal(out, np.where(lane < 8, np.where(lane % 2, 20, 10), 5))


# ---------------------------------------------------------------- warps


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """Pseudocode of PTX ISA 9.7.9.6."""
    b, segment, clamp = b & 31, c >> 8 & 31, c & 31
    last, first = (lane & segment) | (clamp & ~segment), lane & segment
    j, inside = {
        "up": (lane - b, lane - b >= last), "down": (lane + b, lane + b <= last),
        "bfly": (lane ^ b, (lane ^ b) <= last), "idx": (first | (b & ~segment), (first | (b & ~segment)) <= last),
    }[mode]  # fmt: skip
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("by", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("segment", [0, 0x1800, 0x1C00])
def test_shfl(mode: str, by: int, segment: int) -> None:
    bound = segment | (0 if mode == "up" else 31)
    out = np.zeros((64, 2), np.uint32)
    run(
        f"add.s32 %r1, %r70, 100; shfl.sync.{mode}.b32 %r2|%p1, %r1, {by}, {bound}, -1; selp.b32 %r3, 1, 0, %p1;"
        f"{at(1, 8, 30)} st.global.v2.b32 [%d1], {{%r2, %r3}};",
        out, threads=64,
    )  # fmt: skip
    for thread in range(64):
        source, inside = shuffled(mode, thread % 32, by, bound)
        assert out[thread].tolist() == [100 + thread // 32 * 32 + source, inside]


def test_votes() -> None:
    out = np.zeros((64, 4), np.uint32)
    run(
        "setp.lt.u32 %p1, %r70, 40; vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1;"
        "vote.sync.uni.pred %p4, %p1, -1; vote.sync.ballot.b32 %r4, !%p1, 0xffffffff;"
        "selp.b32 %r1, 1, 0, %p2; selp.b32 %r2, 1, 0, %p3; selp.b32 %r3, 1, 0, %p4;"
        f"{at(1, 16, 30)} st.global.v4.b32 [%d1], {{%r1, %r2, %r3, %r4}};",
        out, threads=64,
    )  # fmt: skip
    assert (out[:32] == [1, 1, 1, 0]).all()
    assert (out[32:] == [1, 0, 0, 0xFFFFFF00]).all()


REDUCTIONS = {
    "add.u32": np.add, "min.u32": np.minimum, "max.u32": np.maximum, "add.s32": np.add, "min.s32": np.minimum,
    "max.s32": np.maximum, "and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "xor.b32": np.bitwise_xor,
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCTIONS)
def test_redux(name: str) -> None:
    values = (np.random.default_rng(0).integers(0, 1 << 32, 64, dtype=np.uint32)).view("i4" if "s32" in name else "u4")
    out = np.zeros_like(values)
    run(
        f"{at(1, 4, 30)} {at(2, 4, 31)} ld.global.b32 %r1, [%d1]; redux.sync.{name} %r2, %r1, -1; st.global.b32 [%d2], %r2;",
        values,
        out,
        threads=64,
    )
    assert np.array_equal(
        out, np.repeat(REDUCTIONS[name].reduce(values.reshape(2, 32), axis=1), 32).astype(values.dtype)
    )


@pytest.mark.parametrize("name", ["min.f32", "max.f32", "min.NaN.f32", "max.abs.f32"])
def test_redux_of_floats(name: str) -> None:
    values = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    values[5] = np.nan
    out = np.zeros_like(values)
    run(
        f"{at(1, 4, 30)} {at(2, 4, 31)} ld.global.b32 %r1, [%d1]; redux.sync.{name} %r2, %r1, -1; st.global.b32 [%d2], %r2;",
        values,
        out,
        threads=64,
    )
    pick = np.fmin if "min" in name else np.fmax
    expected = pick.reduce((np.abs(values) if "abs" in name else values).reshape(2, 32), axis=1)
    expected = np.where([True, False], np.nan, expected) if "NaN" in name else expected
    assert np.array_equal(out, np.repeat(expected, 32).astype(np.float32), equal_nan=True)


def test_elect() -> None:
    out = np.zeros((64, 2), np.uint32)
    run(
        f"elect.sync %r1|%p1, -1; selp.b32 %r2, 1, 0, %p1; {at(1, 8, 30)} st.global.v2.b32 [%d1], {{%r1, %r2}};",
        out,
        threads=64,
    )
    assert out[:, 1].reshape(2, 32).sum(1).tolist() == [1, 1]
    assert (out[out[:, 1] == 1, 0] == np.flatnonzero(out[:, 1]) % 32).all()


# ---------------------------------------------------------------- atomics

ATOMICS = {
    "add.u32": lambda old, x: old + x, "min.u32": min, "max.u32": max, "min.s32": min, "max.s32": max,
    "and.b32": lambda old, x: old & x, "or.b32": lambda old, x: old | x, "exch.b32": lambda old, x: x,
    "inc.u32": lambda old, x: 0 if old >= x else old + 1, "dec.u32": lambda old, x: x if old == 0 or old > x else old - 1,
}  # fmt: skip


@pytest.mark.parametrize("name", ATOMICS)
@pytest.mark.parametrize("order", [".global.gpu.acq_rel", ".relaxed.gpu.global", ".global"])
def test_atomics(name: str, order: str) -> None:
    dtype = np.dtype("i4" if "s32" in name else "u4")
    values = np.random.default_rng(0).integers(0, 50, 32).astype(dtype)
    cells, out = np.array([5, 9], dtype), np.zeros(32, dtype)
    run(
        f"{at(1, 4, 30)} ld.global.b32 %r1, [%d1]; and.b32 %r2, %r70, 1; mad.wide.u32 %d2, %r2, 4, %d31;"
        f"atom{order}.{name} %r3, [%d2], %r1; {at(3, 4, 32)} st.global.b32 [%d3], %r3;",
        values, cells, out,
    )  # fmt: skip
    expected, old = [5, 9], []
    for lane, value in enumerate(values.tolist()):
        old.append(expected[lane % 2])
        expected[lane % 2] = ATOMICS[name](expected[lane % 2], value)
    assert cells.tolist() == expected
    assert out.tolist() == old


def test_atomic_sums_of_floats() -> None:
    values, cell = np.arange(32, dtype=np.float32) / 7, np.zeros(1, np.float32)
    run(f"{at(1, 4, 30)} ld.global.b32 %r1, [%d1]; red.relaxed.gpu.global.add.f32 [%d31], %r1;", values, cell)
    assert cell[0] == np.add.accumulate(values)[-1]


def test_atomic_compare_and_swap() -> None:
    cell, out = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    run(
        f"add.s32 %r1, %r70, 1; atom.global.acq_rel.gpu.cas.b32 %r2, [%d30], %r70, %r1; {at(1, 4, 31)} st.global.b32 [%d1], %r2;".replace(
            "global.acq_rel.gpu", "acq_rel.gpu.global"
        ),
        cell,
        out,
    )
    assert cell[0] == 32
    assert np.array_equal(out, np.arange(32))


def test_atomics_in_shared_memory() -> None:
    out = np.zeros(1, np.uint32)
    run(
        "mov.u32 %r1, 0; setp.eq.u32 %p1, %r70, 0; @%p1 st.shared.b32 [%r1], %r1; bar.sync 0;"
        "atom.shared.add.u32 %r2, [%r1], %r70; bar.sync 0; ld.shared.b32 %r3, [%r1]; @%p1 st.global.b32 [%d30], %r3;",
        out, threads=64, shared=16,
    )  # fmt: skip
    assert out[0] == 64 * 63 // 2


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize(("mode", "width"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
@pytest.mark.parametrize("prefetch", ["", ".L2::128B"])
def test_cp_async_fills_with_zeros(mode: str, width: int, prefetch: str) -> None:
    data, out = np.arange(1, 32 * width + 1).astype(np.uint8), np.zeros(32 * width, np.uint8)
    move = {4: "ld.shared.b32 %r1, [%r60]; st.global.b32 [%d2], %r1;", 8: "ld.shared.b64 %d5, [%r60]; st.global.b64 [%d2], %d5;",
            16: "ld.shared.v2.b64 {%d5, %d6}, [%r60]; st.global.v2.b64 [%d2], {%d5, %d6};"}[width]  # fmt: skip
    run(
        f"mul.lo.u32 %r60, %r70, {width}; {at(1, width, 30)} {at(2, width, 31)} rem.u32 %r3, %r70, {width + 1};"
        f"cp.async.{mode}.shared.global{prefetch} [%r60 + 0], [%d1 + 0], {width:#x}, %r3; cp.async.commit_group; cp.async.wait_group 0; {move}",
        data, out, shared=512,
    )  # fmt: skip
    keep = np.arange(width)[None] < (np.arange(32) % (width + 1))[:, None]
    assert np.array_equal(out.reshape(32, width), np.where(keep, data.reshape(32, width), 0))


def test_a_copy_of_nothing_touches_nothing() -> None:
    run(
        "mov.u32 %r1, 0; mul.lo.u32 %r60, %r70, 16; cp.async.cg.shared.global [%r60], [%d30 + 4096], 16, %r1; cp.async.wait_all;",
        np.zeros(1, np.uint8),
        shared=512,
    )
