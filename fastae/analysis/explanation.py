"""`str(fastae.explain(...))`."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

import torch

from fastae.analysis.gpus import COMPILED_US, EAGER_US, GAP_US, REPLAY_US

if TYPE_CHECKING:
    from fastae.analysis.explain import Explanation


def table(explanation: Explanation) -> str:
    from rich import box
    from rich.console import Console
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
    text = StringIO()
    Console(file=text, width=200, color_system=None).print(made)
    where = explanation.device if gpu is None else f"{explanation.device} ({gpu.name}): modelled, not measured"
    lines = [f"{explanation.network}, batch {explanation.batch_size}, {explanation.dtype}, on {where}"]
    lines += [line.rstrip() for line in text.getvalue().strip("\n").splitlines()]
    return "\n".join([*lines, *_why(explanation), *_model(explanation)])


def _why(explanation: Explanation) -> list[str]:
    from fastae.analysis.explain import reasons

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
