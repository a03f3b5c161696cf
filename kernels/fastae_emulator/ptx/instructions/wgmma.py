"""Asynchronous products of four warps together, operands in shared memory: wgmma (PTX ISA 9.7.15)."""

from __future__ import annotations

import numpy as np

from fastae_emulator.ptx.decoder import Decoder
from fastae_emulator.ptx.descriptors import ELEMENT_BYTES, chunk_addresses, elements, operand, swizzle_of
from fastae_emulator.ptx.errors import UndefinedError, UninitialisedError, UnknownInstructionError, UnsynchronisedError
from fastae_emulator.ptx.instructions.mma import GROUP, IN_GROUP, accumulate, active_warps, dimensions
from fastae_emulator.ptx.scalars import Array
from fastae_emulator.ptx.state import State
from fastae_emulator.ptx.table import Step, implements

WARPGROUP = 128
_WIDTHS = [f"m64n{n}k" for n in range(8, 257, 8)]


def _shapes(k: int) -> str:
    return "|".join(f"{width}{k}" for width in _WIDTHS)


@implements("wgmma", "fence sync aligned")
def fence(d: Decoder) -> Step:
    """Order writes to registers before the products that use them; later writes need another fence."""

    def step(state: State) -> None:
        state.fenced = list(state.registers)

    return step


@implements("wgmma", "commit_group sync aligned")
def commit(d: Decoder) -> Step:
    return lambda state: state.pending.commit_products()


@implements("wgmma", "wait_group sync aligned")
def wait(d: Decoder) -> Step:
    allowed = d.integer(d.operands[0])
    return lambda state: state.release("wgmma", allowed)


@implements(
    "wgmma",
    f"mma_async sync aligned {_shapes(16)} f32 f16 f16", f"mma_async sync aligned {_shapes(16)} f32 bf16 bf16",
    f"mma_async sync aligned {_shapes(8)} f32 tf32 tf32",
    f"mma_async sync aligned {_shapes(32)} satfinite? s32 s8|u8 s8|u8",
)  # fmt: skip
def product(d: Decoder) -> Step:
    m, n, k = dimensions(d.slots[3])
    kind_d, kind_a, kind_b = d.slots[-3:]
    saturate, size = "satfinite" in d.slots, ELEMENT_BYTES[kind_a]
    results = [d.register(name) for name in d.vector(d.operands[0])]
    if len(results) != n // 2:
        raise d.refuse(f"{n // 2} accumulators needed")
    from_registers = d.operands[1].startswith("{")
    names_a = d.vector(d.operands[1]) if from_registers else []
    sources = [d.register(name) for name in names_a]
    reads_a = [d.bits(name, "b32") for name in names_a]
    place_a = None if from_registers else d.read(1, "u64")
    place_b, keep = d.read(2, "u64"), d.predicate(d.operands[3])
    flags = [d.integer(text) for text in d.operands[4:]]
    sign = float(np.prod(flags[:2])) if flags else 1.0  # imm-scale-a times imm-scale-b, each 1 or -1
    transposed_a = not from_registers and len(flags) > 2 and flags[2] == 1
    transposed_b = len(flags) > 2 and flags[-1] == 1
    packed = 4 // size
    i = np.arange(len(results))[:, None, None]
    warp = np.arange(4)[:, None]
    rows = np.broadcast_to(16 * warp + GROUP + 8 * ((i >> 1) & 1), (len(results), 4, 32)).reshape(len(results), -1)
    cols = np.broadcast_to(8 * (i >> 2) + 2 * IN_GROUP + (i & 1), (len(results), 4, 32)).reshape(len(results), -1)
    dtype = np.int32 if kind_d == "s32" else np.float32
    name = f"wgmma {kind_a}"

    def fetch(state: State, descriptor: int, block: int, rows: int, kind: str, mn: bool) -> tuple[Array, Array]:
        width = swizzle_of(descriptor, tcgen05=False)
        if width is None:
            state.fail(UnknownInstructionError, f"matrix descriptor {descriptor:#x}: a layout without swizzle")
        addresses = chunk_addresses(descriptor, width, rows, k, size, mn)
        chunks = state.shared.chunks(block, addresses)
        return operand(chunks, kind, rows, k, mn), (addresses + block * state.shared.stride).ravel()

    def register_operand(state: State, first: int) -> Array:
        """Operand A from registers: 16 rows a warp, laid out as for mma.sync."""
        a = np.zeros((64, k))
        rows_a = 16 * warp + GROUP
        for j, read in enumerate(reads_a):
            bits = np.ascontiguousarray(read(state)[first : first + WARPGROUP]).reshape(4, 32, 1).view(np.uint8)
            state.require_defined("multiplies a value")
            values = elements(bits, kind_a)
            for e in range(packed):
                a[rows_a + 8 * (j & 1), IN_GROUP * packed + 4 * packed * (j >> 1) + e] = values[..., e]
        return a

    def step(state: State) -> None:
        groups = _active_groups(state)
        state.tally.product(name, len(groups), m, n, k)
        _check_fence(state, [*results, *sources])
        keeping = state.spread(keep(state))
        old = _accumulators(state, results, keeping, dtype)
        new = old.copy()
        state.require_defined("multiplies a value")
        consumed = []
        where_a = None if place_a is None else state.spread(place_a(state))
        where_b = state.spread(place_b(state))
        for first in groups:
            threads = slice(first, first + WARPGROUP)
            block = int(state.block[first])
            b, used = fetch(state, _uniform(state, where_b, threads), block, n, kind_b, transposed_b)
            consumed.append(used)
            if where_a is None:
                a = register_operand(state, first)
            else:
                a, used = fetch(state, _uniform(state, where_a, threads), block, m, kind_a, transposed_a)
                consumed.append(used)
            total = sign * (a @ b.T)[rows, cols]
            added = np.where(keeping[threads], old[:, threads].astype(np.float64), 0.0)
            new[:, threads] = accumulate(total, added, kind_d, saturate)
        for number, values in zip(results, new, strict=True):
            state.registers[number] = values
            state.fenced[number] = values
            missing = state.unwritten.pop(number, None)
            if missing is not None and (missing & ~state.active).any():
                state.unwritten[number] = missing & ~state.active
        chunks = np.unique(np.concatenate(consumed))
        state.hold("wgmma", results, sources, (chunks[:, None] + np.arange(16)).ravel())

    return step


def _active_groups(state: State) -> list[int]:
    """First thread of each warpgroup that executes."""
    active_warps(state)
    lanes = state.active.reshape(-1, WARPGROUP)
    if (lanes.any(1) != lanes.all(1)).any():
        state.fail(UnsynchronisedError, "only some warps of a warpgroup execute wgmma")
    return [WARPGROUP * int(group) for group in np.flatnonzero(lanes.any(1))]


def _uniform(state: State, values: Array, threads: slice) -> int:
    own = values[threads]
    if (own != own[0]).any():
        state.fail(UndefinedError, "the warps of a warpgroup disagree about a matrix descriptor", threads.start)
    return int(own[0])


def _check_fence(state: State, numbers: list[int]) -> None:
    """Check for a wgmma.fence before the first product, and after changes of its registers (PTX ISA 9.7.15.7.1)."""
    active = state.active
    for number in numbers:
        now, then = state.registers[number], state.fenced[number]
        if now is then:
            continue
        if now is None or then is None or (state.raw(number)[active] != then.view(now.dtype)[active]).any():
            name = state.names[number]
            state.fail(UnsynchronisedError, f"register {name} was written with no wgmma.fence since")


def _accumulators(state: State, numbers: list[int], keeping: Array, dtype: type) -> Array:
    """Accumulators [registers, lanes]; those that are added to have to be written."""
    rows = []
    for number in numbers:
        bits = state.registers[number]
        missing = state.unwritten.get(number)
        wanted = keeping & state.active
        if (bits is None and wanted.any()) or (missing is not None and (missing & wanted).any()):
            state.fail(UninitialisedError, f"adds to register {state.names[number]}, which was never written")
        rows.append(np.zeros(state.lanes, dtype) if bits is None else bits.view(dtype))
    return np.stack(rows)
