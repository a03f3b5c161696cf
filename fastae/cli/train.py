"""The command `fastae train`."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
import numpy as np
import torch
from click.core import ParameterSource
from numpy.typing import NDArray

import fastae
from fastae.cli.options import backend, device, device_named, force, is_npz, key, numbers, read, set_up, source
from fastae.data.scaling import Scaler
from fastae.data.writers import check_new_folder, new_folder, write_atomically
from fastae.models.base import Autoencoder
from fastae.models.conv import ConvAutoencoder
from fastae.models.dense import DenseAutoencoder
from fastae.models.objective import noisy
from fastae.nn.arguments import seed_number
from fastae.train.distributed import Ranks, launched, own_device, restarts
from fastae.train.plots import is_drawable, plot_reconstructions, plot_samples, square_image
from fastae.train.rows import split_rows

CHECKPOINT = "checkpoint.safetensors"
_WIDTHS = ("features", "decoder_features", "image", "channels")  # options that are whole numbers with commas
LARGE = 100.0  # root mean square of data above which scaling is worth a word


@click.command()
@source
@key
@click.option("--features", help="Widths from the input to the code, e.g. 784,256,128.")
@click.option("--decoder-features", help="Widths from the code to the output (default: the encoder's mirrored).")
@click.option(
    "--image", help="Of convolutions, instead of --features: channels,height,width of DATA's rows, e.g. 1,28,28."
)
@click.option("--channels", help="With --image: channels of the maps, a pooling for each, e.g. 32,32.")
@click.option("--code", type=int, help="With --image: width of a dense code (default: the last map is the code).")
@click.option("--activation", default="relu", show_default=True)
@click.option("--code-activation", default="identity", show_default=True)
@click.option("--output-activation", default="identity", show_default=True)
@click.option("--likelihood", help="mse (default), mae, huber, gaussian, bernoulli (default with --image), poisson or "
              "nb; options as in huber:delta=2 and gaussian:scale=learned.")  # fmt: skip
@click.option("--corrupt", help="Noise on the rows of each step: mask:0.3, gaussian:0.4, salt_pepper:0.2, swap:0.15, "
              "drop:0.5; options as in gaussian:0.4,low=0,high=1.")  # fmt: skip
@click.option("--dropout", default=0.0, show_default=True, help="Share of the hidden outputs that a step puts to 0.")
@click.option(
    "--bottleneck", help="What is asked of the code: variational:beta=0.5, l1:0.001, kl_sparse:0.05, contractive:0.01."
)
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
@click.option("--precision", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]))
@device
@backend
@click.option("--out", default="model", show_default=True, type=click.Path(path_type=Path), help="Folder to save to.")
@force
@click.option("--quiet", is_flag=True, help="No progress, no table.")
def train(data: str, key: str | None, out: Path, force: bool, quiet: bool, **options: Any) -> None:
    """Train an autoencoder on DATA and save it, its loss curve and (for images) reconstructions.

    A dense one, of --features; or a convolutional one, of --image and --channels.

    Ctrl-C, SIGTERM and SIGHUP end training early; what has been trained is saved. Under `torchrun --nproc-per-node N -m
    fastae train ...` each process takes its share of every batch and rank 0 writes; with --checkpoint, a restart of
    torchrun's (--max-restarts) goes on from the last epoch.
    """
    with launched():
        _train(data, key, out, force or restarts() > 0, quiet, options)


def _train(data: str, key: str | None, out: Path, force: bool, quiet: bool, options: dict[str, Any]) -> None:
    ranks = Ranks()
    set_up(options["backend"])
    callbacks = _checked(out, force, options, ranks)
    quiet = quiet or ranks.rank > 0
    make = _model(options)
    width = make(device="meta").in_features
    x = read(data, key, width)
    torch.manual_seed(seed_number("train", options["seed"]))
    model = make().to(device_named(own_device(options["device"])))
    if options["validation"]:
        held_out = read(options["validation"], key if is_npz(options["validation"]) else None, width)
    else:
        generator = torch.Generator().manual_seed(options["seed"])
        rows, held_out_rows = split_rows(len(x), options["validation_split"], generator)
        x, held_out = x[rows.numpy()], x[held_out_rows.numpy()]
    scaler = Scaler.fit(x, options["scale"])  # on the training rows alone
    model.scaler = None if options["scale"] == "none" else scaler
    x, held_out = scaler.transform(x), scaler.transform(held_out)
    if not quiet:
        print(model.summary())
        _hint(x)
    names = ("epochs", "batch_size", "lr", "optimizer", "weight_decay", "seed", "precision")
    signals = _Signals(ranks)
    with signals:
        history = model.fit(
            x, validation_split=0.0, validation_data=held_out if len(held_out) else None, callbacks=callbacks,
            progress=not quiet, **{name: options[name] for name in names},
        )  # fmt: skip
        signals.ignore()
        if ranks.rank > 0:
            return
        if history.epochs:
            _save(model, history, out, force or _same(out, options["checkpoint"]))
    if not history.epochs:
        print("interrupted before the first epoch ended; nothing was saved", file=sys.stderr)
    else:
        pictures = _draw(model, history, held_out if len(held_out) else x, out)
        if not quiet:
            print(f"{_closing(history)}; saved {out}{pictures}")
    if history.stopped == "interrupted":
        sys.exit(128 + signals.received)


def _model(options: dict[str, Any]) -> Callable[..., Autoencoder]:
    """Return what makes the model: its widths are known before the data is read."""
    given = {name: numbers(options[name], f"--{name.replace('_', '-')}") for name in _WIDTHS if options[name]}
    names = {name: options[name] for name in ("activation", "code_activation", "output_activation")}
    if options["likelihood"] is not None:
        names["likelihood"] = options["likelihood"]
    names |= {name: options[name] for name in ("corrupt", "bottleneck") if options[name] is not None}
    if ("features" in given) == ("image" in given):
        raise click.UsageError("give --features, or --image with --channels: one of the two")
    of_other = ("channels", "code") if "features" in given else ("decoder_features", "tied", "dropout")
    for name in of_other:
        if options[name]:
            other, own = ("--image", "--features") if "features" in given else ("--features", "--image")
            raise click.UsageError(f"--{name.replace('_', '-')} goes with {other}, not with {own}")
    if "features" in given:
        return partial(DenseAutoencoder, given["features"], decoder_features=given.get("decoder_features"),
                       tied=options["tied"], dropout=options["dropout"], **names)  # fmt: skip
    if "channels" not in given:
        raise click.UsageError("--image needs --channels, e.g. 32,32")
    return partial(ConvAutoencoder, given["image"], given["channels"], options["code"], **names)


def _save(model: Autoencoder, history: fastae.History, out: Path, replace: bool) -> None:
    with new_folder(out, replace, "model.safetensors") as folder:
        model.save(folder)
        write_atomically({folder / "history.json": (json.dumps(history.to_dict(), indent=2) + "\n").encode()})


def _same(out: Path, checkpoint: Path | None) -> bool:
    return checkpoint is not None and out.resolve() == checkpoint.resolve()


def _checked(out: Path, force: bool, options: dict[str, Any], ranks: Ranks) -> list[fastae.Callback]:
    """The callbacks, after every check that needs neither data nor model."""
    context = click.get_current_context()
    if options["validation"] and context.get_parameter_source("validation_split") == ParameterSource.COMMANDLINE:
        raise click.UsageError("--validation and --validation-split exclude each other")
    if not 0 <= options["validation_split"] < 1:
        raise ValueError(f"--validation-split must be at least 0 and below 1; got {options['validation_split']}")
    callbacks: list[fastae.Callback] = []
    if options["patience"] is not None:
        if not options["validation"] and options["validation_split"] == 0:
            raise click.UsageError("--patience needs rows to validate on: --validation-split above 0 or --validation")
        callbacks.append(fastae.EarlyStopping(options["patience"]))
    folder = options["checkpoint"]
    if folder is not None:
        resume = options["resume"] or restarts() > 0
        checkpoint = fastae.Checkpoint(folder, resume=resume, overwrite=force)
        if not resume:
            ranks.on_rank_0(lambda: _check_free(checkpoint.path, force, ranks))
        if (done := ranks.on_rank_0(lambda: checkpoint.epochs)) > options["epochs"]:
            raise ValueError(
                f"--epochs must be at least {done}, as many as the checkpoint has; got {options['epochs']}"
            )
        callbacks.append(checkpoint)
    elif options["resume"]:
        raise click.UsageError("--resume needs --checkpoint FOLDER")
    ranks.on_rank_0(lambda: check_new_folder(out, force, but=[CHECKPOINT] if _same(out, folder) else ()))
    return callbacks


def _check_free(checkpoint: Path, force: bool, ranks: Ranks) -> None:
    if checkpoint.exists() and not force:
        raise ValueError(f"--checkpoint: {checkpoint} exists; add --resume to go on from it, or --force to start over")
    if ranks.size > 1:  # a restart before the first epoch ends must not find an older one
        checkpoint.unlink(missing_ok=True)


def _hint(x: NDArray[Any]) -> None:
    size = float(np.sqrt(np.mean(np.square(x[:10_000], dtype=np.float64))))
    if size > LARGE:
        print(f"note: the rows' values are about {size:.2g} in size; --scale standard or unit trains better")


# ---------------------------------------------------------------- signals


class _Signals:
    """While it is entered, SIGTERM and SIGHUP are as Ctrl-C. Several processes are torchrun's to end."""

    def __init__(self, ranks: Ranks) -> None:
        self.received = int(signal.SIGINT)
        names = [n for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)] if ranks.size == 1 else []
        numbers = [getattr(signal, name) for name in names]
        self._numbers = [n for n in numbers if signal.getsignal(n) is signal.SIG_DFL]  # nohup, say, ignores one
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, _: FrameType | None) -> NoReturn:
        self.received = number
        raise KeyboardInterrupt

    def ignore(self) -> None:
        """From now on they and Ctrl-C do nothing: what has been trained is being saved."""
        for number in (signal.SIGINT, *self._numbers):
            before = signal.signal(number, signal.SIG_IGN)
            self._before.setdefault(number, before)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- the end


def _closing(history: fastae.History) -> str:
    stopped = f" ({history.stopped})" if history.stopped else ""
    epoch = history.best_epoch or history.epochs
    val_loss = f"val_loss {history.val_loss[epoch - 1]:.6g}" if history.val_loss else ""
    if history.best_epoch:
        return f"{history.epochs} epochs{stopped}; best epoch {epoch}: {val_loss}"
    return f"{history.epochs} epochs{stopped}: {', '.join(filter(None, [f'loss {history.loss[-1]:.6g}', val_loss]))}"


def _draw(model: Autoencoder, history: fastae.History, x: NDArray[Any], out: Path) -> str:
    """Draw what can be drawn; what to add to the closing line where matplotlib is missing."""
    try:
        history.plot(out / "loss.png")
        image = model.image if isinstance(model, ConvAutoencoder) else square_image(x.shape[1])
        if image is not None and is_drawable(image):
            rows = _spread(x, 10)
            given = rows if model.corrupt is None else noisy(model.corrupt, torch.from_numpy(rows).float()).numpy()
            spoilt = None if model.corrupt is None else given
            plot_reconstructions(rows, model(given), out / "reconstructions.png", image, spoilt)
            if model.variational is not None:
                plot_samples(_flat(model.sample(60)), out / "samples.png", image)
                plot_samples(_interpolation(model, x), out / "interpolation.png", image)
    except ImportError as error:
        return f" (no pictures: {error})"
    return ""


def _spread(x: NDArray[Any], count: int) -> NDArray[Any]:
    """So many rows, from the first to the last: files are often sorted."""
    return x[np.linspace(0, len(x) - 1, count).astype(int)]


def _flat(images: torch.Tensor) -> NDArray[Any]:
    return images.flatten(1).cpu().float().numpy()


def _interpolation(model: Autoencoder, x: NDArray[Any]) -> NDArray[Any]:
    """Ten reconstructions on the straight way from the code of one row to that of another, for four pairs."""
    codes = model.encode(_spread(x, 8))
    steps = np.linspace(0, 1, 10, dtype=codes.dtype)[:, None]
    lines = [(1 - steps) * first + steps * last for first, last in zip(codes[::2], codes[1::2], strict=True)]
    return np.asarray(model.decode(np.concatenate(lines))).reshape(10 * len(lines), -1)
