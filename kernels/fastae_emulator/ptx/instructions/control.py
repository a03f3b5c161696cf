"""Branches, barriers and fences: the allowed forms. `Machine.run` moves the threads."""

from __future__ import annotations

from fastae_emulator.ptx.decoder import Decoder
from fastae_emulator.ptx.state import State
from fastae_emulator.ptx.table import Step, implements


def _nothing(state: State) -> None:
    pass


@implements("bra", "uni?")
@implements("ret exit", "")
@implements("membar", "cta|gl|sys")
@implements("fence", "sc|acq_rel? cta|gpu|sys|cluster", "mbarrier_init release cluster")
@implements("griddepcontrol", "wait", "launch_dependents")  # one launch runs after another here
def control(d: Decoder) -> Step:
    return _nothing


@implements("bar", "sync")
@implements("barrier", "sync aligned?", "cta sync aligned?")
def barrier(d: Decoder) -> Step:
    if d.operands[:1] != ("0",) or (len(d.operands) > 1 and d.operands[1] != str(d.program.threads)):
        raise d.refuse("only barrier 0 of the whole block is implemented")
    return _nothing


@implements("bar", "warp sync")
def warp_barrier(d: Decoder) -> Step:
    return _nothing


@implements("fence", "proxy async shared::cta?", "proxy async global")
def proxy_fence(d: Decoder) -> Step:
    """Make generic writes to shared memory visible to tensor cores (PTX ISA 8.6)."""
    if d.slots[-1] == "global":
        return _nothing
    return lambda state: state.shared.fence()
