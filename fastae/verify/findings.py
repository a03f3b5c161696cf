"""Findings that a part of `fastae verify` reports one by one, and how they cross from a child process to its parent."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field

VERIFY_PARTS = ("numerics", "compile", "execute", "traffic", "statistics")


@dataclass(frozen=True)
class Finding:
    """One row of the table: what was looked at, the figure that was found, the limit it is held to."""

    part: str
    op: str  # the kernel's or launcher's name
    dtype: str
    shape: str  # "M=37 N=20 K=33", or a model and its batch
    activation: str
    target: str  # "interpreter", "sm_80", "cuda", ...
    figure: str  # "1.2e-07", "96 registers", ...
    limit: str
    ok: bool
    detail: str = ""  # of a failure: where, and what to look at


def emit(finding: Finding) -> None:
    """Hand a finding to the parent process: one line of JSON on standard output."""
    _write(asdict(finding))


def announce(op: str, what: str) -> None:
    """Tell the parent what comes next, so that it can name it if this process dies of it."""
    _write({"next": [op, what]})


def _write(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def parse(line: str) -> Finding | None:
    """The finding on a line of a child's output; None for a line that is something else."""
    try:
        return Finding(**json.loads(line))
    except (ValueError, TypeError):
        return None


def announced(line: str) -> tuple[str, str] | None:
    """Parse what `announce` said on a line; None if it is another."""
    try:
        op, what = json.loads(line)["next"]
    except (ValueError, TypeError, KeyError, IndexError):
        return None
    return str(op), str(what)


def named(name: str, only: str | None) -> bool:
    """Whether `--only` chooses this one; `_loss_kernel` and `loss` are the same name."""
    return only is None or plain(name) == plain(only)


def plain(name: str) -> str:
    """A kernel's name as its launcher has it."""
    return name.strip("_").removesuffix("_kernel")


@dataclass
class Outcome:
    """Outcome of one part."""

    part: str
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    problem: str = ""  # why it did not finish

    @property
    def failed(self) -> int:
        return sum(not f.ok for f in self.findings)

    @property
    def ok(self) -> bool:
        return not self.problem and not self.failed and bool(self.findings)
