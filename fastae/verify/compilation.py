"""The compilation of `fastae verify`: whole steps of named models, compiled for GPUs that are not there.

`python -m fastae.verify.compilation` writes its findings to standard output. Registers, spills, tensor-core
instructions and widths are read from the machine code that ptxas or LLVM made; which line an access belongs to, and
whether it is asynchronous, from the PTX or amdgcn text before it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fastae_kernels.jit
import torch
from fastae_emulator.accesses import Access, accesses
from fastae_emulator.driver import TARGETS, on_target
from fastae_emulator.launches import Launch, Recorder, read_together
from fastae_emulator.resources import Resources
from fastae_kernels.jit.launch import aligned as rows_aligned

from fastae.verify import budgets
from fastae.verify.findings import Finding, announce, emit, named
from fastae.verify.models import (
    MODELS,
    TRAINED,
    VERIFY_PRECISIONS,
    Model,
    build,
    score_and_encode,
    training_step,
    triton_in,
)
from fastae.verify.workers import in_children, options

SOURCES = [Path(fastae_kernels.jit.__file__).parent]
QUICK = ("mnist", 8192, "bfloat16")


@dataclass
class Compiled:
    """One specialisation of a kernel, and the steps that launch it."""

    launch: Launch
    target: str
    precision: str
    model: str
    steps: list[str] = field(default_factory=list)

    @property
    def aligned(self) -> bool:
        """Whether the rows of all matrices are multiples of 16 bytes."""
        matrices = [t for t in self.launch.tensors.values() if t.dim() == 2]
        return all(rows_aligned(t) for t in matrices)

    @property
    def resources(self) -> Resources:
        return self.launch.kernel.resources

    @property
    def text(self) -> str:
        return self.launch.kernel.text("ptx" if self.target.startswith("sm_") else "amdgcn")


def compiled(model: Model, batch: int, precision: str, target: str) -> Iterator[Compiled]:
    """Each launch of a training step, of scoring and of encoding."""
    kind = VERIFY_PRECISIONS[precision]
    with triton_in(kind), on_target(target, recorder := Recorder()):
        network = build(model.features, kind, parts=model.parts)
        x = torch.empty(batch, model.features[0], dtype=kind.dtype)
        training_step(network, batch)(x)
        trained = len(recorder.launches)
        score_and_encode(network, x)
    for number, launch in enumerate(recorder.launches):
        step = "train" if number < trained else "score"
        yield Compiled(launch, target, precision, model.name, [f"{model.name} x {batch} {step}"])


def problems(found: Compiled) -> Iterator[tuple[str, str]]:
    """(budget, what was found instead) of every budget that does not hold."""
    r = found.resources
    if r.spills or r.local_bytes:
        yield "spills", f"{r.spill_stores} stores and {r.spill_loads} loads, {r.local_bytes} bytes of local memory"
    most = budgets.DEVICES[found.target].block_shared_bytes
    if r.shared_bytes > most:
        yield "shared memory", f"{r.shared_bytes} bytes; a block has {most}"
    warps = resident(found)
    if warps < budgets.WARPS:
        yield "resident warps", f"{warps}; at least {budgets.WARPS}"
    moves = accesses(found.text, SOURCES)
    operands = [move for move in moves if move.operand]
    if operands and found.precision != "float32" and not r.tensor_core:
        yield "tensor cores", "none used"
    if not found.aligned:
        return  # neither copies nor stores of such rows can be wide
    yield from _operand_problems(operands, found.target)
    narrow = {move.pointer: move for move in moves if move.kind == "store" and move.width < budgets.WIDTH}
    for pointer, move in narrow.items():
        stored = found.launch.tensors.get(pointer)
        if stored is None and any(t.nbytes == move.width for t in found.launch.tensors.values()):
            continue  # to one of a tuple of tensors, of which one is a single number
        lanes = TARGETS[found.target][0].warp_size
        # A vector shorter than a warp of such stores is spread over the warp instead.
        short = stored is not None and (stored.nbytes % budgets.WIDTH or stored.nbytes < lanes * budgets.WIDTH)
        if pointer not in budgets.VECTORS and not short:
            yield "wide stores", f"{move.width} bytes at once to {pointer}, {move.where}"


def _operand_problems(operands: list[Access], target: str) -> Iterator[tuple[str, str]]:
    late = [move for move in operands if move.kind == "load" and move.looped]
    if late and target.startswith("sm_"):
        yield "asynchronous copies", f"{late[0].where} loads in the loop and waits"
    narrow = [move for move in operands if 0 < move.width < budgets.WIDTH]
    if narrow:
        yield "wide loads", f"{narrow[0].width} bytes at once, {narrow[0].where}"


def resident(found: Compiled) -> int:
    columns = re.findall(r"tcgen05\.alloc\S*\s+\[[^\]]*\],\s*(\d+)", found.text)
    r = found.resources
    shared = r.shared_bytes
    return budgets.resident_warps(
        found.target, r.registers, shared, found.launch.num_warps, sum(int(c) for c in columns)
    )


def finding(found: Compiled, used: set[budgets.Exempt]) -> Finding:
    """One row: the figures, and the budgets that do not hold."""
    r, launch = found.resources, found.launch
    broken, excused = [], []
    for budget, what in problems(found):
        exempt = budgets.exempt(budget, launch.name, found.target, found.precision, found.model)
        if exempt is None:
            broken.append(f"{budget}: {what}")
        else:
            used.add(exempt)
            excused.append(f"{budget}: {what}; not held to it: {exempt.reason}")
    copies = sorted({move.width for move in accesses(found.text, SOURCES) if move.kind == "copy"})
    figures = [
        f"{r.registers} registers",
        f"{r.spill_stores + r.spill_loads} spills",
        f"{r.shared_bytes / 1024:.0f} KiB",
        f"{resident(found)} warps",
        " ".join(f"{name} x{times}" for name, times in r.tensor_core.items()) or "no tensor cores",
        f"copies {copies} B" if copies else "no copies",
        f"loads {sorted(r.load_widths)} B, stores {sorted(r.store_widths)} B",
    ]
    shape = found.steps[0] + (f" and {len(found.steps) - 1} more" if len(found.steps) > 1 else "")
    limit = "budget, with exceptions" if excused else "budget" if found.aligned else "budget of unaligned rows"
    detail = "; ".join([*broken, *excused])
    return Finding(
        "compile", launch.name, found.precision, shape, "relu", found.target, ", ".join(figures), limit, not broken,
        detail,
    )  # fmt: skip


def run(target: str, quick: bool, only: str | None, used: set[budgets.Exempt]) -> None:
    """Emit a finding for each kernel of each step; kernels that several steps share are read once."""
    seen: dict[int, Compiled] = {}
    for precision in VERIFY_PRECISIONS:
        for model, batch in ((m, batch) for m in (*MODELS, *TRAINED) for batch in m.batches):
            if quick and (model.name, batch, precision) != QUICK:
                continue
            announce(model.name, f"compiling for {target} in {precision}, batch {batch}")
            for one in compiled(model, batch, precision, target):
                if not named(one.launch.name, only):
                    continue
                first = seen.setdefault(id(one.launch.kernel), one)
                if first is not one and one.steps[0] not in first.steps:
                    first.steps += one.steps
    if seen and target.startswith("sm_"):
        read_together([one.launch.kernel for one in seen.values()])
    for one in seen.values():
        emit(finding(one, used))


def main() -> None:
    given = options("fastae.verify.compilation", __doc__, tuple(TARGETS))
    if len(given.target) != 1:
        sys.exit(in_children("fastae.verify.compilation", given))
    torch.set_num_threads(1)
    (target,) = given.target
    used: set[budgets.Exempt] = set()
    run(target, given.quick, given.only, used)
    if not given.quick and given.only is None:
        for exempt in budgets.EXEMPT:
            if exempt.budget != "sectors" and target in exempt.targets and exempt not in used:  # those are traffic's
                what = f"nothing on {target} needs the exception from {exempt.budget!r}; remove it from budgets.py"
                emit(Finding("compile", exempt.kernel, "", "", "", target, "unused", "used", False, what))


if __name__ == "__main__":
    main()
