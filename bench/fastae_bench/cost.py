"""FLOPs and bytes of a piece of work: a model, counted from its shapes, each tensor moved once."""

from __future__ import annotations

from typing import NamedTuple

from fastae_bench.sizes import Size

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
ADAM_PASSES = 7  # reads the parameter, its gradient and two averages, writes all but the gradient


class Cost(NamedTuple):
    """flops counts the products alone, a multiplication and an addition each. moved: bytes."""

    flops: int
    moved: int


def of_layers(layers: list[tuple[int, int]], rows: int, precision: str) -> Cost:
    """A forward pass: every layer reads x and w, writes y."""
    values = sum(rows * k + k * n + rows * n for k, n in layers)
    return Cost(2 * rows * sum(k * n for k, n in layers), values * ITEM_BYTES[precision])


def of_step(size: Size, precision: str) -> Cost:
    """Forward and backward of every layer, and Adam on fp32 parameters. No gradient of the input."""
    forward = of_layers(size.layers, size.batch, precision)
    k, n = size.layers[0]
    flops = 3 * forward.flops - 2 * size.batch * k * n
    return Cost(flops, 3 * forward.moved + ADAM_PASSES * 4 * size.parameters)


def of_op(what: str, size: Size, precision: str) -> Cost:
    """An op at the first layer's shape, the losses at the last's."""
    if what == "mse_loss":  # reads input and target, writes the gradient
        return Cost(0, 3 * size.batch * size.features[0] * ITEM_BYTES[precision])
    k, n = size.layers[-1 if what == "linear_act_mse" else 0]
    forward = of_layers([(k, n)], size.batch, precision)
    if what == "linear_act forward":
        return forward
    return Cost(3 * forward.flops, 3 * forward.moved)
