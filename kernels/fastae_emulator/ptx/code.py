"""A program made ready to run: each instruction decoded to a step, once."""

from __future__ import annotations

import numpy as np

from fastae_emulator.ptx import instructions
from fastae_emulator.ptx.decoder import Decoder, Read
from fastae_emulator.ptx.scalars import UNSIGNED
from fastae_emulator.ptx.table import Step
from fastae_emulator.ptx.text import Program, parse

assert instructions  # importing them fills the table

_CONTROL = {"bra": "bra", "ret": "exit", "exit": "exit", "bar": "barrier", "barrier": "barrier"}
# What lanes that have diverged wait at until the rest of their warp is there (PTX ISA 9.7.9.6, 9.7.14.5).
_CONTROL |= dict.fromkeys(("shfl", "vote", "redux", "ldmatrix", "stmatrix", "mma", "wgmma", "tcgen05"), "converge")


class Code:
    """`steps[i]` executes instruction i, `predicates[i]` says where, `controls[i]` if it moves or stops threads."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names = list(program.registers)
        self.raws = [np.bool_ if bits == 1 else UNSIGNED[bits] for bits in program.registers.values()]
        numbers = {name: number for number, name in enumerate(self.names)}
        self.steps: list[Step] = []
        self.predicates: list[Read | None] = []
        self.controls: list[str | None] = []
        for instruction in program.instructions:
            decoder = Decoder(program, instruction, numbers)
            guard = instruction.predicate
            self.steps.append(decoder.step())
            self.predicates.append(decoder.predicate("!" * instruction.negated + guard) if guard else None)
            self.controls.append(_CONTROL.get(instruction.opcode))

    def uses(self, opcode: str) -> bool:
        return any(instruction.opcode == opcode for instruction in self.program.instructions)


def assemble(ptx: str) -> Code:
    """Parse and decode; an instruction outside the table raises here, before anything runs."""
    return Code(parse(ptx))
