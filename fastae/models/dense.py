"""`DenseAutoencoder`: a stack of `LinearAct` layers that narrows to a code and widens again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastae.data.arrays import in_chunks
from fastae.engine.autograd import stack_encode, stack_loss, stack_score
from fastae.engine.parameters import plan_of, weight_of, why_not_plain
from fastae.engine.schedule import Plan
from fastae.nn.arguments import autocast_dtype, kernels_take, refuse_torchscript
from fastae.nn.linear_act import LinearAct, check_activation
from fastae.nn.losses import mse_loss
from fastae.nn.tied_linear_act import TiedLinearAct

if TYPE_CHECKING:
    from fastae.data.scaling import Scaler
    from fastae.train.history import History

Rows = TypeVar("Rows", Tensor, NDArray[Any])


class DenseAutoencoder(nn.Module):
    """A dense autoencoder: `encoder` and `decoder` are `nn.Sequential`s of `LinearAct` layers.

    Args:
        features: widths from the input to the code, e.g. [784, 256, 128].
        activation: of the hidden layers; names as in `fastae.linear_act`.
        code_activation: of the layer that makes the code.
        output_activation: of the last layer.
        decoder_features: widths from the code to the output, e.g. [128, 512, 784]; the encoder's mirrored by default.
        tied: decoder layers use the encoder's weights transposed (one parameter, a gradient from both uses).
        device, dtype: of the parameters, as in `torch.nn.Linear`.

    Calls take either a tensor [..., features[0]] of the model's dtype, and are then differentiable, or a numpy array
    or memory map [rows, features[0]] of any length, which is worked through in chunks, without gradients, on the
    model's device, and answered with a float32 array (float64 for a float64 model). A tensor under `torch.no_grad()` is
    chunked too.

    `scaler` is None or the `Scaler` that the training data went through (`fastae train --scale`); it is saved with the
    model, and applied where you say so: `ae.score(ae.scaler.transform(x))`.

    Raises ValueError for widths that are not positive, fewer than two of them, widths of the decoder that do not run
    from the
    code to the input, an unknown activation, or `tied` together with `decoder_features`.
    """

    def __init__(
        self,
        features: Sequence[int],
        activation: str = "relu",
        code_activation: str = "identity",
        output_activation: str = "identity",
        decoder_features: Sequence[int] | None = None,
        tied: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = _widths(features, "features")
        self.decoder_features = self.features[::-1]
        if decoder_features is not None:
            self.decoder_features = _widths(decoder_features, "decoder_features")
            code, width = self.features[-1], self.features[0]
            if tied:
                raise ValueError("DenseAutoencoder: decoder_features must be None when tied=True; got both")
            if self.decoder_features[0] != code or self.decoder_features[-1] != width:
                raise ValueError(
                    f"DenseAutoencoder: decoder_features must run from {code} to {width}; got {self.decoder_features}"
                )
        self.activation = check_activation(activation, "DenseAutoencoder: activation")
        self.code_activation = check_activation(code_activation, "DenseAutoencoder: code_activation")
        self.output_activation = check_activation(output_activation, "DenseAutoencoder: output_activation")
        self.tied = tied
        self.scaler: Scaler | None = None

        def stack(widths: list[int], last: str) -> list[LinearAct]:
            names = [activation] * (len(widths) - 2) + [last]
            return [
                LinearAct(k, n, activation=name, device=device, dtype=dtype)
                for (k, n), name in zip(pairwise(widths), names, strict=True)
            ]

        encoder = stack(self.features, code_activation)
        decoder: list[nn.Module]
        if tied:
            names = [activation] * (len(encoder) - 1) + [output_activation]
            decoder = [TiedLinearAct(layer, name) for layer, name in zip(reversed(encoder), names, strict=True)]
        else:
            decoder = list(stack(self.decoder_features, output_activation))
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder)

    def forward(self, x: Rows) -> Rows:
        """The reconstruction of x: the same shape."""
        return self._run(lambda rows: self.decoder(self.encoder(rows)), x, self.features[0], "x")

    def encode(self, x: Rows) -> Rows:
        """The code of x: [..., features[0]] -> [..., features[-1]]."""

        def codes(rows: Tensor) -> Tensor:
            if torch.is_grad_enabled() or not self._fuses(rows, None):
                code: Tensor = self.encoder(rows)
                return code
            return stack_encode(rows, *self._stack(self.encoder, rows, loss=False))

        return self._run(codes, x, self.features[0], "x")

    def decode(self, z: Rows) -> Rows:
        """The reconstruction from a code: [..., features[-1]] -> [..., features[0]]."""
        return self._run(self.decoder, z, self.features[-1], "z")

    def loss(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """Mean squared error of the reconstruction of x against `target` (x itself by default), as a scalar.

        fp32 (fp64 for fp64). All layers and the loss are one autograd function where x is [rows, features[0]], the
        layers are as the constructor made them, without hooks, and the target needs no gradient; elsewhere, and under
        `torch.autocast`, `torch.compile` and `torch.func`, the layers are called one by one.
        """
        target = x if target is None else target
        if not self._fuses(x, target):
            return mse_loss(_wide(self(x)), _wide(target))
        return stack_loss(x, target, *self._stack([*self.encoder, *self.decoder], x))

    def _fuses(self, x: Tensor, target: Tensor | None) -> bool:
        """Whether a result can be one function of x and the parameters; what does not fit raises on the other way."""
        like = next(self.parameters())
        return (
            isinstance(x, Tensor)
            and not torch.compiler.is_compiling()  # one op for all layers would fix what depends on the number of rows
            and x.dim() == 2
            and x.shape[1] == self.features[0]
            and x.dtype == like.dtype
            and x.device == like.device
            and (target is x or target is None or _matches(target, x, self.decoder_features[-1]))
            and not (target is x and x.requires_grad)
            and autocast_dtype(x) is None
            and type(self).forward is DenseAutoencoder.forward
            and why_not_plain(self) is None
            and kernels_take("DenseAutoencoder", x, target)
        )

    def _stack(self, layers: Any, x: Tensor, loss: bool = True) -> tuple[list[Tensor], list[Tensor | None], Plan]:
        plan = plan_of(layers, x, len(x), loss)
        return [weight_of(layer) for layer in layers], [layer.bias for layer in layers], plan

    def score(self, x: Rows) -> Rows:
        """The mean squared error of each row, [rows, features[0]] -> [rows]; no gradient, bounded memory."""

        def row_errors(rows: Tensor) -> Tensor:
            if self._fuses(rows, None):
                return stack_score(rows, *self._stack([*self.encoder, *self.decoder], rows))
            return (self(rows) - _wide(rows)).square().mean(-1)

        with torch.no_grad():
            return self._run(row_errors, x, self.features[0], "x")

    def _run(self, function: Callable[[Tensor], Tensor], x: Rows, width: int, name: str) -> Rows:
        name = f"DenseAutoencoder: {name}"
        if isinstance(x, Tensor):
            if x.dim() == 0 or x.shape[-1] != width:
                raise ValueError(f"{name} must be [..., {width}]; got {list(x.shape)}")
            if torch.is_grad_enabled():
                return function(x)
        widest = max(self.features + self.decoder_features)
        return in_chunks(function, x, width, widest, next(self.parameters()), name)

    def summary(self) -> str:
        """A table of layers, shapes, parameters, FLOPs per row, and the compression ratio."""
        from fastae.models.summary import summary

        return summary(self)

    def fit(self, x: NDArray[Any] | Tensor, **options: Any) -> History:
        """Train on x [rows, features[0]] and return the `History`; see `fastae.train.fit.fit` for every option.

        epochs=100, batch_size=256, lr=1e-3, optimizer="adam", validation_split=0.1, validation_data=None, seed=0,
        precision="float32", callbacks=(), progress=True.
        """
        from fastae.train.fit import fit

        return fit(self, x, **options)

    def __prepare_scriptable__(self) -> None:
        refuse_torchscript("DenseAutoencoder")

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for `DenseAutoencoder(**config)`."""
        return {
            "features": self.features,
            "activation": self.activation,
            "code_activation": self.code_activation,
            "output_activation": self.output_activation,
            "decoder_features": None if self.decoder_features == self.features[::-1] else self.decoder_features,
            "tied": self.tied,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`: model.safetensors and config.json. See `fastae.load`."""
        from fastae.models.saving import save

        save(self, path)


def _widths(features: Sequence[int], name: str) -> list[int]:
    try:
        widths = [int(width) for width in features]
        good = len(widths) >= 2 and all(w > 0 and w == f for w, f in zip(widths, features, strict=True))
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise ValueError(
            f"DenseAutoencoder: {name} must be two or more positive whole numbers, like [784, 128]; got {features!r}"
        )
    return widths


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _matches(target: object, x: Tensor, width: int) -> bool:
    return (
        isinstance(target, Tensor)
        and target.shape == (len(x), width)
        and target.dtype == x.dtype
        and target.device == x.device
        and not target.requires_grad
    )
