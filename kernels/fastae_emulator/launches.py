"""Launches of compiled kernels: recorded, or executed on this CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastae_emulator.ptx import Code, Counters, GlobalMemory, assemble, launch
from fastae_emulator.resources import Resources, of_cubins, parse_amdgcn


class CompiledKernel:
    """Output of the compiler for one specialisation of a kernel."""

    def __init__(self, name: str, target: str, binary: bytes, shared_bytes: int, files: dict[str, str]) -> None:
        self.name, self.target, self.binary, self.shared_bytes = name, target, binary, shared_bytes
        self._files = {Path(file).suffix[1:]: Path(path) for file, path in files.items()}

    def text(self, stage: str) -> str:
        """Text of a stage of the compilation: ttir, ttgir, llir, ptx or amdgcn."""
        return self._files[stage].read_text()

    @cached_property
    def code(self) -> Code:
        """PTX decoded for the machine."""
        if "ptx" not in self._files:
            raise ValueError(f"{self.name}: {self.target} has no PTX; only kernels for NVIDIA GPUs can be executed")
        return assemble(self.text("ptx"))

    @cached_property
    def resources(self) -> Resources:
        """Registers, spills and instructions of the machine code; read on first use."""
        if "ptx" in self._files:
            return of_cubins(self.target, [(self.binary, self.shared_bytes)])[0]
        return parse_amdgcn(self.text("amdgcn"), self.shared_bytes)


def read_together(kernels: Sequence[CompiledKernel]) -> None:
    """Read the resources of kernels for one of NVIDIA's GPUs at once: a disassembler started for each takes longer."""
    found = of_cubins(kernels[0].target, [(kernel.binary, kernel.shared_bytes) for kernel in kernels])
    for kernel, resources in zip(kernels, found, strict=True):
        kernel.resources = resources


@dataclass(frozen=True)
class Argument:
    """Argument of a launch. `kind` is Triton's type: "*bf16" for a tensor, "i32", "fp32", or "constexpr"."""

    name: str
    index: int
    kind: str
    value: Any

    @property
    def tensor(self) -> Tensor | None:
        return self.value if self.kind.startswith("*") and isinstance(self.value, Tensor) else None


@dataclass(frozen=True)
class Launch:
    """Launch of a kernel that would have reached a GPU."""

    kernel: CompiledKernel
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]
    num_warps: int
    shared_bytes: int
    scratch_bytes: int = 0  # of global memory, for each block

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def constants(self) -> dict[str, Any]:
        return {argument.name: argument.value for argument in self.arguments if argument.kind == "constexpr"}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {argument.name: argument.tensor for argument in self.arguments if argument.tensor is not None}


Hook = Callable[[Launch], None]


class Recorder:
    """Keeps launches without executing them: outputs stay unwritten."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, launch: Launch) -> None:
        self.launches.append(launch)


@dataclass
class Executor:
    """Executes each launch on its tensors: all blocks, or those that `sample` names. `count` counts accesses."""

    count: bool = False
    sample: Callable[[Launch], Sequence[int] | None] | None = None
    launches: list[Launch] = field(default_factory=list)
    counters: list[Counters] = field(default_factory=list)  # one for each launch

    def __call__(self, launch: Launch) -> None:
        self.counters.append(execute(launch, None if self.sample is None else self.sample(launch), self.count))
        self.launches.append(launch)


def execute(to_run: Launch, blocks: Sequence[int] | None = None, count: bool = False) -> Counters:
    """Run a launch on the CPU, in place on its tensors; `blocks` are linear block numbers, None being all."""
    memory = GlobalMemory()
    places = _place_tensors(to_run, memory)
    values: list[int | float] = []
    for argument in to_run.arguments:
        if argument.kind == "constexpr":
            continue
        if argument.kind.startswith("*"):
            values.append(places[argument.index])
        elif argument.kind.startswith(("i", "u", "fp", "bf")):
            values.append(argument.value)
        else:
            raise NotImplementedError(f"{to_run.name}: argument {argument.name} is a {argument.kind}, not implemented")
    scratch = to_run.scratch_bytes * to_run.blocks
    if scratch:
        values.append(memory.add("the scratch buffer", np.zeros(scratch, np.uint8)))
    return launch(to_run.kernel.code, to_run.grid, memory, values, to_run.shared_bytes, blocks, count)


def _place_tensors(to_run: Launch, memory: GlobalMemory) -> dict[int, int]:
    """Map argument indices to addresses. Tensors of one storage share an allocation; only they may be touched in it."""
    sharing: dict[int, list[Argument]] = {}
    places: dict[int, int] = {}
    for argument in to_run.arguments:
        if argument.kind.startswith("*"):
            if argument.tensor is None:
                raise NotImplementedError(f"{to_run.name}: {argument.name} is a pointer without a tensor")
            sharing.setdefault(argument.tensor.untyped_storage()._cdata, []).append(argument)
    for arguments in sharing.values():
        tensors = [argument.value for argument in arguments]
        storage = tensors[0].untyped_storage()
        octets = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        allowed = torch.zeros(octets.size, dtype=torch.bool)
        for tensor in tensors:
            size = tensor.itemsize
            strides = [stride * size for stride in tensor.stride()]
            sizes = [n if stride else min(n, 1) for n, stride in zip(tensor.shape, strides, strict=True)]
            allowed.as_strided((*sizes, size), (*strides, 1), tensor.storage_offset() * size).fill_(True)
        name = " and ".join(f"{a.name} (argument {a.index})" for a in arguments)
        base = memory.add(name, octets, storage.data_ptr(), allowed.numpy())
        for argument in arguments:
            places[argument.index] = base + argument.value.storage_offset() * argument.value.itemsize
    return places
