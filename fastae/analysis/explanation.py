"""Result of `explain`, and its table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch

from fastae.analysis.gpus import COMPILED_US, EAGER_US, GAP_US, GPU, REPLAY_US
from fastae.text_table import lines as text_lines

SIDES = ("fastae", "eager", "compiled")


@dataclass(frozen=True)
class Row:
    """One op of the step. `us`: modelled microseconds of each side's kernels on the named GPU, or None."""

    phase: str
    layer: str
    shape: str
    op: str
    backend: str
    reason: str
    flops: int
    bytes: int
    launches: int
    us: dict[str, float] | None


@dataclass(frozen=True)
class Explanation:
    """Result of `explain`; `str()` is a table, `to_dict()` the same as plain numbers and strings."""

    network: str
    batch_size: int
    dtype: str
    device: str
    gpu: GPU | None
    rows: tuple[Row, ...]
    host_us: dict[str, float] | None  # the least that launching takes on the host
    cached: bool  # whether all that the step touches fits the GPU's last cache

    @property
    def kernels_us(self) -> dict[str, float] | None:
        """Modelled microseconds of all kernels of a step, by side."""
        if self.gpu is None:
            return None
        return {side: sum(row.us[side] for row in self.rows if row.us) for side in SIDES}

    @property
    def step_us(self) -> dict[str, float] | None:
        """The same, but at least what the host takes to launch them."""
        kernels, host = self.kernels_us, self.host_us
        return None if kernels is None or host is None else {s: max(kernels[s], host[s]) for s in SIDES}

    def to_dict(self) -> dict[str, Any]:
        times = {"kernels_us": self.kernels_us, "step_us": self.step_us}
        label = None if self.gpu is None else "a model, not measured"
        return {**asdict(self), "rows": [asdict(row) for row in self.rows], **times, "times": label}

    def __str__(self) -> str:
        return table(self)


def table(explanation: Explanation) -> str:
    from rich import box
    from rich.table import Table

    rows, gpu = explanation.rows, explanation.gpu
    made = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    kernels = explanation.kernels_us
    made.add_column("", "a step", no_wrap=True)
    made.add_column("layer", no_wrap=True)
    made.add_column("op", no_wrap=True)
    made.add_column("by", no_wrap=True)
    for name, total in (
        ("launches", str(sum(row.launches for row in rows))),
        ("FLOPs", _short(sum(row.flops for row in rows))),
        ("bytes", _short(sum(row.bytes for row in rows))),
        *((f"{side}{' us' * (side == 'fastae')}", f"{us:.1f}") for side, us in (kernels or {}).items()),
    ):
        made.add_column(name, total, justify="right", no_wrap=True)
    shown = ""
    for row in rows:
        times = [f"{us:.1f}" if us else "" for us in row.us.values()] if row.us else []
        phase = row.phase if row.phase != shown else ""
        layer, flops = f"{row.layer}  {row.shape}".strip(), _short(row.flops or None)
        made.add_row(
            phase,
            layer,
            row.op,
            row.backend,
            str(row.launches or ""),
            flops,
            _short(row.bytes) if row.bytes else "",
            *times,
        )
        shown = row.phase
    where = explanation.device if gpu is None else f"{explanation.device} ({gpu.name}): modelled, not measured"
    lines = [f"{explanation.network}, batch {explanation.batch_size}, {explanation.dtype}, on {where}"]
    lines += text_lines(made, 200)
    return "\n".join([*lines, *_why(explanation), *_model(explanation)])


def _why(explanation: Explanation) -> list[str]:
    return [f"{backend}, {', '.join(layers)}: {reason}" for backend, reason, layers in reasons(explanation)]


def _model(explanation: Explanation) -> list[str]:
    gpu, kernels, steps = explanation.gpu, explanation.kernels_us, explanation.step_us
    if gpu is None or kernels is None or steps is None:
        return []

    def beside(us: dict[str, float]) -> str:
        return f"fastae {us['fastae']:.0f} us" + "".join(
            f", {side} {us[side]:.0f} ({us[side] / us['fastae']:.2f}x)" for side in ("eager", "compiled")
        )

    rate = gpu.rate(getattr(torch, explanation.dtype)) / 1e12
    lines = [
        f"a model: a kernel takes the larger of FLOPs / {rate:,.4g} TFLOP/s and bytes / {gpu.bandwidth:,.0f} GB/s, and "
        f"{GAP_US:.0f} us",
        f"  ({gpu.source}). Products are as fast on every side: what Triton's lose to the vendor's is not in it.",
        f"  kernels alone: {beside(kernels)}",
        f"  as launched:   {beside(steps)},",
        f"    if the host takes {EAGER_US:.0f} us for a kernel of eager, {COMPILED_US:.0f} of compiled and "
        f"{REPLAY_US:.0f} to replay our graph",
    ]
    if explanation.cached:
        lines.append(f"  All of it fits the last cache ({gpu.cache} MiB): passes saved there gain less than this says.")
    return lines


def _short(count: int | None) -> str:
    if count is None:
        return ""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def reasons(explanation: Explanation) -> list[tuple[str, str, list[str]]]:
    """(implementation, reason, layers), in the order of the layers."""
    rows = {row.layer: row for row in explanation.rows if row.layer}
    found = groupby(rows.values(), key=lambda row: (row.backend, row.reason))
    return [(backend, reason, [row.layer for row in group]) for (backend, reason), group in found]
