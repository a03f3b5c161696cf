"""Table of the implemented opcodes, with the exact qualifiers of each. Whatever is not in it is refused.

A form is written as slots in the order of the PTX ISA: `"rn? ftz? f32|f64"` stands for `.f32`, `.rn.f32`, `.ftz.f64`
and so on. Qualifiers with dots inside do not exist, so `shared::cta` is one alternative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastae_emulator.ptx.decoder import Decoder
from fastae_emulator.ptx.errors import UnknownInstructionError
from fastae_emulator.ptx.state import State
from fastae_emulator.ptx.text import Instruction

Step = Callable[[State], None]
Builder = Callable[[Decoder], Step]


@dataclass(frozen=True)
class Form:
    """Row of the table: an opcode, its slots, and the function that turns an instruction into a step."""

    opcode: str
    text: str
    slots: tuple[tuple[str, ...], ...]
    build: Builder

    def match(self, qualifiers: tuple[str, ...]) -> tuple[str, ...] | None:
        """Qualifiers by slot, "" for one left out; None if they are not of this form."""
        filled, at = [], 0
        for slot in self.slots:
            if at < len(qualifiers) and qualifiers[at] in slot:
                filled.append(qualifiers[at])
                at += 1
            elif "" in slot:
                filled.append("")
            else:
                return None
        return tuple(filled) if at == len(qualifiers) else None


TABLE: dict[str, list[Form]] = {}


def implements(opcodes: str, *forms: str) -> Callable[[Builder], Builder]:
    """Enter a builder for these opcodes (separated by spaces) and forms into the table."""

    def enter(build: Builder) -> Builder:
        for opcode in opcodes.split():
            for form in forms:
                slots = []
                for slot in form.split():
                    choices = tuple(slot.rstrip("?").split("|"))
                    slots.append((*choices, "") if slot.endswith("?") else choices)
                TABLE.setdefault(opcode, []).append(Form(opcode, form, tuple(slots), build))
        return build

    return enter


def find(instruction: Instruction, kernel: str) -> tuple[Form, tuple[str, ...]]:
    """Look up the form of an instruction and the qualifiers in its slots, or raise with the forms of its opcode."""
    forms = TABLE.get(instruction.opcode, [])
    for form in forms:
        filled = form.match(instruction.qualifiers)
        if filled is not None:
            return form, filled
    known = "; ".join(f"{form.opcode} {form.text}" for form in forms) or "no form of this opcode"
    what = "these qualifiers" if forms else "this opcode"
    raise UnknownInstructionError(
        f"{kernel}, {instruction.where}: {what} of `{instruction.name}` not implemented, in `{instruction.text}`; "
        f"implemented: {known}"
    )
