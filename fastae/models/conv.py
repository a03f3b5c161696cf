"""`ConvAutoencoder`: convolutions and pooling to a small map or a code, transposed convolutions back to the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastae.bottlenecks import Bottleneck, Contractive, KLSparse
from fastae.likelihoods import Bernoulli, Likelihood, spelled
from fastae.models.base import Autoencoder, Rows
from fastae.models.parts import bottleneck_of, corrupt_of, spelled_parts
from fastae.nn.activation_modules import activation_module, check_activation_module
from fastae.nn.linear_act import LinearAct, check_activation
from fastae.nn.losses import likelihood_beside
from fastae.nn.thin_conv import ThinConv2d
from fastae.noise import Noise

Size = tuple[int, int]


class ConvAutoencoder(Autoencoder, saved_as="fastae.ConvAutoencoder"):
    """A convolutional autoencoder of images [n, channels, height, width].

    `encoder`, for each of `channels`: `Conv2d` 3x3, activation, `MaxPool2d` 2, which rounds odd sizes up. `decoder`,
    for each of them reversed: `ConvTranspose2d` 3x3 with stride 2 to the size before that pooling, activation; at the
    end a `Conv2d` 3x3 to the image's channels. Both begin and end in flat rows. The modules are PyTorch's, their
    weights in `channels_last`; the layers of the code are `LinearAct`s.

    Args:
        image: (channels, height, width) of an image, e.g. (1, 28, 28).
        channels: of the maps; one pooling for each, at most as many as make one pixel of the image.
        code: the width of a dense code; None for the last map, flattened.
        activation: of all hidden layers; names as in `fastae.linear_act`, but for logit.
        code_activation: of the layer that makes the code.
        likelihood: the loss of the reconstruction, a part of `fastae.likelihoods` or its name; "bernoulli", for images
            in [0, 1], gives pixels that are sigmoids.
        output_activation: of the last convolution; "identity" beside a log-likelihood.
        corrupt, bottleneck: noise and what is asked of the code, as in `DenseAutoencoder`; a variational code needs a
            `code`.
        device, dtype: of the parameters, as in `torch.nn.Conv2d`.

    Calls take images [n, channels, height, width], also [n, height, width] if there is one channel, or their flat rows
    [n, channels * height * width], as tensors of the model's dtype or floating-point numpy arrays. `forward` answers in
    the shape it was given, `decode` gives images, `encode` [n, code], `score` [n]. `encoder` and `decoder` themselves
    take flat rows and codes. The rest is as in `DenseAutoencoder`.

    Raises ValueError for numbers that are not positive, too many poolings, an unknown activation, likelihood or part,
    or parts that exclude each other.
    """

    def __init__(
        self,
        image: Sequence[int],
        channels: Sequence[int] = (32, 32),
        code: int | None = None,
        *,
        activation: str = "relu",
        code_activation: str = "identity",
        likelihood: str | Likelihood = "bernoulli",
        output_activation: str = "identity",
        corrupt: str | Noise | None = None,
        bottleneck: str | Bottleneck | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        wanted = "image must be three positive whole numbers, like (1, 28, 28)"
        self.image: tuple[int, ...] = _numbers(image, wanted, 3)
        self.channels = _numbers(channels, "channels must be one or more positive whole numbers, like [32, 32]")
        wanted = "code must be None or a positive whole number"
        self.code = None if code is None else _numbers((code,), wanted, 1, code)[0]
        self.activation = check_activation_module(activation, "ConvAutoencoder: activation")
        self.code_activation = check_activation(code_activation, "ConvAutoencoder: code_activation")
        self.output_activation = check_activation_module(output_activation, "ConvAutoencoder: output_activation")
        self.likelihood = likelihood_beside(likelihood, output_activation, "ConvAutoencoder")
        self.corrupt = corrupt_of(corrupt, math.prod(self.image), "ConvAutoencoder: corrupt")
        self.bottleneck = bottleneck_of(bottleneck, self.likelihood, False, code_activation, "ConvAutoencoder")
        if self.variational is not None and self.code is None:
            raise ValueError("ConvAutoencoder: code must be a width beside a variational code; got None")
        if isinstance(self.bottleneck, Contractive):
            raise ValueError("ConvAutoencoder: bottleneck must not be contractive: the encoder is not of dense layers")
        if isinstance(self.bottleneck, KLSparse) and self.code is None:
            raise ValueError(
                "ConvAutoencoder: code must be a width beside kl_sparse, whose units lie in (0, 1); got None"
            )
        sizes = self._sizes()
        maps = [n * h * w for n, (h, w) in zip(self.channels, sizes[1:], strict=True)]
        self.features = [math.prod(self.image), *maps, *([] if self.code is None else [self.code])]
        self.decoder_features = self.features[::-1]
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.encoder = nn.Sequential(*self._encoder(maps[-1], made))
        self.decoder = nn.Sequential(*self._decoder(maps[-1], sizes, made))
        self.make_likelihood_parameters(device, dtype)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _sizes(self) -> list[Size]:
        """Height and width of the image and of the maps after each pooling."""
        height, width = self.image[1:]
        most = max(1, (max(height, width) - 1).bit_length())
        if len(self.channels) > most:
            raise ValueError(
                f"ConvAutoencoder: channels must be at most {most} for an image of {height} x {width}, of which {most} "
                f"poolings make one pixel; got {len(self.channels)}"
            )
        return [(-(-height >> i), -(-width >> i)) for i in range(len(self.channels) + 1)]

    def _encoder(self, flat: int, made: dict[str, Any]) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Unflatten(1, self.image)]
        for before, after in zip([self.image[0], *self.channels], self.channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1, **made), activation_module(self.activation)]
            layers += [nn.MaxPool2d(2, ceil_mode=True)]
        layers.append(nn.Flatten())
        if self.code is not None:
            width = self.code if self.variational is None else 2 * self.code
            layers.append(LinearAct(flat, width, activation=self.code_activation, **made))
        return layers

    def _decoder(self, flat: int, sizes: list[Size], made: dict[str, Any]) -> list[nn.Module]:
        layers: list[nn.Module] = []
        if self.code is not None:
            layers.append(LinearAct(self.code, flat, activation=self.activation, **made))
        layers.append(nn.Unflatten(1, (self.channels[-1], *sizes[-1])))
        mirrored = self.channels[::-1]
        for before, after, (height, width) in zip([mirrored[0], *mirrored], mirrored, sizes[-2::-1], strict=False):
            more = (1 - height % 2, 1 - width % 2)  # 2 n - 1 of n pixels, where that was an odd size, or 2 n
            layers.append(nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=more, **made))
            layers.append(activation_module(self.activation))
        layers.append(ThinConv2d(mirrored[-1], self.image[0], **made))
        if self.output_activation != "identity":
            layers.append(activation_module(self.output_activation))
        return [*layers, nn.Flatten()]

    @property
    def widest(self) -> int:
        """The values of the widest map, those before a pooling among them."""
        maps = [n * h * w for n, (h, w) in zip(self.channels, self._sizes(), strict=False)]
        return max(*maps, *self.features)

    def to_rows(self, x: Rows, name: str) -> Rows:
        """Make flat rows of images. Raises ValueError for another shape, TypeError for what is not floating point."""
        if not isinstance(x, (np.ndarray, Tensor)) or (isinstance(x, Tensor) and x.layout is not torch.strided):
            return x  # whose error `check_rows` has
        given: tuple[int, ...] = tuple(x.shape)
        width, (c, h, w) = self.in_features, self.image
        if given[1:] not in ((width,), self.image) and not (c == 1 and given[1:] == (h, w)):
            also = f"[n, {h}, {w}] " if c == 1 else ""
            raise ValueError(f"{name} must be images [n, {c}, {h}, {w}] {also}or rows [n, {width}]; got {list(given)}")
        if "uint8" in str(x.dtype):
            convert = ".float()" if isinstance(x, Tensor) else ".astype('float32')"
            short = name.rsplit(" ", 1)[-1]
            raise TypeError(f"{name} must be floating point; got uint8, convert it: {short}{convert} / 255")
        return x if len(given) == 2 else x.reshape(given[0], width)

    def from_rows(self, rows: Rows, like: Rows | None = None) -> Rows:
        """Make images of reconstructions, or the shape of `like`."""
        return rows.reshape((len(rows), *self.image) if like is None else tuple(like.shape))

    def decode(self, z: Rows) -> Rows:
        """The images from codes: [n, features[-1]] -> [n, channels, height, width]."""
        if isinstance(z, Tensor) and (z.dim() != 2 or z.shape[1] != self.features[-1]):
            raise ValueError(f"ConvAutoencoder: z must be [n, {self.features[-1]}]; got {list(z.shape)}")
        return super().decode(z)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for `ConvAutoencoder(**config)`; keyword-only ones where not the default."""
        made: dict[str, Any] = {"image": list(self.image), "channels": list(self.channels), "code": self.code}
        names = {"activation": "relu", "code_activation": "identity", "output_activation": "identity"}
        made |= {name: getattr(self, name) for name, default in names.items() if getattr(self, name) != default}
        if self.likelihood != Bernoulli():
            made["likelihood"] = spelled(self.likelihood)
        return made | spelled_parts(self)


def _numbers(given: Sequence[int], wanted: str, count: int | None = None, shown: object = None) -> tuple[int, ...]:
    try:
        numbers = tuple(int(number) for number in given)
        good = all(n > 0 and n == g for n, g in zip(numbers, given, strict=True))
    except (TypeError, ValueError, OverflowError):
        good, numbers = False, ()
    if not good or not numbers or len(numbers) != (count or len(numbers)):
        raise ValueError(f"ConvAutoencoder: {wanted}; got {given if shown is None else shown!r}")
    return numbers
