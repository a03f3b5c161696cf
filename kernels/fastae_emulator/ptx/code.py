"""Decoded code of a program: a step for each instruction."""

from __future__ import annotations

from fastae_emulator.ptx.decoder import Decoder, Read
from fastae_emulator.ptx.instructions import find
from fastae_emulator.ptx.table import Step
from fastae_emulator.ptx.text import Program, parse

_CONTROL = {"bra": "bra", "ret": "exit", "exit": "exit", "bar": "barrier", "barrier": "barrier"}
# Diverged lanes wait at these until the rest of their warp is there (PTX ISA 9.7.9.6, 9.7.14.5).
_CONTROL |= dict.fromkeys(("shfl", "vote", "redux", "ldmatrix", "stmatrix", "mma", "wgmma", "tcgen05"), "converge")


class Code:
    """Steps by instruction: `steps[i]` executes, `predicates[i]` is its guard, `controls[i]` how it moves threads."""

    def __init__(self, program: Program) -> None:
        self.program = program
        numbers = {name: number for number, name in enumerate(program.registers)}
        self.steps: list[Step] = []
        self.predicates: list[Read | None] = []
        self.controls: list[str | None] = []
        for instruction in program.instructions:
            form, slots = find(instruction, program.name)
            decoder = Decoder(program, instruction, slots, numbers)
            guard = instruction.predicate
            self.steps.append(form.build(decoder))
            self.predicates.append(decoder.predicate("!" * instruction.negated + guard) if guard else None)
            self.controls.append(_CONTROL.get(instruction.opcode))


def assemble(ptx: str) -> Code:
    """Parse and decode; an instruction outside the table raises here, before anything runs."""
    return Code(parse(ptx))
