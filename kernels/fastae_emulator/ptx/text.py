"""Parser of PTX text: registers, parameters, branch targets, and the source line of each instruction."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fastae_emulator.ptx.errors import PtxError
from fastae_emulator.ptx.scalars import SCALARS

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.S)
_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
      | (?P<loc>\.loc\b[^\n]*)
      | (?P<directive>\.[a-z]\w*\b[^;]*;)
      | (?P<open>\{)
      | (?P<close>\})
      | (?P<label>[\w$]+:(?!:))
      | (?P<statement>[^;{}]*(?:\{[^{};]*\}[^;{}]*)*;)""",
    re.S | re.X,
)
_STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)$", re.S)
_PLACE = re.compile(r"([^\s:@\[\]]+):(\d+)(?::\d+)?")
_NAME = re.compile(r"[%$\w]+")


@dataclass(frozen=True)
class Instruction:
    """Instruction of a program. Registers that a scope declares carry its number: `%complete@3`."""

    opcode: str
    qualifiers: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    text: str
    where: str  # "tile_ops.py:70, called from linear_act.py:34"
    target: int = -1  # of a branch

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.qualifiers))


@dataclass
class Program:
    """Parsed kernel."""

    name: str
    parameters: tuple[tuple[str, str], ...]  # (name, type)
    threads: int
    registers: dict[str, int]  # name -> bits
    instructions: list[Instruction]
    symbols: dict[str, int]  # shared or local variable -> offset in its space
    local_bytes: int

    def uses(self, opcode: str) -> bool:
        return any(instruction.opcode == opcode for instruction in self.instructions)


@dataclass
class _Scope:
    number: int
    names: dict[str, str]
    labels: dict[str, int] = field(default_factory=dict)


def split_operands(text: str) -> tuple[str, ...]:
    """Split at the commas outside braces and brackets."""
    found, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += character
    return tuple([*found, current.strip()] if current.strip() else found)


def parse(ptx: str) -> Program:
    """Parse the first kernel of a module."""
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise PtxError("the PTX holds no .entry")
    name, parameter_text, directives = entry.groups()
    parameters = []
    for piece in filter(str.strip, parameter_text.split(",")):
        words = piece.split()
        parameters.append((words[-1], words[1].lstrip(".")))
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", directives)
    if threads is None or any(int(size or 1) != 1 for size in threads.groups()[1:]):
        raise PtxError(f"{name}: the machine needs one-dimensional blocks of a size that .reqntid gives")
    program = Program(name, tuple(parameters), int(threads.group(1)), {}, [], {}, 0)
    _declare_globals(program, ptx[: entry.start()])
    files = {
        int(n): path.rsplit("/", 1)[-1] for n, path in re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', ptx)
    }
    _Body(program, files).read(ptx, entry.end())
    return program


def _declare_globals(program: Program, text: str) -> None:
    for symbol in re.findall(r"\.extern\s+\.shared\b[^;]*?([\w$]+)\[\]\s*;", text):
        program.symbols[symbol] = 0  # dynamic shared memory begins the window


class _Body:
    """Reads the statements of a kernel, scope by scope."""

    def __init__(self, program: Program, files: dict[int, str]) -> None:
        self.program = program
        self.files = files
        self.scopes = [_Scope(0, {})]
        self.opened = 0
        self.where = "?"
        self.branches: list[tuple[int, str, list[_Scope]]] = []

    def read(self, ptx: str, start: int) -> None:
        position = start
        while self.scopes:
            token = _TOKEN.match(ptx, position)
            if token is None:
                raise PtxError(f"{self.program.name}: cannot read {ptx[position : position + 80]!r}")
            position = token.end()
            kind, text = token.lastgroup, token.group().strip()
            if kind == "open":
                self.opened += 1
                self.scopes.append(_Scope(self.opened, dict(self.scopes[-1].names)))
            elif kind == "close":
                self.scopes.pop()
            elif kind == "label":
                self.scopes[-1].labels[text[:-1]] = len(self.program.instructions)
            elif kind == "loc":
                self._place(text)
            elif kind == "directive":
                self._directive(text.rstrip(";"))
            elif kind == "statement" and text != ";":
                self._statement(" ".join(text.rstrip(";").split()))
        self._resolve()

    def _place(self, text: str) -> None:
        """Read `.loc 2 43 17 // standard.py:43:17 @[ tile_ops.py:39:30 ]`: the comment names the callers too."""
        code, _, comment = text.partition("//")
        numbers = code.split()
        chain = [f"{file}:{line}" for file, line in _PLACE.findall(comment)]
        own = f"{self.files.get(int(numbers[1]), 'file ' + numbers[1])}:{numbers[2]}"
        self.where = ", called from ".join(chain or [own])

    def _directive(self, text: str) -> None:
        words = text.split(None, 2)
        if words[0] == ".reg":
            bits = SCALARS[words[1][1:]].bits
            for name in words[2].split(","):
                family = re.fullmatch(r"\s*(.*?)<(\d+)>\s*", name)
                names = [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [name.strip()]
                for register in names:
                    scope = self.scopes[-1]
                    scope.names[register] = register if len(self.scopes) == 1 else f"{register}@{scope.number}"
                    self.program.registers[scope.names[register]] = bits
        elif words[0] == ".local":
            variable = re.search(r"\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", text)
            if variable is None:
                raise PtxError(f"{self.program.name}: cannot read {text!r}")
            align, size = int(variable[1]), int(variable[3])
            offset = -(-self.program.local_bytes // align) * align
            self.program.symbols[variable[2]] = offset
            self.program.local_bytes = offset + size
        elif words[0] not in (".pragma",):
            raise PtxError(f"{self.program.name}, {self.where}: directive not implemented: {text}")

    def _statement(self, text: str) -> None:
        parts = _STATEMENT.match(text)
        if parts is None:
            raise PtxError(f"{self.program.name}, {self.where}: cannot read {text!r}")
        negated, predicate, name, operands = parts.groups()
        names = self.scopes[-1].names
        opcode, *qualifiers = name.split(".")
        if opcode == "bra":
            self.branches.append((len(self.program.instructions), operands.strip(), list(self.scopes)))
        else:
            operands = _NAME.sub(lambda found: names.get(found.group(), found.group()), operands)
        self.program.instructions.append(
            Instruction(
                opcode,
                tuple(qualifiers),
                split_operands(operands),
                names.get(predicate, predicate),
                bool(negated),
                text,
                self.where,
            )
        )

    def _resolve(self) -> None:
        for at, label, scopes in self.branches:
            targets = [scope.labels[label] for scope in reversed(scopes) if label in scope.labels]
            old = self.program.instructions[at]
            if not targets:
                raise PtxError(f"{self.program.name}, {old.where}: no label for {old.text}")
            self.program.instructions[at] = Instruction(
                old.opcode, old.qualifiers, old.operands, old.predicate, old.negated, old.text, old.where, targets[0]
            )
