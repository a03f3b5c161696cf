"""The command `fastae bench`: its options; what it does is in `fastae/bench`."""

from __future__ import annotations

from pathlib import Path

import click

from fastae.cli.options import numbers
from fastae_bench import command

_file = click.Path(path_type=Path, exists=True, dir_okay=False)
_folder = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option("--quick", is_flag=True, help="Two networks, fewer rounds: under two minutes instead of fifteen.")
@click.option(
    "--only", metavar="PARTS", help="op, step, conv, fit, score, encode, startup, growth, or several with commas."
)
@click.option("--network", metavar="NAMES", help="tabular, mnist, embeddings, genes, recsys, wide, or several.")
@click.option("--precision", metavar="NAMES", help="float32, bfloat16 (default: both).")
@click.option("--features", metavar="WIDTHS", help="A network of your own instead, e.g. 784,256,128.")
@click.option("--batch", metavar="ROWS", help="Its batch, or several with commas between (default: 256).")
@click.option("--rounds", type=int, help="Turns of each variant (default: 12; 8 with --quick).")
@click.option("--sittings", type=int, help="Parts that the rounds come in, minutes apart (default: 3).")
@click.option("--no-compile", is_flag=True, help="Leave out torch.compile, which takes most of the time.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--report", type=_folder, metavar="DIR", help="Write bench.md, bench.json and plots there.")
@click.option("--compare", type=_file, metavar="OLD.json", help="Say what got slower since; then exit code 1.")
@click.option("--new", type=_file, metavar="NEW.json", help="Compare this report instead of measuring.")
def bench(
    quick: bool, only: str | None, network: str | None, precision: str | None, features: str | None, batch: str | None,
    rounds: int | None, sittings: int | None, no_compile: bool, device: str, report: Path | None, compare: Path | None,
    new: Path | None,
) -> int:  # fmt: skip
    """Measure fastae beside eager, tuned and compiled PyTorch on this machine, taking turns in one process."""
    if new is not None and compare is None:
        raise click.UsageError("--new needs --compare OLD.json")
    options = command.BenchOptions(
        quick, _names(only), _names(network), _names(precision), _numbers(features, "--features"),
        _numbers(batch, "--batch"), rounds, not no_compile, device, sittings,
    )  # fmt: skip
    return command.bench(options, report, compare, new)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if text else ()


def _numbers(text: str | None, option: str) -> tuple[int, ...]:
    return tuple(numbers(text, option)) if text else ()
