"""The traffic of `fastae verify`: what each launch of a training step moves, counted as its compiled PTX is executed.

`python -m fastae.verify.traffic` writes its findings to standard output. Of a large grid a sample of blocks is
executed; a tensor that they read or write then counts whole, since each of these launches covers its tensors (the sums
are executed whole, since each of their blocks has another one). Sectors, conflicts and instructions are the sample's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fastae_emulator.driver import on_target
from fastae_emulator.launches import Executor, Launch
from fastae_emulator.ptx import Counters
from torch import Tensor

from fastae.analysis.cost import OpCounter, distinct_bytes
from fastae.engine.train_step import TrainStep
from fastae.nn.dropout import HiddenDropout
from fastae.verify import budgets
from fastae.verify.eager import eager_step, fewest_bytes
from fastae.verify.findings import Finding, announce, emit, named
from fastae.verify.models import MODELS, VERIFY_PRECISIONS, Model, build, training_step, triton_in
from fastae.verify.workers import in_children, one_of, options

TARGETS = ("sm_80", "sm_90", "sm_100")
BLOCKS = 3  # executed of each launch: the first, which may have more to do than others, one in the middle, the last
SUMS = "_sum_partials_kernel"
LEDGER = ("mnist", 8192, "bfloat16")  # the step that is held to a share of eager's bytes


@dataclass(frozen=True)
class Moved:
    """Of one launch."""

    launch: Launch
    counters: Counters
    read: int  # distinct bytes of all blocks
    written: int

    @property
    def sampled(self) -> bool:
        return self.counters.blocks < self.counters.blocks_in_grid


def sample(launch: Launch) -> Sequence[int]:
    blocks = launch.blocks
    if launch.name == SUMS:
        return range(blocks)
    return sorted({0, blocks // 2, blocks - 1}) if blocks > BLOCKS else range(blocks)


def moved(launch: Launch, counters: Counters) -> Moved:
    """Distinct bytes of the whole grid: of a sample's tensors, all."""
    sizes: dict[str, int] = {}
    for argument in launch.arguments:
        if argument.tensor is not None:
            sizes[f"{argument.name} (argument {argument.index})"] = distinct_bytes(argument.tensor)
    read = written = 0
    for name, traffic in counters.tensors.items():
        # Arguments that share memory are one allocation, "a (argument 1) and b (argument 2)".
        size = max((n for one, n in sizes.items() if one in name.split(" and ")), default=0)
        whole = counters.blocks < counters.blocks_in_grid
        read += size if whole and traffic.bytes_read else traffic.bytes_read
        written += size if whole and traffic.bytes_written else traffic.bytes_written
    return Moved(launch, counters, read, written)


def training_traffic(
    model: Model, batch: int, precision: str, target: str
) -> tuple[list[Moved], OpCounter, Tensor, TrainStep]:
    """The launches of a step, the optimizer's ops, and what it ran on."""
    kind = VERIFY_PRECISIONS[precision]
    torch.manual_seed(0)
    network = build(model.features, kind, parts=model.parts)
    x = torch.randn(batch, model.features[0]).to(kind.dtype)
    executor = Executor(count=True, sample=sample)
    with triton_in(kind), on_target(target, executor):
        step = training_step(network, batch)
        loss = step(x)
    with OpCounter() as optimizer:
        step.apply(loss, batch)  # not the first, which makes the optimizer's state
    launches = [moved(launch, counters) for launch, counters in zip(executor.launches, executor.counters, strict=True)]
    return launches, optimizer, x, step


def run(target: str, quick: bool, only: str | None) -> None:
    """Emit a finding for each launch of each step, and the ledger of each step."""
    for model, batch, precision in _steps(quick):
        announce(model.name, f"traffic on {target} in {precision}, batch {batch}")
        launches, optimizer, x, step = training_traffic(model, batch, precision, target)
        where = f"{model.name} x {batch}"
        for found in launches:
            if named(found.launch.name, only):
                emit(_launch_finding(found, where, precision, target))
        if only is None:
            for finding in _ledger(launches, optimizer, x, step, (model.name, batch, precision), target):
                emit(finding)


def _steps(quick: bool) -> list[tuple[Model, int, str]]:
    if quick:
        return [(MODELS[0], 8192, "bfloat16")]
    chosen = [(model, batch, "bfloat16") for model in MODELS for batch in model.batches]
    return [*chosen, (MODELS[0], 8192, "tf32"), (MODELS[0], 256, "float32")]


def _launch_finding(found: Moved, where: str, precision: str, target: str) -> Finding:
    c = found.counters
    sectors = (c.sectors_read + c.sectors_written) / max(c.requests, 1)
    tensor_core = sum(c.tensor_core_ops.values())
    figures = [
        f"reads {_mb(found.read)}, writes {_mb(found.written)}",
        f"{sectors:.1f} sectors a request, {c.sector_use:.0%} of them used",
        f"{c.bank_conflicts} bank conflicts in {c.shared_requests} requests",
        f"{tensor_core} tensor-core ops, {c.instructions} instructions",
        f"{c.blocks} of {c.blocks_in_grid} blocks executed" if found.sampled else f"all {c.blocks} blocks",
    ]
    low = c.sector_use < budgets.SECTOR_USE
    exempt = budgets.exempt("sectors", found.launch.name, target, precision, where.split()[0])
    detail = f"sectors: {c.sector_use:.0%} of their bytes used" if low else ""
    if low and exempt:
        detail += f"; not held to it: {exempt.reason}"
    return Finding(
        "traffic", found.launch.name, precision, where, "relu", target, ", ".join(figures),
        f"{budgets.SECTOR_USE:.0%} of sectors", not low or exempt is not None, detail,
    )  # fmt: skip


def _ledger(
    launches: list[Moved], optimizer: OpCounter, x: Tensor, step: TrainStep, key: tuple[str, int, str], target: str
) -> list[Finding]:
    """Launches and bytes of a step beside eager PyTorch's, and beside the fewest possible."""
    name, batch, precision = key
    network = step.model
    network = step.model
    ran = eager_step(network, x)
    layers = sum(not isinstance(m, HiddenDropout) for m in (*network.encoder, *network.decoder))
    decoder = any(found.launch.name == "_decoder_loss_kernel" for found in launches)
    padded = step.static.parameters.padded
    noise = network.corrupt is not None  # the gather is a kernel then
    most, own = 3 * layers - decoder + padded + noise, len(launches)
    updates = len(optimizer.kernels)
    total, eager = sum(found.read + found.written for found in launches), sum(kernel.bytes for kernel in ran.kernels)
    share = total / max(eager, 1)
    held = key == LEDGER

    def row(what: str, figure: str, limit: str, ok: bool, detail: str = "") -> Finding:
        return Finding("traffic", what, precision, f"{name} x {batch}", "relu", target, figure, limit, ok, detail)

    sampled = ", from a sample of blocks" if any(found.sampled for found in launches) else ""
    return [
        row(
            "launches of a step", f"{own}; eager {len(ran.kernels)}",
            f"{most}", own <= most, "one of them fills the weights up to rows of 32 bytes" if padded else "",
        ),
        row(
            "launches of the optimizer", f"{updates}", f"{budgets.OPTIMIZER_LAUNCHES}",
            updates <= budgets.OPTIMIZER_LAUNCHES, "counted as the ops of a fused Adam on a CPU",
        ),
        row(
            "bytes of a step",
            f"{_mb(total)}, {share:.2f} of eager's {_mb(eager)}; fewest {_mb(fewest_bytes(network, x))}",
            f"{budgets.SHARE_OF_EAGER} of eager's" if held else "", not held or share <= budgets.SHARE_OF_EAGER,
            f"distinct bytes of each launch{sampled}",
        ),
    ]  # fmt: skip


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def main() -> None:
    given = options("fastae.verify.traffic", __doc__, TARGETS)
    given.target = one_of(given.target) if given.quick else given.target
    if len(given.target) != 1:
        sys.exit(in_children("fastae.verify.traffic", given))
    torch.set_num_threads(1)
    run(given.target[0], given.quick, given.only)


if __name__ == "__main__":
    main()
