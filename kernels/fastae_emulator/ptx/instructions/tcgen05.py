"""Tensor memory and the products of sm_100 in it: tcgen05 (PTX ISA 9.7.16)."""

from __future__ import annotations

import numpy as np

from fastae_emulator.ptx.decoder import Decoder
from fastae_emulator.ptx.descriptors import ELEMENT_BYTES, chunk_addresses, elements, operand, swizzle_of
from fastae_emulator.ptx.errors import UndefinedError, UnknownInstructionError
from fastae_emulator.ptx.instructions.mma import accumulate, active_warps
from fastae_emulator.ptx.scalars import Array
from fastae_emulator.ptx.state import State
from fastae_emulator.ptx.table import Step, implements
from fastae_emulator.ptx.tensor_memory import TensorMemory

_KINDS = {"kind::f16": {0: "f16", 1: "bf16"}, "kind::tf32": {2: "tf32"}, "kind::i8": {0: "u8", 1: "s8"}}
_RESULTS = {"kind::f16": {1: "f32"}, "kind::tf32": {1: "f32"}, "kind::i8": {2: "s32"}}
_REPEATS = "x1|x2|x4|x8|x16|x32|x64|x128"


def _memory(state: State) -> TensorMemory:
    assert state.tensor_memory is not None  # made for every program that names tcgen05
    return state.tensor_memory


@implements("tcgen05", "alloc cta_group::1 sync aligned shared::cta? b32")
def allocate(d: Decoder) -> Step:
    address, columns = d.address(d.operands[0]), d.read(1, "u32")

    def step(state: State) -> None:
        active_warps(state)
        lanes = np.flatnonzero(state.active & (state.lane == 0))
        many = state.spread(columns(state))[lanes]
        blocks = state.block[lanes]
        if np.unique(blocks).size != blocks.size:
            state.fail(UndefinedError, "several warps of a block allocate tensor memory")
        first = [_memory(state).allocate(int(b), int(n)) for b, n in zip(blocks, many, strict=True)]
        to = state.spread(address(state))[lanes]
        state.shared.store(to, lanes, np.array([first], np.uint32))

    return step


@implements("tcgen05", "dealloc cta_group::1 sync aligned b32")
def free(d: Decoder) -> Step:
    address, columns = d.read(0, "u32"), d.read(1, "u32")

    def step(state: State) -> None:
        active_warps(state)
        first, many = (state.spread(read(state)) for read in (address, columns))
        for lane in np.flatnonzero(state.active & (state.lane == 0)).tolist():
            _memory(state).free(int(state.block[lane]), int(first[lane]), int(many[lane]), lane)

    return step


@implements("tcgen05", "relinquish_alloc_permit cta_group::1 sync aligned")
@implements("tcgen05", "fence::before_thread_sync|fence::after_thread_sync")
def no_effect(d: Decoder) -> Step:
    return lambda state: None


@implements("tcgen05", "wait::ld|wait::st sync aligned")
def wait(d: Decoder) -> Step:
    if d.slots[0] == "wait::ld":
        return lambda state: state.release("tcgen05.ld")
    return lambda state: _memory(state).wait_stores()


@implements("tcgen05", f"ld|st sync aligned 32x32b {_REPEATS} b32", f"ld|st sync aligned 16x32bx2 {_REPEATS} b32")
def load_store(d: Decoder) -> Step:
    """Load or store neighbouring columns of each lane's row; in 16x32bx2 those of lanes 16-31 lie further right."""
    loads, halves = d.slots[0] == "ld", d.slots[3] == "16x32bx2"
    operands = list(d.operands)
    vector = d.vector(operands.pop(0 if loads else -1))
    place = d.address(operands.pop(0))
    split = d.integer(operands.pop(0)) if halves else 0
    if operands or len(vector) != int(d.slots[4][1:]):
        raise d.refuse("as many registers as the repeat says, and no more operands")
    numbers = [] if not loads else [d.register(name) for name in vector]
    reads = [] if loads else [d.bits(name, "b32") for name in vector]
    writes = [d.store(name, "b32") for name in vector] if loads else []
    step_columns = np.arange(len(vector))[:, None]

    def cells(state: State) -> tuple[Array, Array]:
        at = state.spread(place(state))
        lane = state.lane & 15 if halves else state.lane
        column = (at & 0xFFFF) + np.where(state.lane >= 16, split, 0)
        return ((at >> 16) + lane)[None, :], column + step_columns

    def load(state: State) -> None:
        active_warps(state)
        got = _memory(state).load(*cells(state))
        values = np.zeros((len(vector), state.lanes), np.uint32)
        values[:, state.active] = got
        for write, row in zip(writes, values, strict=True):
            write(state, row)
        state.hold("tcgen05.ld", numbers, [], np.zeros(0, np.int64))

    def store(state: State) -> None:
        active_warps(state)
        values = np.stack([state.spread(read(state))[state.active] for read in reads])
        state.require_defined("stores a value")
        _memory(state).store(*cells(state), values)

    return load if loads else store


@implements("tcgen05", "commit cta_group::1 mbarrier::arrive::one shared::cluster? b64")
def commit(d: Decoder) -> Step:
    """Arrive once all products of this thread so far are done; they are, but only threads that wait may know."""
    address = d.address(d.operands[0])

    def step(state: State) -> None:
        _one_thread_a_block(state)
        state.mbarriers.arrive(address(state), covers=True)

    return step


def _one_thread_a_block(state: State) -> Array:
    lanes = np.flatnonzero(state.active)
    blocks = state.block[lanes]
    if np.unique(blocks).size != blocks.size:
        state.fail(UndefinedError, "several threads of a block execute an instruction of one thread")
    return lanes


@implements("tcgen05", "mma cta_group::1 kind::f16|kind::tf32|kind::i8")
def product(d: Decoder) -> Step:
    kind = d.slots[2]
    if len(d.operands) != 5:
        raise d.refuse("scales or masks")
    from_tensor_memory = d.operands[1].startswith("[")
    place_d = d.address(d.operands[0])
    place_a = d.address(d.operands[1]) if from_tensor_memory else d.read(1, "s64")
    place_b, description, keep = d.read(2, "u64"), d.read(3, "u32"), d.predicate(d.operands[4])

    def step(state: State) -> None:
        every = [state.spread(read(state)) for read in (place_d, place_a, place_b, description, keep)]
        state.require_defined("multiplies by a value")
        for lane in _one_thread_a_block(state):
            to, a, b, shape, adding = (int(values[lane]) for values in every)
            _multiply(state, kind, int(lane), to, a, b, shape, bool(adding), from_tensor_memory)

    return step


def _multiply(
    state: State, kind: str, lane: int, to: int, place_a: int, place_b: int, shape: int, adding: bool,
    a_inside: bool,
) -> None:  # fmt: skip
    """Multiply with the types, transpositions and sizes of an instruction descriptor (PTX ISA 9.7.16.4.2)."""
    memory, block = _memory(state), int(state.block[lane])
    n, m = ((shape >> 17) & 63) << 3, ((shape >> 24) & 31) << 4
    kind_a, kind_b = (_KINDS[kind].get((shape >> at) & 7) for at in (7, 10))
    result = _RESULTS[kind].get((shape >> 4) & 3)
    # Sparsity, saturation and negation (bits 0-3, 13-14, 23, 29-31)
    if kind_a is None or kind_b is None or result is None or m not in (64, 128) or shape & 0xE080600F:
        state.fail(UnknownInstructionError, f"instruction descriptor {shape:#x} of {kind} not implemented", lane)
    size = ELEMENT_BYTES[kind_a]
    k = 32 // size
    # M = 64 uses the first 16 rows of each warp's 32 (PTX ISA 9.7.16.10.5)
    row = np.arange(128) if m == 128 else np.arange(64) // 16 * 32 + np.arange(64) % 16
    cells = ((row + (to >> 16))[:, None], (to & 0xFFFF) + np.arange(n))
    consumed = []

    def fetch(descriptor: int, rows: int, of: str, mn: bool) -> Array:
        descriptor &= (1 << 64) - 1
        width = swizzle_of(descriptor, tcgen05=True)
        if width is None:
            state.fail(UnknownInstructionError, f"matrix descriptor {descriptor:#x}: a layout without swizzle", lane)
        addresses = chunk_addresses(descriptor, width, rows, k, size, mn)
        chunks = state.shared.chunks(block, addresses)
        consumed.append((addresses[..., None] + np.arange(16) + block * state.shared.stride).ravel())
        return operand(chunks, of, rows, k, mn)

    source = None
    if a_inside:
        source = ((row + (place_a >> 16))[:, None], (place_a & 0xFFFF) + np.arange(8))
        a = elements(np.ascontiguousarray(memory.cells[block][source]).view(np.uint8), kind_a)
    else:
        a = fetch(place_a, m, kind_a, bool((shape >> 15) & 1))
    b = fetch(place_b, n, kind_b, bool((shape >> 16) & 1))
    memory.start(block, cells, source, np.concatenate(consumed), adding, lane)
    dtype = np.int32 if result == "s32" else np.float32
    old = memory.cells[block][cells].view(dtype).astype(np.float64) if adding else np.zeros(1)
    memory.cells[block][cells] = accumulate(a @ b.T, old, result, saturate=False).view(np.uint32)
    state.tally.product(f"tcgen05.mma {kind_a}", 1, m, n, k)
