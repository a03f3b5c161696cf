"""The table that `summary()` of an autoencoder returns."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastae.likelihoods import spelled
from fastae.nn.activation_modules import name_of
from fastae.nn.dropout import HiddenDropout
from fastae.nn.linear_act import LinearAct
from fastae.nn.tied_linear_act import TiedLinearAct
from fastae.parts import spelled as part_spelled
from fastae.text_table import lines as text_lines


class Line(NamedTuple):
    """A layer of the table."""

    name: str
    shape: str
    activation: str
    parameters: int
    flops: int  # of a row


def summary(model: Any) -> str:
    """Layer, shapes, parameters and FLOPs per row; the totals and the compression ratio below."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    layers = described(model)
    total = sum(p.numel() for p in model.parameters())
    table.add_column("layer", "total")
    table.add_column("shape", no_wrap=True)
    table.add_column("activation")
    table.add_column("parameters", f"{total:,}", justify="right")
    table.add_column("FLOPs per row", f"{sum(layer.flops for layer in layers):,}", justify="right")
    for name, shape, activation, count, flops in layers:
        table.add_row(name, shape, activation, f"{count:,}", f"{flops:,}")
    width, code = model.features[0], model.features[-1]
    lines = text_lines(table, 100)
    lines.append(f" {width} values become {code}: compression ratio {width / code:.3g} to 1")
    if model.likelihood.name != "mse":
        lines.append(f" likelihood {spelled(model.likelihood)}")
    parts = [f"{name} {part_spelled(part)}" for name in ("corrupt", "bottleneck") if (part := getattr(model, name))]
    dropout = getattr(model, "dropout", 0.0)
    parts += [f"dropout {dropout:g}"] if dropout else []
    lines += [f" {', '.join(parts)}"] if parts else []
    if model.scaler is not None and model.scaler.kind != "none":
        lines.append(f" trained on data scaled to {model.scaler.kind!r}: pass model.scaler.transform(x)")
    return "\n".join([*lines, *trained_lines(model.trained)])


def described(model: Any) -> list[Line]:
    """Each layer, first to last; an activation that is a module stands beside the layer below it."""
    found, shape = list[Line](), torch.empty(1, model.in_features, device="meta")
    for name, layer in model.named_layers():
        before, shape = shape, _after(layer, shape)
        if isinstance(layer, (LinearAct, TiedLinearAct)):
            note = " (tied)" if isinstance(layer, TiedLinearAct) else ""
            sizes, flops = f"{layer.in_features} -> {layer.out_features}{note}", layer.in_features * layer.out_features
            activation = layer.activation
        elif (of_module := name_of(layer)) is not None and found:
            found[-1] = found[-1]._replace(activation=of_module)
            continue
        elif isinstance(layer, (nn.Flatten, nn.Unflatten, HiddenDropout)):
            continue
        else:
            sizes = f"{_sizes(before)} -> {_sizes(shape)} {type(layer).__name__}"
            flops, activation = _multiplied(layer, before, shape), ""
        found.append(Line(name, sizes, activation, sum(p.numel() for p in layer.parameters()), 2 * flops))
    return found


def _after(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer makes of one row, without numbers; nothing where it cannot say."""
    try:
        with torch.no_grad():
            made = copy.deepcopy(layer).to("meta").eval()(x)
    except Exception:  # a module of anybody's, which may do anything
        return x.new_empty(0)
    return made if isinstance(made, Tensor) else x.new_empty(0)


def _sizes(x: Tensor) -> str:
    return "x".join(map(str, x.shape[1:])) or "?"


def _multiplied(layer: nn.Module, before: Tensor, after: Tensor) -> int:
    """Multiply-adds of a row; those of other modules than products and convolutions are not counted."""
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    if isinstance(layer, nn.modules.conv._ConvNd) and before.numel() and after.numel():
        return layer.weight.numel() * math.prod((before if layer.transposed else after).shape[2:])
    return 0


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
