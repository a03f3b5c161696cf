"""The interpreter for every kernel of this session, and the backends as a fixture."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported: before anything else here

from collections.abc import Iterator

import pytest
import torch
from fastae_emulator.poison import poisoned

import fastae


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


@pytest.fixture(name="poisoned")
def poisoned_buffers() -> Iterator[None]:
    """Fresh buffers are full of NaN, with a NaN fence on both sides that must still stand at the end."""
    with poisoned():
        yield


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For many small calls on a machine that others use: a second thread would mostly be waited for."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of child processes
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
