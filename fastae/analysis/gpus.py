"""Published peak figures of GPUs, for `fastae.explain`: what the vendor prints, not what a program reaches."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GPU:
    """Dense rates in TFLOP/s with fp32 accumulation, memory in GB/s, the last cache before memory in MiB."""

    name: str
    half: float  # fp16 and bf16, tensor cores
    tf32: float
    fp32: float  # IEEE
    fp64: float
    bandwidth: float
    cache: int
    source: str

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of a matrix product; fp32 follows torch.get_float32_matmul_precision()."""
        if dtype in (torch.float16, torch.bfloat16):
            return self.half * 1e12
        if dtype == torch.float64:
            return self.fp64 * 1e12
        return (self.fp32 if torch.get_float32_matmul_precision() == "highest" else self.tf32) * 1e12


GPUS = {
    "a100": GPU("A100 SXM 80 GB", 312, 156, 19.5, 19.5, 2039, 40, "NVIDIA A100 data sheet (2021)"),
    "h100": GPU("H100 SXM 80 GB", 989.4, 494.7, 66.9, 66.9, 3350, 50, "NVIDIA H100 architecture paper (2022)"),
    "b200": GPU("B200 192 GB", 2250, 1125, 75, 37, 8000, 126, "NVIDIA HGX B200 data sheet (2024), an eighth of it"),
    "mi300x": GPU("MI300X 192 GB", 1307.4, 653.7, 163.4, 163.4, 5300, 256, "AMD Instinct MI300X data sheet (2023)"),
    "rtx4090": GPU("RTX 4090 24 GB", 165.2, 82.6, 82.6, 1.3, 1008, 72, "NVIDIA Ada architecture paper (2022)"),
}

# Microseconds, round and assumed. Between kernels of a captured graph; on the host for a kernel that eager PyTorch
# launches with autograd (a step of 784-256-128 takes 300 to 400 us for about 30) and for one of torch.compile's; and
# for the replay of a graph.
GAP_US, EAGER_US, COMPILED_US, REPLAY_US = 1.0, 10.0, 5.0, 10.0
