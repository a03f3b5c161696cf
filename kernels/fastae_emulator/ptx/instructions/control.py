"""Branches, barriers and fences. `Machine.run` moves the threads; here stands what is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastae_emulator.ptx.decoder import Decoder
from fastae_emulator.ptx.table import Step, implements

if TYPE_CHECKING:
    from fastae_emulator.ptx.machine import Machine


def _nothing(machine: Machine) -> None:
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
    """Generic writes to shared memory become visible to tensor cores (PTX ISA 8.6)."""
    if d.slots[-1] == "global":
        return _nothing
    return lambda machine: machine.shared.fence()
