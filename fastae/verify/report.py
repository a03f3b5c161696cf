"""Report of `fastae verify`: failures in full, one line for each op of each part, and whether all of it holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastae.verify.findings import Finding, Outcome

SHOWN = 40  # failures printed in full; --json has them all
COLUMNS = ("part", "op", "dtype", "shape", "activation", "target", "figure", "limit", "verdict")


def print_report(outcomes: Sequence[Outcome], seed: int, seconds: float, ok: bool, show_all: bool) -> None:
    console = Console()
    if not console.is_terminal and console.width < 160:
        console.width = 160  # of a file or a pipe, which have no width
    findings = [f for o in outcomes for f in o.findings]
    failures = [f for f in findings if not f.ok]
    if show_all:
        console.print(_rows(findings))
    elif failures:
        console.print(_rows(failures[:SHOWN]))
        if len(failures) > SHOWN:
            console.print(f"... and {len(failures) - SHOWN} failures more; --json FILE has them all")
    for failure in failures[:SHOWN]:
        if failure.detail:
            console.print(Text(f"{failure.op}: {failure.detail}"))
    console.print(_summary(findings))
    steps = [f for f in findings if f.part == "traffic" and not f.op.startswith("_")]
    if steps:
        console.print(_steps(steps))
    for line in closing_lines(outcomes, seed, seconds, ok):
        print(line)


def _rows(findings: Iterable[Finding]) -> Table:
    table = Table(*COLUMNS, box=None, padding=(0, 1), pad_edge=False)
    for f in findings:
        cells = (f.part, f.op, f.dtype, f.shape, f.activation, f.target, f.figure, f.limit)
        table.add_row(*map(Text, cells), _verdict(f.ok))
    return table


def _verdict(ok: bool) -> Text:
    return Text("ok", "green") if ok else Text("FAILED", "bold red")


def _summary(findings: Iterable[Finding]) -> Table:
    """One line for each op of each part."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for f in findings:
        groups.setdefault((f.part, f.op), []).append(f)
    table = Table("part", "op", "dtypes", "targets", "nearest to its limit", box=None, padding=(0, 1), pad_edge=False)
    table.add_column("checks", justify="right")
    table.add_column("failed", justify="right")
    table.add_column("verdict")
    for (part, op), group in groups.items():
        failed = sum(not f.ok for f in group)
        cells = [part, op, *(_list(getattr(f, name) for f in group) for name in ("dtype", "target")), _nearest(group)]
        table.add_row(*map(Text, (*cells, str(len(group)), str(failed))), _verdict(not failed))
    return table


def _steps(findings: Iterable[Finding]) -> Table:
    """Cost of a whole step of each model: figures to read, whether or not they hold."""
    table = Table("step", "dtype", "target", "", "figure", "limit", box=None, padding=(0, 1), pad_edge=False)
    for f in findings:
        table.add_row(*map(Text, (f.shape, _SHORT.get(f.dtype, f.dtype), f.target, f.op, f.figure, f.limit)))
    return table


_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


def _list(names: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(_SHORT.get(name, name) for name in names if name))


def _nearest(group: Iterable[Finding]) -> str:
    """Where figures are plain numbers held to a limit from above: the one that comes nearest to it."""
    best = (0.0, "")
    for f in group:
        try:
            figure, limit = float(f.figure), float(f.limit)
        except ValueError:
            continue
        if limit > 0 and figure / limit >= best[0]:
            best = figure / limit, f"{f.figure} of {f.limit}"
    return best[1]


def closing_lines(outcomes: Sequence[Outcome], seed: int, seconds: float, ok: bool) -> list[str]:
    lines = []
    for o in outcomes:
        held = len(o.findings) - o.failed
        lines.append(f"{o.part:9} {held:6,} of {len(o.findings):,} checks hold, {o.seconds:.0f} s")
        if o.problem:
            lines.append(f"{o.part:9} did not finish: {o.problem}")
    count = sum(len(o.findings) for o in outcomes)
    if ok:
        return [*lines, f"verified: all {count:,} checks hold; seed {seed}, {seconds:.0f} s"]
    ops = dict.fromkeys(f.op for o in outcomes for f in o.findings if not f.ok)
    named = ", ".join(ops) or ", ".join(o.part for o in outcomes if not o.ok)
    return [
        *lines,
        f"FAILED: {sum(o.failed for o in outcomes):,} of {count:,} checks: {named}; seed {seed}, {seconds:.0f} s",
    ]
