"""Triton driver for GPUs that are not there.

Inside `on_target("sm_90", hook)` an ordinary `kernel[grid](cpu_tensors, ...)` goes through Triton's own specialisation
and compiler for that GPU; instead of being launched, it is handed to the hook. `Recorder` keeps it, `Executor` runs its
PTX on this CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastae_emulator.launches import Argument, CompiledKernel, Hook, Launch

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


class _Utils:
    """Replacement for the part of a Triton driver that talks to the GPU."""

    def __init__(self, driver: OfflineDriver) -> None:
        self.driver = driver
        self.files: dict[str, str] = {}  # of the kernel about to be loaded

    def get_device_properties(self, device: int) -> dict[str, Any]:
        return {"max_shared_mem": self.driver.max_shared_bytes, "warpSize": self.driver.target.warp_size}

    def load_binary(
        self, name: str, binary: bytes, shared_bytes: int, device: int
    ) -> tuple[CompiledKernel, CompiledKernel, int, int, int]:
        """Return (module, function, registers, spills, threads a block may have); resources are read on first use."""
        kernel = CompiledKernel(name, self.driver.name, binary, shared_bytes, dict(self.files))
        return kernel, kernel, 0, 0, 1024


class _Launcher:
    """Hands launches to the hook. Triton builds one for each compiled kernel and calls it at each launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, kernel: CompiledKernel, *rest: Any) -> None:
        values = rest[4:]  # behind the packed metadata, the launch metadata and two hooks
        driver = triton_driver.active
        assert isinstance(driver, OfflineDriver)
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
    """Name each value, taking tuples apart: `pair.0`, `pair.1`."""
    pairs = list(zip(signature.items(), values, strict=True))
    index = 0
    while pairs:
        (name, kind), value = pairs.pop(0)
        if isinstance(kind, tuple):
            pairs[:0] = [((f"{name}.{i}", k), v) for i, (k, v) in enumerate(zip(kind, value, strict=True))]
            continue
        yield Argument(name, index, kind, value)
        index += 1


class OfflineDriver:
    """Triton driver whose launches go to `hook`."""

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
        """Return the target's own number: Triton keeps compiled kernels by device number."""
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
        """Benchmark for the autotuner that measures nothing: each config is compiled, and the first one is taken."""

        def benchmark(run: Callable[[], Any], *, quantiles: Sequence[float] | None = None, **_: Any) -> Any:
            run()
            return [0.0] * len(quantiles) if quantiles else 0.0

        return benchmark


def _no_machine_code(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str] | None:
    """Stop a compilation at PTX. Triton calls this hook without arguments for the key of such kernels in its cache."""
    if stages is None:
        return "no machine code", "no machine code"
    stages["cubin"] = lambda source, metadata: b""
    return None


@contextmanager
def on_target(name: str, hook: Hook, machine_code: bool = True) -> Iterator[None]:
    """Compile the kernels launched inside for `name` (sm_80, sm_90, sm_100, gfx942) and hand them to `hook`.

    Without `machine_code` the compilation stops at PTX, which is all that an `Executor` reads.
    """
    if triton.knobs.runtime.interpret or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("on_target: TRITON_INTERPRET is set, nothing would be compiled; start Python without it")
    driver = OfflineDriver(name, hook)

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
