"""The command line, `fastae -h`. Errors: one line, exit code 2."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
import numpy as np
import torch
from numpy.typing import NDArray

import fastae
from fastae import _bench_command, _commands
from fastae._options import device_named, numbers
from fastae._ranks import Ranks, launched, own_device, restarts
from fastae.autoencoder import DenseAutoencoder
from fastae.data import check_finite, read_array, row_blocks
from fastae.outputs import check_writable, write_atomically, write_rows

_source = click.argument("data")
_key = click.option("--key", help="Which array of a .npz file.")
_force = click.option("--force", is_flag=True, help="Overwrite what is there.")
_device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
_backend = click.option("--backend", help="auto, torch or triton (default: FASTAE_BACKEND, or auto).")


def main() -> NoReturn:
    """The entry point: runs the command and turns errors into one line and exit code 2."""
    try:
        sys.exit(cli.main(standalone_mode=False))
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except click.ClickException as error:
        _fail(error.format_message())
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError, MemoryError) as error:
        _fail(str(error) or type(error).__name__)


def _fail(message: str) -> NoReturn:
    print("fastae: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(fastae.__version__)
def cli() -> None:
    """Dense autoencoders on fused kernels.

    DATA is a .npy, .npz or .csv file, an MNIST IDX file (plain or gzip), or a named set: mnist5k, digits.
    """


@cli.command()
@_source
@_key
@click.option("--features", required=True, help="Widths from the input to the code, e.g. 784,256,128.")
@click.option("--decoder-features", help="Widths from the code to the output (default: the encoder's mirrored).")
@click.option("--activation", default="relu", show_default=True)
@click.option("--code-activation", default="identity", show_default=True)
@click.option("--output-activation", default="identity", show_default=True)
@click.option("--tied", is_flag=True, help="The decoder uses the encoder's weights transposed.")
@click.option("--scale", default="none", show_default=True, help="none, unit (min-max) or standard, per feature.")
@click.option("--epochs", default=100, show_default=True)
@click.option("--batch-size", default=256, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--optimizer", default="adam", show_default=True, help="adam, adamw or sgd.")
@click.option("--weight-decay", default=0.0, show_default=True)
@click.option("--validation-split", default=0.1, show_default=True, help="Share of rows held out, drawn at random.")
@click.option("--validation", help="DATA to validate on instead.")
@click.option("--patience", type=int, help="Stop when val_loss has not fallen for so many epochs; keep the best.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Folder for a checkpoint after every epoch.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint, if there is one.")
@click.option("--seed", default=0, show_default=True)
@click.option("--precision", default="float32", show_default=True, help="float32 or bfloat16.")
@_device
@_backend
@click.option("--out", default="model", show_default=True, type=click.Path(path_type=Path), help="Folder to save to.")
@_force
@click.option("--quiet", is_flag=True, help="No progress, no table.")
def train(data: str, key: str | None, out: Path, force: bool, quiet: bool, **options: Any) -> None:
    """Train an autoencoder on DATA and save it, its loss curve and (for square images) reconstructions.

    Under `torchrun --nproc-per-node N -m fastae train ...` each process takes its share of every batch and rank 0
    writes; with --checkpoint, a restart of torchrun's (--max-restarts) goes on from the last epoch.
    """
    with launched():
        _train(data, key, out, force, quiet, options)


def _train(data: str, key: str | None, out: Path, force: bool, quiet: bool, options: dict[str, Any]) -> None:
    from fastae.scaling import Scaler
    from fastae.training import split_rows

    ranks = Ranks()
    _set_up(options["backend"])
    ranks.first(lambda: check_writable(out / "model.safetensors", force or restarts() > 0))
    callbacks = _callbacks(options, force, ranks)
    quiet = quiet or ranks.rank > 0
    widths = numbers(options["features"], "--features")
    decoder = options["decoder_features"] and numbers(options["decoder_features"], "--decoder-features")
    x = _read(data, key, widths[0])
    torch.manual_seed(options["seed"])
    model = DenseAutoencoder(
        widths,
        options["activation"],
        options["code_activation"],
        options["output_activation"],
        decoder,
        options["tied"],
    ).to(device_named(own_device(options["device"])))
    if options["validation"]:
        held_out = _read(options["validation"], key, widths[0])
    else:
        generator = torch.Generator().manual_seed(options["seed"])
        rows, held_out_rows = split_rows(len(x), options["validation_split"], generator)
        x, held_out = x[rows.numpy()], x[held_out_rows.numpy()]
    scaler = Scaler.fit(x, options["scale"])  # on the training rows alone
    model.scaler = None if options["scale"] == "none" else scaler
    x, held_out = scaler.transform(x), scaler.transform(held_out)
    if not quiet:
        print(model.summary())
    names = ("epochs", "batch_size", "lr", "optimizer", "weight_decay", "seed", "precision")
    history = model.fit(
        x, validation_split=0.0, validation_data=held_out if len(held_out) else None, callbacks=callbacks,
        progress=not quiet, **{name: options[name] for name in names},
    )  # fmt: skip
    if ranks.rank > 0:
        return
    model.save(out)
    write_atomically({out / "history.json": (json.dumps(history.to_dict(), indent=2) + "\n").encode()})
    pictures = _draw(model, history, held_out if len(held_out) else x, out)
    if not quiet:
        print(f"{_closing(history)}; saved {out}{pictures}")
    if history.stopped == "interrupted":
        sys.exit(130)


def _callbacks(options: dict[str, Any], force: bool, ranks: Ranks) -> list[fastae.Callback]:
    callbacks: list[fastae.Callback] = []
    if options["patience"] is not None:
        callbacks.append(fastae.EarlyStopping(options["patience"]))
    if options["checkpoint"] is not None:
        checkpoint = fastae.Checkpoint(options["checkpoint"], resume=options["resume"] or restarts() > 0)
        if ranks.size > 1 and not checkpoint.resume:  # a restart before the first epoch ends must not find an older one
            ranks.first(lambda: _start_over(checkpoint.path, force))
        callbacks.append(checkpoint)
    elif options["resume"]:
        raise click.UsageError("--resume needs --checkpoint FOLDER")
    return callbacks


def _start_over(checkpoint: Path, force: bool) -> None:
    if checkpoint.exists() and not force:
        raise ValueError(f"{checkpoint} exists; add --resume to go on from it, or --force to start over")
    checkpoint.unlink(missing_ok=True)


def _closing(history: fastae.History) -> str:
    if not history.epochs:
        return "interrupted before the first epoch ended"
    val_loss = f", val_loss {history.val_loss[-1]:.6g}" if history.val_loss else ""
    stopped = f" ({history.stopped})" if history.stopped else ""
    return f"{history.epochs} epochs{stopped}: loss {history.loss[-1]:.6g}{val_loss}"


def _draw(model: DenseAutoencoder, history: fastae.History, x: NDArray[Any], out: Path) -> str:
    """Draw what can be drawn; what to add to the closing line where matplotlib is missing."""
    from fastae.plots import image_side, plot_reconstructions

    try:
        history.plot(out / "loss.png")
        if image_side(x.shape[1]):
            plot_reconstructions(x[:10], model(x[:10]), out / "reconstructions.png")
    except ImportError as error:
        return f" (no pictures: {error})"
    return ""


def _transform(name: str, summary: str, function: Callable[[DenseAutoencoder, NDArray[Any]], NDArray[Any]]) -> None:
    """Register a command that maps the rows of DATA through a saved model into a file."""

    @cli.command(name, help=summary)
    @click.argument("model", type=click.Path(path_type=Path))
    @_source
    @_key
    @click.option("--out", required=name != "score", type=click.Path(path_type=Path), help=".npy or .csv file.")
    @_force
    @_device
    @_backend
    def command(
        model: Path, data: str, key: str | None, out: Path | None, force: bool, device: str, backend: str | None
    ) -> None:
        _set_up(backend)
        if out is not None:
            check_writable(out, force)
        ae = fastae.load(model, device_named(device))
        x = _read(data, key, ae.features[0])
        rows = (function(ae, x if ae.scaler is None else ae.scaler.transform(x)) for x in row_blocks(x, 65536))
        if out is not None:
            write_rows(out, rows, len(x))
            return
        for block in rows:
            np.savetxt(sys.stdout, block, fmt="%.9g")


def _reconstruct(ae: DenseAutoencoder, x: NDArray[Any]) -> NDArray[Any]:
    return ae(x) if ae.scaler is None else ae.scaler.inverse_transform(ae(x))


_transform("encode", "Write the codes of DATA: [rows, code].", lambda ae, x: ae.encode(x))
_transform("reconstruct", "Write the reconstructions of DATA, in DATA's own units: [rows, features].", _reconstruct)
_transform("score", "Write the mean squared error of each row, after scaling: [rows]; to stdout without --out.",
           lambda ae, x: ae.score(x))  # fmt: skip


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
def info(model: Path) -> None:
    """Describe a saved model."""
    print(fastae.load(model).summary())


@cli.command()
@click.option("--numerics", "parts", flag_value="numerics", multiple=True, help="Every op against fp64 and PyTorch.")
@click.option("--compile", "parts", flag_value="compile", multiple=True, help="Compiled for real GPUs, in budget.")
@click.option("--execute", "parts", flag_value="execute", multiple=True, help="The compiled code, run on this CPU.")
@click.option("--traffic", "parts", flag_value="traffic", multiple=True, help="Bytes, sectors and launches of a step.")
@click.option("--quick", is_flag=True, help="Fewer shapes and models: under a minute instead of ten.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the freshly drawn cases (default: another every time).")
@click.option("--target", help="sm_80, sm_90, sm_100, gfx942, or several with commas between (default: all).")
@click.option("--only", metavar="KERNEL", help="This op alone.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="Where the numerics run: cpu is Triton's interpreter.")  # fmt: skip
@click.option("--all", "show_all", is_flag=True, help="Print every finding, not only failures.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write every finding here.")
def verify(parts: tuple[str, ...], quick: bool, seed: int | None, target: str | None, only: str | None,
           device: str, show_all: bool, json_file: Path | None) -> int:  # fmt: skip
    """Prove the kernels right without a GPU: all four parts, or those named. Exit code 0 only if everything holds."""
    from fastae.verify.command import Options, verify
    from fastae.verify.findings import PARTS

    seed = secrets.randbelow(2**31) if seed is None else seed
    targets = tuple(part.strip() for part in target.split(",")) if target else ()
    every = PARTS if not targets or any(t.startswith("sm_") for t in targets) else PARTS[:2]  # only PTX is executed
    chosen = tuple(part for part in PARTS if part in (parts or every))
    return verify(Options(chosen, quick, seed, targets, only, device), json_file, show_all)


cli.add_command(_commands.explain)
cli.add_command(_bench_command.bench)
cli.add_command(_commands.profile)


def _read(source: str, key: str | None, width: int) -> NDArray[Any]:
    x = read_array(source, key if source.endswith(".npz") else None) if key else read_array(source)
    if x.shape[1] != width:
        raise ValueError(f"{source} must have {width} features, as the model has; got {x.shape[1]}")
    check_finite(x, source)
    return x


def _set_up(backend: str | None) -> None:
    if backend is not None:
        fastae.set_backend(backend)
