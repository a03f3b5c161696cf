"""`HiddenDropout`: the module by which an autoencoder's hidden layers forget some of their outputs in training."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

_thread = threading.local()  # .quiet: whether this thread is in `no_dropout`


class HiddenDropout(nn.Dropout):
    """`nn.Dropout` of its own type: a training step makes its mask in the layer's kernel, from the step's key.

    Called as a module it is `nn.Dropout`, with PyTorch's random numbers, but for calls inside `no_dropout`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return input if getattr(_thread, "quiet", False) else super().forward(input)


@contextmanager
def no_dropout() -> Iterator[None]:
    """Within it, and in this thread, every `HiddenDropout` gives what it is given, in training mode too."""
    before, _thread.quiet = getattr(_thread, "quiet", False), True
    try:
        yield
    finally:
        _thread.quiet = before
