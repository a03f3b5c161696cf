"""The interpreter for every kernel of this session, and the backends as a fixture."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported: before anything else here

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastae

FENCE = 4096  # elements


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter computes with numpy, which warns where hardware quietly gives inf or NaN. Division by zero stays
    # an error: in integers it is undefined on hardware.
    config.addinivalue_line(
        "filterwarnings", "ignore:(overflow|invalid value) encountered:RuntimeWarning:triton.runtime.interpreter"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is false"))


@pytest.fixture(params=["torch", "onednn", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastae.use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh buffers are full of NaN, with a NaN fence on both sides that must still stand at the end."""
    buffers: list[tuple[torch.Tensor, int]] = []
    new_empty = torch.Tensor.new_empty

    def fenced(like: torch.Tensor, *size: Any, dtype: torch.dtype | None = None, **others: Any) -> torch.Tensor:
        if others:  # the interpreter's own copies name a device
            return new_empty(like, *size, dtype=dtype or like.dtype, **others)
        shape = torch.Size(size[0] if isinstance(size[0], tuple | list) else size)
        buffer = new_empty(like, shape.numel() + 2 * FENCE, dtype=dtype or like.dtype).fill_(float("nan"))
        buffers.append((buffer, shape.numel()))
        return buffer[FENCE : FENCE + shape.numel()].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", fenced)
    monkeypatch.setattr(torch, "empty_like", lambda t, **others: fenced(t, t.shape, **others))
    yield
    monkeypatch.undo()
    for buffer, used in buffers:
        fences = torch.cat([buffer[:FENCE], buffer[FENCE + used :]])
        assert fences.isnan().all(), "written outside the buffer"
