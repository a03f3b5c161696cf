"""`run`, with which the tests of the PTX machine execute a few lines on arrays."""

from collections.abc import Sequence

import numpy as np
from fastae_emulator.ptx import Counters, GlobalMemory, assemble, launch

HEADER = """
.version 9.1
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel({parameters})
.reqntid {threads}
{{
  .reg .pred %p<16>;
  .reg .b16 %h<40>;
  .reg .b32 %r<80>;
  .reg .b64 %d<40>;
  .loc 1 7 3 // tile.py:7:3 @[ op.py:42:9 ]
  ld.param.u64 %d30, [k0];
  ld.param.u64 %d31, [k1];
  ld.param.u64 %d32, [k2];
  ld.param.u64 %d33, [k3];
  mov.u32 %r70, %tid.x;
{body}
  ret;
}}
.file 1 "/somewhere/tile.py"
"""
PARAMETERS = ", ".join(f".param .u64 k{i}" for i in range(4))


def text(body: str, threads: int = 32) -> str:
    """A kernel whose arguments 0 to 3 lie in %d30 to %d33 and whose thread number lies in %r70."""
    return HEADER.format(parameters=PARAMETERS, threads=threads, body=body)


def run(
    body: str, *arrays: np.ndarray, threads: int = 32, shared: int = 0, blocks: int = 1,
    only: Sequence[int] | None = None, count: bool = False,
) -> Counters:  # fmt: skip
    """Execute a body on arrays, in place."""
    memory = GlobalMemory()
    addresses = [memory.add(f"tensor{i}", a.reshape(-1).view(np.uint8)) for i, a in enumerate(arrays)]
    return launch(assemble(text(body, threads)), (blocks,), memory, addresses, shared, only, count)
