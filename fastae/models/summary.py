"""The table that `DenseAutoencoder.summary()` returns."""

from __future__ import annotations

from typing import Any

from fastae.likelihoods import spelled
from fastae.nn.dropout import HiddenDropout
from fastae.parts import spelled as part_spelled
from fastae.text_table import lines as text_lines


def summary(model: Any) -> str:
    """Layer, shapes, parameters and FLOPs per row; the totals and the compression ratio below."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    layers = [(name, layer) for name, layer in model.named_layers() if not isinstance(layer, HiddenDropout)]
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
    width, code = model.features[0], model.features[-1]
    lines = text_lines(table, 100)
    lines.append(f" {width} values become {code}: compression ratio {width / code:.3g} to 1")
    if model.likelihood.name != "mse":
        lines.append(f" likelihood {spelled(model.likelihood)}")
    parts = [f"{name} {part_spelled(part)}" for name in ("corrupt", "bottleneck") if (part := getattr(model, name))]
    parts += [f"dropout {model.dropout:g}"] if model.dropout else []
    lines += [f" {', '.join(parts)}"] if parts else []
    if model.scaler is not None and model.scaler.kind != "none":
        lines.append(f" trained on data scaled to {model.scaler.kind!r}: pass model.scaler.transform(x)")
    return "\n".join([*lines, *trained_lines(model.trained)])


def trained_lines(trained: dict[str, Any] | None) -> list[str]:
    """How `fit` trained the model: rows, epochs, the best of them, options and versions."""
    if not trained:
        return []
    stopped = f" ({trained['stopped']})" if trained["stopped"] else ""
    rows = f"{trained['training_rows']:,} rows"
    if trained["validation_rows"]:
        rows += f", {trained['validation_rows']:,} for validation"
    lines = [f" trained on {rows}; {trained['epochs']} epochs{stopped}"]
    if trained["best_epoch"] is not None:
        name = "val_loss" if trained["validation_rows"] else "loss"
        lines[0] += f", best epoch {trained['best_epoch']}: {name} {trained['best_loss']:.6g}"
    options = ", ".join(f"{name} {trained[name]}" for name in ("optimizer", "lr", "batch_size", "precision", "seed"))
    return [*lines, f"   {options}; " + ", ".join(f"{k} {v}" for k, v in trained["versions"].items())]
