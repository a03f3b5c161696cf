"""A Triton driver for GPUs that are not there.

Inside `on_target("sm_90", hook)` an ordinary `kernel[grid](cpu_tensors, ...)` goes through Triton's own specialisation
and compiler for that GPU; instead of being launched, it is handed to the hook. `Recorder` keeps it, `Executor` also
runs its PTX on this CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastae_emulator.ptx import Code, Counters, GlobalMemory, assemble, launch
from fastae_emulator.resources import Resources, of_cubins, parse_amdgcn

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver as triton_driver
except ImportError as error:
    raise ImportError(f"fastae_emulator.driver needs Triton ({error}); pip install triton (Linux)") from None

# name -> target, and the shared memory a block can have (CUDA C++ programming guide, table of compute capabilities;
# AMD CDNA3 ISA, section 2.2)
TARGETS: dict[str, tuple[GPUTarget, int]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}


class CompiledKernel:
    """What the compiler made of one specialisation of a kernel."""

    def __init__(self, name: str, target: str, binary: bytes, shared_bytes: int, files: dict[str, str]) -> None:
        self.name, self.target, self.binary, self.shared_bytes = name, target, binary, shared_bytes
        self._files = {Path(file).suffix[1:]: Path(path) for file, path in files.items()}

    def text(self, stage: str) -> str:
        """A stage of the compilation: ttir, ttgir, llir, ptx or amdgcn."""
        return self._files[stage].read_text()

    @cached_property
    def code(self) -> Code:
        """The PTX, decoded for the machine."""
        if "ptx" not in self._files:
            raise ValueError(f"{self.name}: {self.target} has no PTX; only kernels for NVIDIA GPUs can be executed")
        return assemble(self.text("ptx"))

    @cached_property
    def resources(self) -> Resources:
        """Registers, spills and instructions of the machine code; read when first asked for."""
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
    """`kind` is Triton's type: "*bf16" for a tensor, "i32", "fp32", or "constexpr"."""

    name: str
    index: int
    kind: str
    value: Any

    @property
    def tensor(self) -> Tensor | None:
        return self.value if self.kind.startswith("*") and isinstance(self.value, Tensor) else None


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as it would have reached a GPU."""

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
    """Compiles and keeps the launches; nothing is computed, outputs hold what they held."""

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
    """Addresses by argument index. Tensors of one storage share an allocation; only their elements may be touched."""
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


class _Utils:
    """Stands for the part of a Triton driver that talks to the GPU."""

    def __init__(self, driver: AbsentDriver) -> None:
        self.driver = driver
        self.files: dict[str, str] = {}  # of the kernel about to be loaded

    def get_device_properties(self, device: int) -> dict[str, Any]:
        return {"max_shared_mem": self.driver.max_shared_bytes, "warpSize": self.driver.target.warp_size}

    def load_binary(
        self, name: str, binary: bytes, shared_bytes: int, device: int
    ) -> tuple[CompiledKernel, CompiledKernel, int, int, int]:
        """(module, function, registers, spills, threads a block may have); resources are read when asked for."""
        kernel = CompiledKernel(name, self.driver.name, binary, shared_bytes, dict(self.files))
        return kernel, kernel, 0, 0, 1024


class _Launcher:
    """Built by Triton once for each compiled kernel, called at each launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, kernel: CompiledKernel, *rest: Any) -> None:
        values = rest[4:]  # behind the packed metadata, the launch metadata and two hooks
        driver = triton_driver.active
        assert isinstance(driver, AbsentDriver)
        if x * y * z == 0:
            return
        driver.hook(
            Launch(
                kernel,
                (x, y, z),
                tuple(_arguments(self.source.signature, values)),
                self.metadata.num_warps,
                self.metadata.shared,
                getattr(self.metadata, "global_scratch_size", 0) or 0,
            )
        )


def _arguments(signature: dict[str, Any], values: Sequence[Any]) -> Iterator[Argument]:
    """One for each value, tuples being taken apart: `pair.0`, `pair.1`."""
    pairs = list(zip(signature.items(), values, strict=True))
    index = 0
    while pairs:
        (name, kind), value = pairs.pop(0)
        if isinstance(kind, tuple):
            pairs[:0] = [((f"{name}.{i}", k), v) for i, (k, v) in enumerate(zip(kind, value, strict=True))]
            continue
        yield Argument(name, index, kind, value)
        index += 1


class AbsentDriver:
    """A Triton driver whose launches go to `hook`."""

    launcher_cls = _Launcher

    def __init__(self, name: str, hook: Hook) -> None:
        if name not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}; got {name!r}")
        self.name, self.hook = name, hook
        self.target, self.max_shared_bytes = TARGETS[name]
        self.utils = _Utils(self)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """Triton keeps compiled kernels by device number, so each target has its own."""
        return list(TARGETS).index(self.name)

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.target.arch, 10) if self.target.backend == "cuda" else (9, 4)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_benchmarker(self) -> Callable[..., Any]:
        """For the autotuner: there is no time to measure, so each config is compiled and the first one is taken."""

        def benchmark(run: Callable[[], Any], *, quantiles: Sequence[float] | None = None, **_: Any) -> Any:
            run()
            return [0.0] * len(quantiles) if quantiles else 0.0

        return benchmark


def _no_machine_code(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str] | None:
    """Triton's hook for the stages of a compilation; asked without arguments, what tells such a kernel from others."""
    if stages is None:
        return "no machine code", "no machine code"
    stages["cubin"] = lambda source, metadata: b""
    return None


@contextmanager
def on_target(name: str, hook: Hook, machine_code: bool = True) -> Iterator[None]:
    """Kernels launched inside are compiled for `name` (sm_80, sm_90, sm_100, gfx942) and handed to `hook`.

    Without `machine_code` as far as PTX, which is all that an `Executor` reads.
    """
    if triton.knobs.runtime.interpret or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("on_target: TRITON_INTERPRET is set, nothing would be compiled; start Python without it")
    driver = AbsentDriver(name, hook)

    def note_files(module: Any, function: Any, kernel: str, files: dict[str, str], key: str) -> None:
        driver.utils.files = files

    runtime = triton.knobs.runtime
    before, loading, stages = triton_driver._active, runtime.kernel_load_start_hook, runtime.add_stages_inspection_hook
    loading.add(note_files)
    if not machine_code:
        runtime.add_stages_inspection_hook = _no_machine_code
    triton_driver.set_active(driver)
    try:
        yield
    finally:
        triton_driver._active, runtime.add_stages_inspection_hook = before, stages
        loading.remove(note_files)
