"""Proof without a GPU: kernels as the compiler made them, read, counted and executed on a CPU.

The command is `fastae verify`. For kernels of your own, from pytest:

    from fastae.verify import Executor, check, on_target, poisoned

    def test_row_sum():
        x = torch.randn(37, 65)
        with poisoned(complete=True), on_target("sm_90", Executor()):
            y = row_sum(x)  # an ordinary function that launches Triton kernels on its arguments
        check(y, x.sum(1), x.double().sum(1))

`on_target(name, hook)` compiles for a GPU that is not there: `Executor` runs the code on this CPU, checks accesses and,
with `count=True`, counts them; `Recorder` keeps registers, spills and instructions. `check` is the three-way rule,
`poisoned` shows what a kernel does not write and what it writes beside its outputs, `lint_kernels` reads its source.
TRITON_INTERPRET must not be set: nothing would be compiled.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastae_emulator.accuracy import Accuracy, check, check_all, compare
    from fastae_emulator.driver import TARGETS, on_target
    from fastae_emulator.launches import CompiledKernel, Executor, Launch, Recorder
    from fastae_emulator.lint import lint_kernels
    from fastae_emulator.poison import poisoned
    from fastae_emulator.ptx import Counters, PtxError
    from fastae_emulator.resources import Resources

_HOMES = {
    "accuracy": ("Accuracy", "check", "check_all", "compare"),
    "driver": ("TARGETS", "on_target"),
    "launches": ("CompiledKernel", "Executor", "Launch", "Recorder"),
    "lint": ("lint_kernels",),
    "poison": ("poisoned",),
    "ptx": ("Counters", "PtxError"),
    "resources": ("Resources",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "TARGETS", "Accuracy", "CompiledKernel", "Counters", "Executor", "Launch", "PtxError", "Recorder", "Resources",
    "check", "check_all", "compare", "lint_kernels", "on_target", "poisoned",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """On first use: the machine alone needs neither Triton nor PyTorch, the accuracy check no Triton."""
    if name not in _HOME:
        raise AttributeError(f"module 'fastae.verify' has no attribute {name!r}")
    return getattr(import_module(f"fastae_emulator.{_HOME[name]}"), name)
