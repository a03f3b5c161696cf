"""Machine: control flow of a batch of thread blocks that run side by side.

One instruction is executed for all threads of the batch that are at it. Threads that diverge become fragments; the
fragment at the lowest instruction runs, and fragments that meet become one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastae_emulator.ptx.batch import WARP
from fastae_emulator.ptx.code import Code
from fastae_emulator.ptx.errors import UnsynchronisedError
from fastae_emulator.ptx.scalars import Array
from fastae_emulator.ptx.state import State

_NEVER = 1 << 60
_RUNAWAY = 100_000_000  # instructions of one batch: a loop that never ends


@dataclass
class Fragment:
    """Threads at one instruction. `warps` counts the warps among them."""

    at: int
    lanes: Array
    whole: bool
    warps: int
    polling: bool = False  # found an mbarrier incomplete: others go first
    waits_for_warp: bool = False  # others go first; if all wait, it runs without the rest of its warp


class Machine:
    """Runs code on the state of a batch."""

    def __init__(self, code: Code, state: State) -> None:
        self.code, self.state = code, state

    def run(self) -> None:
        """Execute until every thread has left the kernel."""
        state, mbarriers = self.state, self.state.mbarriers
        resume: dict[int, Array] = {}  # instruction after a barrier -> its threads
        fragments = [Fragment(0, state.active, True, state.lanes // WARP)]
        executed = 0
        while fragments or resume:
            if not fragments:
                state.barrier()
                fragments = [_fragment(at, lanes) for at, lanes in resume.items()]
                resume = {}
            if mbarriers.progressed:
                mbarriers.progressed = False
                for other in fragments:
                    other.polling = False
            order = [(other.polling, other.waits_for_warp, other.at) for other in fragments]
            fragment = fragments.pop(order.index(min(order)))
            limit = min((other.at for other in fragments if other.at > fragment.at), default=_NEVER)
            if fragment.polling:
                mbarriers.spin()
            ended, stopped, count = self._run_fragment(fragment, limit, alone=not fragments)
            executed += count
            if executed > _RUNAWAY:
                state.fail(UnsynchronisedError, f"still running after {_RUNAWAY} instructions")
            if stopped == "barrier":
                for part in ended:
                    resume[part.at] = resume.get(part.at, np.zeros(state.lanes, np.bool_)) | part.lanes
            elif stopped != "exit":
                for part in ended:
                    _merge(fragments, part)
        if state.tensor_memory is not None:
            state.tensor_memory.check_end()

    def _run_fragment(self, fragment: Fragment, limit: int, alone: bool) -> tuple[list[Fragment], str, int]:
        """Run one fragment until it meets another, splits, waits or ends."""
        state, mbarriers = self.state, self.state.mbarriers
        steps, controls, predicates = self.code.steps, self.code.controls, self.code.predicates
        counts = state.tally.issued
        lanes, whole, warps, at = fragment.lanes, fragment.whole, fragment.warps, fragment.at
        end, executed = len(steps), 0
        while at < limit:
            if at >= end:
                return [], "exit", executed
            state.at = at
            state.taint = None
            counts[at] += warps
            executed += 1
            predicate = predicates[at]
            if predicate is None:
                active, all_active = lanes, whole
            else:
                state.active, state.whole = lanes, whole
                active = predicate(state) & lanes
                state.require_defined("is guarded by a predicate")
                all_active = whole and bool(active.all())
                if not all_active and not active.any():
                    at += 1
                    continue
            state.active, state.whole = active, all_active
            control = controls[at]
            if control == "converge" and not (whole or alone or fragment.waits_for_warp) and _splits_a_warp(lanes):
                counts[at] -= warps
                return [Fragment(at, lanes, whole, warps, waits_for_warp=True)], "split", executed
            if control is None or control == "converge":
                fragment.waits_for_warp = False
                steps[at](state)
                at += 1
                continue
            if control == "bra":
                target = state.program.instructions[at].target
                if all_active or active is lanes or bool((active == lanes).all()):
                    if target <= at and (mbarriers.spinning or not alone):
                        polling, mbarriers.spinning = mbarriers.spinning, False
                        return [Fragment(target, lanes, whole, warps, polling)], "split", executed
                    at = target
                    continue
                return [_fragment(target, active), _fragment(at + 1, lanes & ~active)], "split", executed
            if control == "exit":
                rest = lanes & ~active
                return ([_fragment(at + 1, rest)] if rest.any() else []), "split", executed
            steps[at](state)  # the barrier checks its operands
            if active is not lanes and (active != lanes).any():
                state.fail(UnsynchronisedError, "a barrier that some threads skip by their predicate")
            return [Fragment(at + 1, lanes, whole, warps)], "barrier", executed
        return [Fragment(at, lanes, whole, warps)], "met", executed


def _fragment(at: int, lanes: Array) -> Fragment:
    return Fragment(at, lanes, bool(lanes.all()), int(lanes.reshape(-1, WARP).any(1).sum()))


def _merge(fragments: list[Fragment], part: Fragment) -> None:
    """Join a fragment to one at the same instruction, or add it."""
    for other in fragments:
        if other.at == part.at:
            fragments.remove(other)
            polling = part.polling and other.polling
            part = _fragment(part.at, part.lanes | other.lanes)
            part.polling = polling
            break
    fragments.append(part)


def _splits_a_warp(lanes: Array) -> bool:
    of_warp = lanes.reshape(-1, WARP)
    return bool((of_warp.any(1) != of_warp.all(1)).any())
