"""`patch` beside other threads: what it replaces of nn.Module while it records is no other thread's business."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastae
from fastae.patching import tracing


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


def beside(work: list[Callable[[], object]], rounds: int) -> list[BaseException]:
    """Run each in a thread of its own, all at once."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(work))

    def loop(call: Callable[[], object]) -> None:
        barrier.wait(10)
        try:
            for _ in range(rounds):
                call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(call,)) for call in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_two_threads_patch_their_own_models() -> None:
    get, put, call = nn.Module.__getattribute__, nn.Module.__setattr__, nn.Module.__call__
    x = torch.randn(3, 8)
    models = [Net() for _ in range(4)]
    wanted = [m(x) for m in models]
    reports: list[int] = []

    def work(model: Net) -> Callable[[], object]:
        return lambda: (reports.append(len(fastae.patch(model).replaced)), fastae.unpatch(model))

    assert beside([work(model) for model in models], 10) == []
    assert reports == [6] * 40
    assert (nn.Module.__getattribute__, nn.Module.__setattr__, nn.Module.__call__) == (get, put, call)
    for model, y in zip(models, wanted, strict=True):
        torch.testing.assert_close(model(x), y)


def test_other_threads_make_switch_and_call_modules_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a recording, where fx and `patch` have replaced methods of every module."""
    patched, other, x = Net(), Net(), torch.randn(3, 8)
    wanted, same = other(x), patched(x)
    recording, used, call = threading.Event(), threading.Event(), tracing._Tracer.call_module

    def paused(tracer: Any, *args: Any) -> Any:
        if threading.current_thread() is thread and not recording.is_set():
            recording.set()
            assert used.wait(10)
        return call(tracer, *args)

    monkeypatch.setattr(tracing._Tracer, "call_module", paused)
    thread = threading.Thread(target=lambda: reports.append(fastae.patch(patched)))
    reports: list[fastae.PatchReport] = []
    thread.start()
    assert recording.wait(10)
    try:
        made = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        made.train().eval()
        made.extra = nn.ReLU()
        assert made(torch.ones(1, 2)).shape == (1, 2)
        torch.testing.assert_close(other(x), wanted)
        torch.testing.assert_close(patched(x), same)
    finally:
        used.set()
        thread.join()
    assert [len(report.replaced) for report in reports] == [6]
    torch.testing.assert_close(patched(x), same)
