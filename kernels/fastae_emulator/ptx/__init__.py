"""PTX emulator in numpy: executes on a CPU the kernels that Triton compiled for sm_80, sm_90 and sm_100.

A table lists the implemented opcodes and qualifiers; anything else is refused before a kernel runs: tensor descriptors
(TMA), named barriers, clusters, warp specialisation, fp8.

Findings are properties of the PTX, not of the machine code that ptxas makes of it, nor of a chip. Approximate functions
and the sums of tensor cores are exact here and rounded once. The lanes of a warp run in step, so races inside a warp
are not looked for, nor races between blocks. The layouts of wgmma and tcgen05 are those of the PTX ISA, never compared
with a GPU.
"""

from fastae_emulator.ptx.code import Code, assemble
from fastae_emulator.ptx.counters import Counters, TensorTraffic
from fastae_emulator.ptx.errors import PtxError
from fastae_emulator.ptx.launch import launch
from fastae_emulator.ptx.memory import GlobalMemory

__all__ = ["Code", "Counters", "GlobalMemory", "PtxError", "TensorTraffic", "assemble", "launch"]
