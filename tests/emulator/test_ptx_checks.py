# ruff: noqa: E501 - lines of PTX are kept whole
"""Checks of the machine: for each a kernel that violates it, and the message."""

import re

import numpy as np
import pytest
from fastae_emulator.ptx.errors import (
    InFlightError,
    MisalignedError,
    OutOfBoundsError,
    PtxError,
    RaceError,
    UndefinedError,
    UninitialisedError,
    UnsynchronisedError,
)
from ptx_programs import run

PLACE = "kernel, tile.py:7, called from op.py:42: "
ADDRESS = "mul.lo.u32 %r60, %r70, 4;"  # of a word of shared memory for each thread
OTHER = "xor.b32 %r61, %r70, 32; mul.lo.u32 %r61, %r61, 4;"  # the word of a thread in the other warp


def refused(kind: type[PtxError], message: str, body: str, *arrays: np.ndarray, threads: int = 64) -> None:
    with pytest.raises(kind, match=re.escape(message)) as caught:
        run(body, *(arrays or (np.zeros(64, np.uint32),)), threads=threads, shared=1024)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(PLACE), caught.value
    assert re.search(r"; block \d+, warp \d+, lane \d+; `|; `", str(caught.value))


def passes(body: str, *arrays: np.ndarray, threads: int = 64) -> None:
    run(body, *(arrays or (np.zeros(64, np.uint32),)), threads=threads, shared=1024)


# ---------------------------------------------------------------- global memory


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r1, [%d30 + 256];", "reads 4 bytes at byte 256 of tensor0, which has 256; block 0, warp 0, lane 0"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d30 + 256];", "reads 16 bytes at byte 256 of tensor0"),
        ("st.global.b8 [%d30 + 256], %h1;", "writes 1 bytes at byte 256 of tensor0"),
        ("ld.global.b16 %h1, [%d30 + -2];", "reads 2 bytes at 2 bytes before the start of tensor0 (256 bytes)"),
        ("mov.b64 %d1, 64; ld.global.b32 %r1, [%d1];", "reads 4 bytes at 0x40, in no tensor (a null pointer?)"),
        ("mad.wide.u32 %d1, %r70, 4, %d30; ld.global.b32 %r1, [%d1 + 8];", "at byte 256 of tensor0, which has 256; block 0, warp 1, lane 30"),
        ("ld.global.v2.b32 {%r1, %r2}, [%d30 + 1048576];", "reads 8 bytes at byte 1048576 of tensor0"),
        ("mov.u32 %r1, 0; cp.async.ca.shared.global [%r1], [%d30 + 256], 4;", "reads 4 bytes at byte 256 of tensor0"),
        ("mov.u32 %r1, 0; atom.global.add.u32 %r2, [%d30 + 256], %r1;", "writes 4 bytes at byte 256 of tensor0"),
    ],
)  # fmt: skip
def test_out_of_bounds(body: str, message: str) -> None:
    refused(OutOfBoundsError, message, "mov.u16 %h1, 1; " + body if body.startswith("st") else body)


def test_the_last_byte_is_inside() -> None:
    tensor = np.zeros(7, np.uint8)
    passes("mov.u16 %h1, 9; st.global.b8 [%d30 + 6], %h1;", tensor, threads=32)
    assert tensor[6] == 9
    refused(OutOfBoundsError, "byte 7 of tensor0, which has 7", "ld.global.b8 %h1, [%d30 + 7];", tensor)
    refused(OutOfBoundsError, "byte 4 of tensor0, which has 7", "ld.global.b32 %r1, [%d30 + 4];", tensor)


def test_a_masked_access_is_none() -> None:
    passes("setp.lt.u32 %p1, %r70, 0; @%p1 ld.global.b32 %r1, [%d30 + 4096];")


def test_one_tensor_is_never_reached_from_another() -> None:
    for shift in range(0, 1 << 20, 65536):
        refused(
            OutOfBoundsError,
            "of tensor0",
            f"ld.global.b32 %r1, [%d30 + {256 + shift}];",
            *(np.zeros(64, np.uint32),) * 2,
        )


def test_misaligned() -> None:
    refused(
        MisalignedError,
        "reads 4 bytes at an address that is no multiple: at byte 2 of tensor0",
        "ld.global.b32 %r1, [%d30 + 2];",
    )
    refused(MisalignedError, "reads 16 bytes", "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d30 + 8];")
    refused(
        MisalignedError,
        "reads 4 bytes of shared memory at 2, no multiple of 4",
        "mov.u32 %r1, 2; ld.shared.b32 %r2, [%r1];",
    )
    refused(
        MisalignedError,
        "copies 16 bytes of shared memory at 8",
        "mov.u32 %r1, 8; cp.async.cg.shared.global [%r1], [%d30], 16;",
        threads=32,
    )


# ---------------------------------------------------------------- shared memory

STORE, LOAD = f"{ADDRESS} st.shared.b32 [%r60], %r70;", f"{OTHER} ld.shared.b32 %r1, [%r61];"


def test_shared_out_of_bounds() -> None:
    refused(
        OutOfBoundsError,
        "reads 4 bytes at byte 1024 of shared memory, which has 1024",
        "mov.u32 %r1, 1024; ld.shared.b32 %r2, [%r1];",
    )
    refused(
        OutOfBoundsError, "writes 4 bytes at byte -4 of shared memory", "mov.u32 %r1, 0; st.shared.b32 [%r1 + -4], %r1;"
    )


def test_a_read_races_with_a_write() -> None:
    passes(f"{STORE} bar.sync 0; {LOAD}")
    refused(
        RaceError,
        "reads byte 128 of shared memory: written by warp 1 since the last barrier; block 0, warp 0, lane 0",
        STORE + LOAD,
    )


def test_a_write_races_with_a_read() -> None:
    again = "st.shared.b32 [%r60], %r70;"
    passes(f"{STORE} bar.sync 0; {LOAD} bar.sync 0; {again}")
    refused(
        RaceError,
        "writes byte 0 of shared memory: read by warp 1 since the last barrier",
        f"{STORE} bar.sync 0; {LOAD} {again}",
    )


def test_a_write_races_with_a_write_even_of_the_same_value() -> None:
    refused(
        RaceError,
        "written by warp 0 since",
        "setp.lt.u32 %p1, %r70, 32; mov.u32 %r1, 0; @%p1 st.shared.b32 [%r1], %r1; @!%p1 st.shared.b32 [%r1], %r1;",
    )


def test_two_values_at_once() -> None:
    refused(RaceError, "two threads write different values at once", "mov.u32 %r1, 0; st.shared.b32 [%r1], %r70;")
    passes("mov.u32 %r1, 0; st.shared.b32 [%r1], %r1;")


def test_readers_of_several_warps_are_remembered() -> None:
    """Both warps read a word at once; then the one that was noted last writes it."""
    body = "mov.u32 %r1, 0; setp.ge.u32 %p1, %r70, 32; setp.eq.u32 %p2, %r70, 0; @%p2 st.shared.b32 [%r1], %r1; bar.sync 0; ld.shared.b32 %r2, [%r1];"
    refused(RaceError, "read by several warps since", body + "@%p1 st.shared.b32 [%r1], %r1;")
    refused(
        RaceError, "read by several warps since", body + "setp.lt.u32 %p1, %r70, 32; @%p1 st.shared.b32 [%r1], %r1;"
    )


def test_neighbouring_bytes_do_not_race() -> None:
    passes("cvt.u16.u32 %h1, %r70; st.shared.b8 [%r70], %h1; ld.shared.b8 %h2, [%r70];")


def test_shared_memory_nobody_wrote() -> None:
    load = "mov.u32 %r1, 64; ld.shared.b32 %r2, [%r1];"
    passes(load)  # as long as nothing comes of it
    refused(
        UninitialisedError,
        "stores a value that depends on shared memory, to which nothing was written",
        load + "st.global.b32 [%d30], %r2;",
    )
    refused(UninitialisedError, "uses an address that depends on shared memory", load + "ld.shared.b32 %r3, [%r2];")
    store = "setp.lt.u32 %p1, %r70, 16; @%p1 st.shared.b32 [%r60], %r70; ld.shared.b32 %r2, [%r60]; mad.wide.u32 %d1, %r70, 4, %d30;"
    refused(
        UninitialisedError,
        "shared memory, to which nothing was written; block 0, warp 0, lane 16",
        ADDRESS + store + "st.global.b32 [%d1], %r2;",
    )
    passes(ADDRESS + store + "@%p1 st.global.b32 [%d1], %r2;")


def test_nothing_stored_is_nothing_loaded() -> None:
    """An unwritten register stays unwritten through shared memory and back."""
    refused(
        UninitialisedError,
        "shared memory, to which",
        f"{ADDRESS} st.shared.b32 [%r60], %r5; ld.shared.b32 %r2, [%r60]; st.global.b32 [%d30], %r2;",
    )


# ---------------------------------------------------------------- registers


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b32 [%d30], %r1;", "stores a value that depends on register %r1, to which nothing was written"),
        ("add.s32 %r2, %r1, 1; mul.lo.s32 %r3, %r2, 2; st.global.b32 [%d30], %r3;", "depends on register %r1"),
        ("ld.global.b32 %r1, [%d1];", "uses an address that depends on register %d1"),
        ("@%p1 mov.u32 %r1, 0;", "is guarded by a predicate that depends on register %p1"),
        ("setp.eq.s32 %p1, %r1, 0; @%p1 bra $L; $L:", "is guarded by a predicate that depends on register %r1"),
        ("setp.lt.u32 %p1, %r70, 9; @%p1 mov.u32 %r1, 1; st.global.b32 [%d30], %r1;", "register %r1, to which nothing was written; block 0, warp 0, lane 9"),
        ("mov.b32 %r3, 0; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; st.global.b32 [%d30], %r2;", "register %r1"),
    ],
)  # fmt: skip
def test_registers_nobody_wrote(body: str, message: str) -> None:
    refused(UninitialisedError, message, body)


def test_unwritten_registers_that_decide_nothing() -> None:
    """Compilers read undefined values where nothing comes of it."""
    passes("setp.lt.u32 %p1, %r70, 99; selp.b32 %r2, 5, %r1, %p1; st.global.b32 [%d30], %r2;")
    passes("mov.u32 %r1, 7; mov.b64 %d1, {%r1, %r2}; mov.b64 {%r3, %r4}, %d1; st.global.b32 [%d30], %r3;")
    passes("setp.lt.u32 %p1, %r70, 0; and.pred %p3, %p1, %p2; @%p3 st.global.b32 [%d30], %r1;")


# ---------------------------------------------------------------- copies under way

COPY = f"{ADDRESS} mad.wide.u32 %d1, %r70, 4, %d30; cp.async.ca.shared.global [%r60], [%d1], 4; cp.async.commit_group;"


def test_a_copy_has_to_be_waited_for() -> None:
    read = "ld.shared.b32 %r1, [%r60];"
    passes(COPY + "cp.async.wait_group 0;" + read)
    passes(COPY + "cp.async.wait_all;" + read)
    waiting = "of shared memory: a cp.async to it has not been waited for"
    refused(InFlightError, f"reads byte 0 {waiting}; block 0, warp 0, lane 0", COPY + read)
    refused(InFlightError, f"reads byte 0 {waiting}", COPY + "cp.async.wait_group 1;" + read)
    refused(InFlightError, f"writes byte 0 {waiting}", COPY + "st.shared.b32 [%r60], %r70;")
    refused(InFlightError, f"writes byte 0 {waiting}", COPY + COPY)
    refused(
        InFlightError,
        f"reads byte 0 {waiting}",
        COPY.replace("cp.async.commit_group;", "cp.async.wait_group 0;") + read,
    )


def test_a_copy_is_the_threads_own_until_a_barrier() -> None:
    passes(COPY + "cp.async.wait_group 0; bar.sync 0;" + LOAD)
    refused(RaceError, "reads byte 128 of shared memory: written by warp 1", COPY + "cp.async.wait_group 0;" + LOAD)
    refused(InFlightError, "has not been waited for", COPY + "bar.sync 0;" + LOAD)


def test_a_copy_over_what_others_still_read() -> None:
    refused(
        RaceError,
        "writes byte 0 of shared memory: read by warp 1 since the last barrier",
        f"{STORE} bar.sync 0; {LOAD} {COPY}",
    )
    passes(f"{STORE} bar.sync 0; {LOAD} bar.sync 0; {COPY}")


def test_groups_are_counted_by_thread() -> None:
    """The upper warp commits two groups, so that waiting for all but one covers only its first."""
    two = "setp.ge.u32 %p1, %r70, 32;" + COPY + "@%p1 cp.async.commit_group; cp.async.wait_group 1;"
    refused(InFlightError, "reads byte 0", two + "ld.shared.b32 %r1, [%r60];")
    passes(two + "@%p1 ld.shared.b32 %r1, [%r60];")


# ---------------------------------------------------------------- control


def test_barriers() -> None:
    refused(
        UnsynchronisedError,
        "a barrier that some threads skip by their predicate",
        "setp.lt.u32 %p1, %r70, 32; @%p1 bar.sync 0;",
    )


def test_a_phase_that_never_completes() -> None:
    wait = "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0;"
    refused(
        UnsynchronisedError,
        "waits for an mbarrier phase that nothing completes",
        f"mov.u32 %r1, 0; setp.eq.u32 %p2, %r70, 0; @%p2 mbarrier.init.shared::cta.b64 [%r1], 1; bar.sync 0; $L: {wait} @!%p1 bra $L;",
    )
    refused(UndefinedError, "no mbarrier was set up at byte 0", "mov.u32 %r1, 0;" + wait)


def test_undefined_results() -> None:
    refused(
        UndefinedError, "divides an integer by zero; block 0, warp 0, lane 0", "mov.u32 %r1, 5; div.u32 %r2, %r1, %r70;"
    )
    refused(
        UnsynchronisedError,
        "lanes that the member mask names are not active",
        "setp.lt.u32 %p1, %r70, 16; @%p1 shfl.sync.idx.b32 %r2, %r70, 0, 31, -1;",
    )
    refused(
        UndefinedError,
        "shuffles from a lane that is not active",
        "setp.lt.u32 %p1, %r70, 16; @%p1 shfl.sync.idx.b32 %r2, %r70, 20, 31, 65535;",
        threads=32,
    )
    refused(
        UndefinedError,
        "an active lane is not in the member mask",
        "vote.sync.any.pred %p1, %p2, 1;".replace("%p2", "1"),
    )


def test_diverged_lanes_meet_again_at_a_shuffle() -> None:
    """Half a warp gets there first, by a shorter way; the other half comes from further down."""
    passes(
        "setp.lt.u32 %p1, %r70, 16; @%p1 bra $A; $B: shfl.sync.idx.b32 %r2, %r70, 20, 31, -1; bra $E;"
        "$A: mov.u32 %r3, 1; bra $B; $E: mov.u32 %r4, 0;",
        threads=32,
    )


def test_errors_name_the_block() -> None:
    body = "mov.u32 %r1, %ctaid.x; mad.wide.u32 %d1, %r1, 64, %d30; ld.global.b32 %r2, [%d1];"
    with pytest.raises(OutOfBoundsError, match="block 4, warp 0, lane 0"):
        run(body, np.zeros(64, np.uint32), blocks=6)
