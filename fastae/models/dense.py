"""`DenseAutoencoder`: a stack of `LinearAct` layers that narrows to a code and widens again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fastae.bottlenecks import Bottleneck, Contractive
from fastae.likelihoods import MSE, Likelihood, spelled
from fastae.models.base import Autoencoder
from fastae.models.parts import bottleneck_of, corrupt_of, spelled_parts
from fastae.nn.dropout import HiddenDropout
from fastae.nn.linear_act import LinearAct, check_activation
from fastae.nn.losses import likelihood_beside
from fastae.nn.tied_linear_act import TiedLinearAct
from fastae.noise import Noise
from fastae.parts import number


class DenseAutoencoder(Autoencoder, saved_as="fastae.DenseAutoencoder"):
    """A dense autoencoder: `encoder` and `decoder` are `nn.Sequential`s of `LinearAct` layers.

    Args:
        features: widths from the input to the code, e.g. [784, 256, 128].
        activation: of the hidden layers; names as in `fastae.linear_act`.
        code_activation: of the layer that makes the code.
        output_activation: of the last layer; "identity" beside a log-likelihood.
        decoder_features: widths from the code to the output, e.g. [128, 512, 784]; the encoder's mirrored by default.
        tied: decoder layers use the encoder's weights transposed (one parameter, a gradient from both uses).
        device, dtype: of the parameters, as in `torch.nn.Linear`.
        dropout: the share of the hidden layers' outputs, those of code and output excepted, that each step of training
            puts to 0; the others are divided by 1 - dropout (Srivastava et al. 2014).
        corrupt: noise on the rows of a training step, whose target is the clean row: a part of `fastae.noise` or its
            spelling, "mask:0.3" say.
        bottleneck: what is asked of the code: a part of `fastae.bottlenecks` or its spelling, "variational:beta=0.5".
            The weight of a variational code's layer is [2 features[-1], ...], mu first, then log sigma^2.
        likelihood: the loss of the reconstruction: a part of `fastae.likelihoods` or its name, "huber" say. Beside a
            log-likelihood ("gaussian", "bernoulli", "poisson", "nb") the model's output is the mean of the data. What
            "nb" and "gaussian:scale=learned" have to be trained is in `likelihood_parameters`.

    Calls take either a tensor [..., features[0]] of the model's dtype, and are then differentiable, or a numpy array
    or memory map [rows, features[0]] of any length, which is worked through in chunks, without gradients, on the
    model's device, and answered with a float32 array (float64 for a float64 model). A tensor under `torch.no_grad()` is
    chunked too.

    `scaler` is None or the `Scaler` that the training data went through (`fastae train --scale`); it is saved with the
    model, and applied where you say so: `ae.score(ae.scaler.transform(x))`.

    Raises ValueError for widths that are not positive, fewer than two of them, widths of the decoder that do not run
    from the code to the input, an unknown activation, likelihood, noise or bottleneck, a dropout outside of [0, 1), or
    parts that exclude each other: `tied` and `decoder_features`; a variational code and `tied`, a `code_activation`, or
    mse, mae or huber, whose mean over values is no log-likelihood ("gaussian" is).
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
        *,
        likelihood: str | Likelihood = "mse",
        dropout: float = 0.0,
        corrupt: str | Noise | None = None,
        bottleneck: str | Bottleneck | None = None,
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
        self.likelihood = likelihood_beside(likelihood, output_activation, "DenseAutoencoder")

        self.dropout = number("DenseAutoencoder", "dropout", dropout, 0, 1, below=True)
        self.corrupt = corrupt_of(corrupt, self.features[0], "DenseAutoencoder: corrupt")
        self.bottleneck = bottleneck_of(bottleneck, self.likelihood, tied, code_activation, "DenseAutoencoder")
        if isinstance(self.bottleneck, Contractive) and self.dropout:
            raise ValueError(f"DenseAutoencoder: dropout must be 0 beside a contractive code; got {dropout!r}")

        def stack(widths: list[int], last: str) -> list[LinearAct]:
            names = [activation] * (len(widths) - 2) + [last]
            return [
                LinearAct(k, n, activation=name, device=device, dtype=dtype)
                for (k, n), name in zip(pairwise(widths), names, strict=True)
            ]

        code = self.features[-1] * (1 if self.variational is None else 2)
        encoder = stack([*self.features[:-1], code], code_activation)
        decoder: list[nn.Module]
        if tied:
            names = [activation] * (len(encoder) - 1) + [output_activation]
            decoder = [TiedLinearAct(layer, name) for layer, name in zip(reversed(encoder), names, strict=True)]
        else:
            decoder = list(stack(self.decoder_features, output_activation))
        self.encoder = _sequential(encoder, self.dropout)
        self.decoder = _sequential(decoder, self.dropout)
        self.make_likelihood_parameters(device, dtype)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for `DenseAutoencoder(**config)`; keyword-only ones where not the default."""
        mirrored = self.decoder_features == self.features[::-1]
        made: dict[str, Any] = {
            "features": list(self.features),
            "activation": self.activation,
            "code_activation": self.code_activation,
            "output_activation": self.output_activation,
            "decoder_features": None if mirrored else list(self.decoder_features),
            "tied": self.tied,
        }
        if self.likelihood != MSE():
            made["likelihood"] = spelled(self.likelihood)
        if self.dropout:
            made["dropout"] = self.dropout
        return made | spelled_parts(self)


def _sequential(layers: Sequence[nn.Module], dropout: float) -> nn.Sequential:
    """The layers "0", "1", ..., each but the last followed by its dropout if there is one."""
    named = dict[str, nn.Module]()
    for i, layer in enumerate(layers):
        named[str(i)] = layer
        if dropout and i < len(layers) - 1:
            named[f"{i}_dropout"] = HiddenDropout(dropout)
    return nn.Sequential(OrderedDict(named))


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
