"""A training step of the tutorial's convolutional autoencoder, in the ways of `training_variants`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastae.models.conv import ConvAutoencoder
from fastae_bench.sizes import Size
from fastae_bench.training_variants import TrainingProblem
from fastae_bench.variants import FASTAE

CPU_VARIANTS = (FASTAE, "idiom", "tuned", "compiled")
CUDA_VARIANTS = (*CPU_VARIANTS, "reduce-overhead", "max-autotune", "graphed")
IMAGE, CHANNELS = (1, 28, 28), (32, 32)
SIZE = Size("images", (784, 6272, 1568), 128)  # values of the image and after each pooling


class ConvProblem(TrainingProblem):
    """MNIST's images, 32 and 32 channels, binary cross-entropy."""

    def model_of(self, size: Size) -> ConvAutoencoder:
        return ConvAutoencoder(IMAGE, CHANNELS, device=self.device)

    def plain(self, tuned: bool) -> nn.Module:
        """As tutorials have it; tuned: in channels_last, the activations in place."""

        def relu() -> nn.Module:
            return nn.ReLU(inplace=tuned)

        def up(before: int, after: int) -> nn.Module:
            return nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1)

        c, (a, b) = IMAGE[0], CHANNELS
        model = nn.Sequential(
            nn.Unflatten(1, IMAGE),
            nn.Conv2d(c, a, 3, padding=1), relu(), nn.MaxPool2d(2),
            nn.Conv2d(a, b, 3, padding=1), relu(), nn.MaxPool2d(2),
            up(b, b), relu(),
            up(b, a), relu(),
            nn.Conv2d(a, c, 3, padding=1), nn.Flatten(),
        ).to(self.device)  # fmt: skip
        with torch.no_grad():
            for p, q in zip(model.parameters(), self.model.parameters(), strict=True):
                p.copy_(q)
        return model.to(memory_format=torch.channels_last) if tuned else model  # type: ignore[call-overload]

    def loss(self, y: Tensor, batch: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(y, batch, reduction="sum") / len(batch)
