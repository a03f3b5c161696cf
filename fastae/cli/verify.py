"""The command `fastae verify`."""

from __future__ import annotations

import secrets
from pathlib import Path

import click


@click.command()
@click.option("--numerics", "parts", flag_value="numerics", multiple=True, help="Every op against fp64 and PyTorch.")
@click.option("--compile", "parts", flag_value="compile", multiple=True, help="Compiled for real GPUs, in budget.")
@click.option("--execute", "parts", flag_value="execute", multiple=True, help="The compiled code, run on this CPU.")
@click.option("--traffic", "parts", flag_value="traffic", multiple=True, help="Bytes, sectors and launches of a step.")
@click.option("--statistics", "parts", flag_value="statistics", multiple=True, help="Laws of what the code draws.")
@click.option("--quick", is_flag=True, help="Fewer shapes and models, for every commit.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the freshly drawn cases (default: another every time).")
@click.option("--target", help="sm_80, sm_90, sm_100, gfx942, or several with commas between (default: all).")
@click.option("--only", metavar="KERNEL", help="This op alone.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="Where the numerics run: cpu is Triton's interpreter.")  # fmt: skip
@click.option("--all", "show_all", is_flag=True, help="Print every finding, not only failures.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write every finding here.")
def verify(parts: tuple[str, ...], quick: bool, seed: int | None, target: str | None, only: str | None,
           device: str, show_all: bool, json_file: Path | None) -> int:  # fmt: skip
    """Prove the kernels right without a GPU: all five parts, or those named. Exit code 0 only if everything holds."""
    from fastae.verify.command import VerifyOptions, verify
    from fastae.verify.findings import VERIFY_PARTS

    seed = secrets.randbelow(2**31) if seed is None else seed
    targets = tuple(part.strip() for part in target.split(",")) if target else ()
    has_ptx = not targets or any(t.startswith("sm_") for t in targets)  # nothing else is executed
    every = VERIFY_PARTS if has_ptx else VERIFY_PARTS[:2]
    chosen = tuple(part for part in VERIFY_PARTS if part in (parts or every))
    return verify(VerifyOptions(chosen, quick, seed, targets, only, device), json_file, show_all)
