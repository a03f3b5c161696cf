"""The command `fastae train`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import torch
from numpy.typing import NDArray

import fastae
from fastae.cli.options import backend, device, device_named, force, key, numbers, read, set_up, source
from fastae.data.scaling import Scaler
from fastae.data.writers import check_writable, write_atomically
from fastae.models.dense import DenseAutoencoder
from fastae.train.distributed import Ranks, launched, own_device, restarts
from fastae.train.fit import split_rows
from fastae.train.plots import image_side, plot_reconstructions


@click.command()
@source
@key
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
@device
@backend
@click.option("--out", default="model", show_default=True, type=click.Path(path_type=Path), help="Folder to save to.")
@force
@click.option("--quiet", is_flag=True, help="No progress, no table.")
def train(data: str, key: str | None, out: Path, force: bool, quiet: bool, **options: Any) -> None:
    """Train an autoencoder on DATA and save it, its loss curve and (for square images) reconstructions.

    Under `torchrun --nproc-per-node N -m fastae train ...` each process takes its share of every batch and rank 0
    writes; with --checkpoint, a restart of torchrun's (--max-restarts) goes on from the last epoch.
    """
    with launched():
        _train(data, key, out, force, quiet, options)


def _train(data: str, key: str | None, out: Path, force: bool, quiet: bool, options: dict[str, Any]) -> None:
    ranks = Ranks()
    set_up(options["backend"])
    ranks.on_rank_0(lambda: check_writable(out / "model.safetensors", force or restarts() > 0))
    callbacks = _callbacks(options, force, ranks)
    quiet = quiet or ranks.rank > 0
    widths = numbers(options["features"], "--features")
    decoder = options["decoder_features"] and numbers(options["decoder_features"], "--decoder-features")
    x = read(data, key, widths[0])
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
        held_out = read(options["validation"], key, widths[0])
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
            ranks.on_rank_0(lambda: _start_over(checkpoint.path, force))
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
    try:
        history.plot(out / "loss.png")
        if image_side(x.shape[1]):
            plot_reconstructions(x[:10], model(x[:10]), out / "reconstructions.png")
    except ImportError as error:
        return f" (no pictures: {error})"
    return ""
