# ruff: noqa: E501 - lines of PTX are kept whole
"""Counters of the machine, on kernels whose numbers can be worked out by hand."""

import numpy as np
import pytest
from fastae_emulator.ptx import TensorTraffic
from ptx_programs import run

HOST = np.zeros(4096, np.uint32)


def count(body: str, threads: int = 64, blocks: int = 1, shared: int = 4096):  # type: ignore[no-untyped-def]
    return run(body, HOST.copy(), HOST.copy(), threads=threads, blocks=blocks, shared=shared, count=True)


def test_instructions_are_counted_by_warp() -> None:
    counters = count(
        "setp.lt.u32 %p1, %r70, 32; @%p1 mov.u32 %r1, 0; bar.sync 0; @%p1 bra $L; mov.u32 %r2, 0; $L: mov.u32 %r3, 0;"
    )
    # Five of the prologue, six above and the return in both warps, one more in the warp that does not jump
    assert counters.instructions == 2 * (5 + 5 + 1) + 1
    assert counters.barriers == 2
    assert counters.opcodes["mov.u32"] == 2 + 2 + 1 + 2
    assert counters.opcodes["bra"] == 2


@pytest.mark.parametrize(
    ("stride", "width", "sectors", "used"),
    [
        (4, 4, 4, 1.0),
        (8, 4, 8, 0.5),
        (32, 4, 32, 0.125),
        (128, 4, 32, 0.125),
        (16, 16, 16, 1.0),
        (0, 4, 1, 0.125),
        (2, 2, 2, 1.0),
    ],
)
def test_sectors(stride: int, width: int, sectors: int, used: float) -> None:
    """Count sectors of one warp that reads `width` bytes in each thread."""
    load = {2: "ld.global.b16 %h1, [%d1];", 4: "ld.global.b32 %r1, [%d1];", 16: "ld.global.v2.b64 {%d2, %d3}, [%d1];"}[
        width
    ]
    counters = count(f"mad.wide.u32 %d1, %r70, {stride}, %d30; {load}", threads=32)
    assert (counters.sectors_read, counters.sectors_written) == (sectors, 0)
    assert counters.sector_use == used
    assert (counters.load_widths, counters.store_widths, counters.requests) == ({width: 1}, {}, 1)


def test_bytes_are_distinct_but_requests_are_not() -> None:
    again = "ld.global.b32 %r1, [%d1];"
    counters = count(
        "mad.wide.u32 %d1, %r70, 4, %d30; mad.wide.u32 %d2, %r70, 8, %d31;" + 3 * again + "st.global.b32 [%d2], %r1;"
    )
    assert counters.tensors == {"tensor0": TensorTraffic(256, 0), "tensor1": TensorTraffic(0, 256)}
    assert (counters.load_widths, counters.store_widths) == ({4: 6}, {4: 2})
    assert (counters.sectors_read, counters.sectors_written) == (3 * 8, 16)
    assert counters.sector_use == (3 * 256 + 256) / (32 * 40)


def test_masked_threads_move_nothing() -> None:
    counters = count("setp.lt.u32 %p1, %r70, 5; mad.wide.u32 %d1, %r70, 4, %d30; @%p1 ld.global.b32 %r1, [%d1];")
    assert counters.tensors["tensor0"] == TensorTraffic(20, 0)
    assert counters.load_widths == {4: 1}
    assert counters.sectors_read == 1


def test_async_copies_are_loads_too() -> None:
    counters = count(
        "mul.lo.u32 %r1, %r70, 16; mad.wide.u32 %d1, %r70, 16, %d30; cp.async.cg.shared.global [%r1], [%d1], 16; cp.async.wait_all;"
    )
    assert counters.async_copies == 2
    assert counters.load_widths == {16: 2}
    assert counters.tensors["tensor0"].bytes_read == 1024


@pytest.mark.parametrize(
    ("stride", "conflicts"), [(4, 0), (0, 0), (8, 1), (16, 3), (64, 15), (128, 31), (132, 0), (12, 0)]
)
def test_bank_conflicts_of_words(stride: int, conflicts: int) -> None:
    """A stride of 2^n words puts 2^n threads on a bank; an odd one puts none together."""
    counters = count(
        f"mul.lo.u32 %r1, %r70, {stride}; mov.u32 %r2, 7; st.shared.b32 [%r1], %r2;", threads=32, shared=8192
    )
    assert counters.shared_requests == 1
    assert counters.bank_conflicts == conflicts


@pytest.mark.parametrize(
    ("width", "stride", "conflicts"), [(16, 16, 0), (16, 32, 4), (8, 8, 0), (8, 16, 2), (16, 144, 0)]
)
def test_bank_conflicts_of_vectors(width: int, stride: int, conflicts: int) -> None:
    """16 bytes a thread go in four quarters of a warp, 8 in two halves."""
    store = {8: "st.shared.b64 [%r1], %d1;", 16: "st.shared.v2.b64 [%r1], {%d1, %d1};"}[width]
    counters = count(f"mov.b64 %d1, 0; mul.lo.u32 %r1, %r70, {stride}; {store}", threads=32, shared=8192)
    assert counters.bank_conflicts == conflicts


def test_blocks_add_up() -> None:
    counters = count(
        "mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 64, %r70; mad.wide.u32 %d1, %r2, 4, %d30; ld.global.b32 %r3, [%d1];",
        blocks=5,
    )
    assert (counters.blocks, counters.blocks_in_grid) == (5, 5)
    assert counters.tensors["tensor0"].bytes_read == 5 * 64 * 4
    assert counters.load_widths == {4: 10}


def test_nothing_is_counted_unless_asked() -> None:
    counters = run("ld.global.b32 %r1, [%d30];", HOST.copy())
    assert counters.instructions == 7
    assert (counters.tensors, counters.load_widths, counters.sectors_read) == ({}, {}, 0)
    assert counters.sector_use == 1.0


def test_a_sector_at_the_end_of_a_tensor_has_fewer_bytes_to_use() -> None:
    """20 bytes read of a tensor of 20: nothing was fetched in vain."""
    short = np.zeros(5, np.uint32)
    body = "setp.lt.u32 %p1, %r70, 5; mad.wide.u32 %d1, %r70, 4, %d30; @%p1 ld.global.b32 %r1, [%d1];"
    counters = run(body, short, HOST.copy(), threads=32, blocks=1, shared=4096, count=True)
    assert (counters.sector_bytes, counters.sector_bytes_used, counters.sector_use) == (20, 20, 1.0)
    counters = run(body, HOST.copy(), HOST.copy(), threads=32, blocks=1, shared=4096, count=True)
    assert (counters.sector_bytes, counters.sector_bytes_used, counters.sector_use) == (32, 20, 20 / 32)
