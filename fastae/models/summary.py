"""The table that `DenseAutoencoder.summary()` returns."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastae.models.dense import DenseAutoencoder


def summary(model: DenseAutoencoder) -> str:
    """Layer, shapes, parameters and FLOPs per row; the totals and the compression ratio below."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    layers = [(f"{part}.{i}", layer) for part in ("encoder", "decoder") for i, layer in enumerate(getattr(model, part))]
    flops = [2 * layer.in_features * layer.out_features for _, layer in layers]
    counts = [sum(p.numel() for p in layer.parameters()) for _, layer in layers]
    total = sum(p.numel() for p in model.parameters())
    table.add_column("layer", "total")
    table.add_column("shape", no_wrap=True)
    table.add_column("activation")
    table.add_column("parameters", f"{total:,}", justify="right")
    table.add_column("FLOPs per row", f"{sum(flops):,}", justify="right")
    for (name, layer), count, flop in zip(layers, counts, flops, strict=True):
        note = " (tied)" if model.tied and name.startswith("decoder") else ""
        shape = f"{layer.in_features} -> {layer.out_features}{note}"
        table.add_row(name, shape, layer.activation, f"{count:,}", f"{flop:,}")
    text = StringIO()
    Console(file=text, width=100, color_system=None).print(table)
    width, code = model.features[0], model.features[-1]
    lines = [line.rstrip() for line in text.getvalue().strip("\n").splitlines()]
    lines.append(f" {width} values become {code}: compression ratio {width / code:.3g} to 1")
    if model.scaler is not None and model.scaler.kind != "none":
        lines.append(f" trained on data scaled to {model.scaler.kind!r}: pass model.scaler.transform(x)")
    return "\n".join(lines)
