"""Warp products: mma.sync, ldmatrix, stmatrix (PTX ISA 9.7.14). Sums are exact and rounded once; a GPU drops bits."""

from __future__ import annotations

import re

import numpy as np

from fastae_emulator.ptx.decoder import Decoder, Read
from fastae_emulator.ptx.descriptors import ELEMENT_BYTES, elements
from fastae_emulator.ptx.errors import UninitialisedError, UnsynchronisedError
from fastae_emulator.ptx.scalars import Array
from fastae_emulator.ptx.state import State
from fastae_emulator.ptx.table import Step, implements

LANE = np.arange(32)
GROUP, IN_GROUP = LANE >> 2, LANE & 3


def dimensions(shape: str) -> tuple[int, int, int]:
    """Parse "m16n8k16" to (16, 8, 16)."""
    m, n, k = map(int, re.findall(r"\d+", shape))
    return m, n, k


def active_warps(state: State) -> int:
    """Count the warps that execute; all lanes of a warp have to (`.sync.aligned`)."""
    lanes = state.active.reshape(-1, 32)
    if state.whole:
        return lanes.shape[0]
    some = lanes.any(1)
    if (some != lanes.all(1)).any():
        state.fail(UnsynchronisedError, "only some lanes of a warp execute an instruction of whole warps")
    return int(some.sum())


def accumulate(product: Array, c: Array, kind: str, saturate: bool) -> Array:
    """Add in the type of the accumulator."""
    total = product + c
    if kind != "s32":
        return total.astype(np.float16 if kind == "f16" else np.float32)
    whole = np.clip(total, -(2**31), 2**31 - 1) if saturate else total
    return whole.astype(np.int64).astype(np.int32)


@implements(
    "mma",
    "sync aligned m16n8k8|m16n8k16 row col f32 f16 f16 f32", "sync aligned m16n8k8|m16n8k16 row col f32 bf16 bf16 f32",
    "sync aligned m16n8k8|m16n8k16 row col f16 f16 f16 f16", "sync aligned m16n8k4|m16n8k8 row col f32 tf32 tf32 f32",
    "sync aligned m16n8k16|m16n8k32 row col satfinite? s32 s8|u8 s8|u8 s32",
)  # fmt: skip
def product(d: Decoder) -> Step:
    """Multiply fragments (PTX ISA 9.7.14.5): a register of A holds 32 bits of a row, one of B 32 bits of a column."""
    m, n, k = dimensions(d.slots[2])
    kind_a, kind_b, kind_c = d.slots[-3], d.slots[-2], d.slots[-1]
    saturate = "satfinite" in d.slots
    packed = 4 // ELEMENT_BYTES[kind_a]
    targets, names_a, names_b, names_c = (d.vector(operand) for operand in d.operands)
    if (len(names_a), len(names_b)) != (m * k // (32 * packed), k * n // (32 * packed)):
        raise d.refuse("as many registers as the shape has")
    e = np.arange(packed)
    i = np.arange(len(names_a))[:, None, None]
    rows_a = np.broadcast_to(GROUP[:, None] + 8 * (i & 1), (len(names_a), 32, packed))
    cols_a = IN_GROUP[:, None] * packed + 4 * packed * (i >> 1) + e
    i = np.arange(len(names_b))[:, None, None]
    rows_b = IN_GROUP[:, None] * packed + 4 * packed * i + e
    cols_b = np.broadcast_to(GROUP[:, None], rows_b.shape)
    # An f16 accumulator packs two neighbours into a register
    pair = np.arange(2) if kind_c == "f16" else np.arange(1)
    j = np.arange(4 // pair.size)[:, None, None] * pair.size
    rows_c = np.broadcast_to(GROUP[:, None] + 8 * (j >> 1), (4 // pair.size, 32, pair.size))
    cols_c = 2 * IN_GROUP[:, None] + (j & 1) + pair
    dtype_c = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[kind_c]
    reads_a, reads_b, reads_c = ([d.bits(x, "b32") for x in names] for names in (names_a, names_b, names_c))
    writes = [d.store(target, "b32") for target in targets]
    name = f"mma.sync {kind_a}"

    def fragment(state: State, reads: list[Read], kind: str | None) -> Array:
        bits = np.stack([state.spread(read(state)) for read in reads])
        octets = bits.reshape(len(reads), -1, 32, 1).view(np.uint8)  # [register, warp, lane, 4]
        values = octets.view(dtype_c) if kind is None else elements(octets, kind)
        return values.transpose(1, 0, 2, 3)

    def step(state: State) -> None:
        state.tally.product(name, active_warps(state), m, n, k)
        warps = state.lanes // 32
        a, b, c = np.zeros((warps, m, k)), np.zeros((warps, k, n)), np.zeros((warps, m, n))
        a[:, rows_a, cols_a] = fragment(state, reads_a, kind_a)
        b[:, rows_b, cols_b] = fragment(state, reads_b, kind_b)
        c[:, rows_c, cols_c] = fragment(state, reads_c, None)
        state.require_defined("multiplies a value")
        result = accumulate(a @ b, c, kind_c, saturate)[:, rows_c, cols_c]  # [warp, register, lane, pair]
        bits = np.ascontiguousarray(result.transpose(1, 0, 2, 3)).reshape(len(writes), -1).view(np.uint32)
        for write, values in zip(writes, bits, strict=True):
            write(state, values)

    return step


@implements("mma", "sync aligned m8n8k4|m16n8k4|m16n8k8|m16n8k16 row col f64 f64 f64 f64")
def product_f64(d: Decoder) -> Step:
    """Multiply fragments of one element a register (PTX ISA 9.7.14.5.1, .5.10)."""
    m, n, k = dimensions(d.slots[2])
    targets, names_a, names_b, names_c = (d.vector(operand) for operand in d.operands)
    if (len(names_a), len(names_b), len(names_c)) != (m * k // 32, k * n // 32, m * n // 32):
        raise d.refuse("as many registers as the shape has")
    reads_a, reads_b, reads_c = ([d.bits(x, "f64") for x in names] for names in (names_a, names_b, names_c))
    writes = [d.store(target, "f64") for target in targets]
    blocks = m // 8  # of 8 rows

    def step(state: State) -> None:
        state.tally.product("mma.sync f64", active_warps(state), m, n, k)
        warps = state.lanes // 32
        a, b, c = np.zeros((warps, m, k)), np.zeros((warps, k, n)), np.zeros((warps, m, n))

        def values(read: Read) -> Array:
            return state.spread(read(state)).reshape(warps, 32)

        for i, read in enumerate(reads_a):
            a[:, GROUP + 8 * (i % blocks), 4 * (i // blocks) + IN_GROUP] = values(read)
        for i, read in enumerate(reads_b):
            b[:, 4 * i + IN_GROUP, GROUP] = values(read)
        for i, read in enumerate(reads_c):
            c[:, GROUP + 8 * (i >> 1), 2 * IN_GROUP + (i & 1)] = values(read)
        state.require_defined("multiplies a value")
        result = a @ b + c
        for i, write in enumerate(writes):
            write(state, np.ascontiguousarray(result[:, GROUP + 8 * (i >> 1), 2 * IN_GROUP + (i & 1)]).ravel())

    return step


@implements("ldmatrix", "sync aligned m8n8 x1|x2|x4 trans? shared|shared::cta b16")
def load_matrix(d: Decoder) -> Step:
    """Load matrices: lanes 8 i to 8 i + 7 hold the addresses of the rows of matrix i (PTX ISA 9.7.14.5.15)."""
    many, trans = int(d.slots[3][1]), bool(d.slots[4])
    address = d.address(d.operands[1])
    writes = [d.store(name, "b32") for name in d.vector(d.operands[0])]
    if len(writes) != many:
        raise d.refuse(f"{many} registers needed")

    def step(state: State) -> None:
        active_warps(state)
        lanes = np.flatnonzero(state.active & (state.lane < 8 * many))
        own = state.spread(address(state))[lanes]
        rows, missing = state.shared.load(own, lanes, 2, 8)
        if missing is not None and missing.any():
            lane = int(lanes[np.argmax(missing.any(0))])
            state.fail(UninitialisedError, "reads bytes of shared memory to which nothing was written", lane)
        octets = np.ascontiguousarray(rows.T).view(np.uint16)  # [lanes, 8 elements]
        matrices = octets.reshape(-1, many, 8, 8)  # [warp, matrix, row, column]
        if trans:
            matrices = matrices.transpose(0, 1, 3, 2)
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, many, 32)  # a lane holds two neighbours
        every = np.zeros((many, state.lanes), np.uint32)
        every[:, state.active] = pairs.transpose(1, 0, 2).reshape(many, -1)
        for write, values in zip(writes, every, strict=True):
            write(state, values)

    return step


@implements("stmatrix", "sync aligned m8n8 x1|x2|x4 trans? shared|shared::cta b16")
def store_matrix(d: Decoder) -> Step:
    many, trans = int(d.slots[3][1]), bool(d.slots[4])
    address = d.address(d.operands[0])
    reads = [d.bits(name, "b32") for name in d.vector(d.operands[1])]
    if len(reads) != many:
        raise d.refuse(f"{many} registers needed")

    def step(state: State) -> None:
        active_warps(state)
        lanes = np.flatnonzero(state.active & (state.lane < 8 * many))
        bits = np.stack([state.spread(read(state))[state.active] for read in reads])
        state.require_defined("stores a value")
        matrices = bits.view(np.uint16).reshape(many, -1, 8, 8).transpose(1, 0, 2, 3)  # [warp, matrix, row, column]
        if trans:
            matrices = matrices.transpose(0, 1, 3, 2)
        rows = np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint64)  # [warp, matrix, row] x 2
        state.shared.store(state.spread(address(state))[lanes], lanes, np.ascontiguousarray(rows.T))

    return step
