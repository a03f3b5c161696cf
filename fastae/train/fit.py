"""`fit`: the training loop. Data stays resident, the loop never waits for the device inside an epoch."""

from __future__ import annotations

import logging
import math
import operator
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastae.data.arrays import CHUNK_VALUES, check_all_finite, check_rows, to_tensor
from fastae.engine.all_reduce import Mean
from fastae.engine.train_step import TrainStep, why_not
from fastae.models.dense import DenseAutoencoder
from fastae.nn.arguments import is_dtensor, nearest
from fastae.nn.losses import mse_loss
from fastae.train.callbacks import Checkpoint
from fastae.train.distributed import Ranks, digest
from fastae.train.history import History
from fastae.train.progress import Progress
from fastae.train.run import Callback, Run

logger = logging.getLogger(__name__)

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.float32,
    "float64": torch.float64,
}  # -> dtype of the parameters


def fit(
    model: DenseAutoencoder,
    x: NDArray[Any] | Tensor,
    *,
    epochs: int = 100,
    batch_size: int = 256,
    lr: float = 1e-3,
    optimizer: str | torch.optim.Optimizer = "adam",
    weight_decay: float = 0.0,
    validation_split: float = 0.1,
    validation_data: NDArray[Any] | Tensor | None = None,
    seed: int = 0,
    precision: str = "float32",
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> History:
    """Train `model` to reconstruct `x` by its mean squared error; returns the `History` of the finished epochs.

    Args:
        x: [rows, features] floating-point numpy array, memory map or tensor; copied once to the model's device and
        dtype.
        epochs, batch_size: passes over the data, and rows per step (the last step of an epoch takes what is left).
        lr, weight_decay: of the optimizer.
        optimizer: "adam", "adamw" or "sgd" (fused where PyTorch has it), or an optimizer over the model's parameters.
        validation_split: the share of rows, drawn at random from `seed`, held out for val_loss; 0 for none.
        validation_data: rows for val_loss instead, [rows, features].
        seed: of the split and the order of rows. The same seed, data, machine and thread count give the same bits.
        precision: "float32"; "bfloat16" (computes in bf16, keeps fp32 parameters); "float64" for a float64 model.
        callbacks: `EarlyStopping`, `Checkpoint` or your own `Callback`s, called in this order but a `Checkpoint` last.
        progress: a live bar with loss, val_loss and rows/s on a terminal, about ten lines elsewhere.

    Ctrl-C ends training early: the model stays as it is and the history says "interrupted".

    Where `torch.distributed.init_process_group` was called, every process must call `fit`, with the same x and options:
    each takes its share of every batch, so `batch_size` counts the rows of all, and all end with the weights of rank 0
    trained as one process would have trained them. Callbacks are called everywhere, a `Checkpoint` writes on rank 0.
    Ctrl-C then ends the processes: a checkpoint is where to go on.

    Raises TypeError or ValueError for data or options that do not fit, and FloatingPointError if the loss stops being
    finite; the model is then back at the last finished epoch, which is also what the last checkpoint holds.
    """
    epochs, batch_size, seed = (
        _whole("epochs", epochs),
        _whole("batch_size", batch_size),
        _whole("seed", seed, least=None),
    )
    lr, weight_decay = float(lr), float(weight_decay)
    _check_options(lr, weight_decay, validation_split, precision)
    like = next(model.parameters())
    if any(map(is_dtensor, model.parameters())):
        raise TypeError(
            "fit: parameters must be plain tensors; got DTensors: call fit before fully_shard, or train the sharded "
            "model in a loop of your own, model.loss(x).backward() and optimizer.step()"
        )
    made = _optimizer(optimizer, model, lr, weight_decay)
    callbacks = sorted(
        callbacks, key=lambda callback: isinstance(callback, Checkpoint)
    )  # last: it holds the others' state
    if like.dtype != PRECISIONS[precision]:
        raise ValueError(
            f"fit: precision {precision!r} needs {str(PRECISIONS[precision])[6:]} parameters; got {str(like.dtype)[6:]}"
        )
    data = _checked_data(x, model, like, "fit: x")
    generator = torch.Generator().manual_seed(seed)
    if validation_data is not None:
        train, validation = data, _checked_data(validation_data, model, like, "fit: validation_data")
    else:
        train_rows, validation_rows = split_rows(len(data), validation_split, generator)
        validation = data[validation_rows.to(data.device)]
        train = data[train_rows.to(data.device)] if len(validation) else data  # all rows need no second copy
    if batch_size > len(train):
        raise ValueError(f"fit: batch_size must be at most the {len(train)} training rows; got {batch_size}")
    settings = {
        "config": model.config(), "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "seed": seed,
        "optimizer": optimizer if isinstance(optimizer, str) else type(optimizer).__name__, "precision": precision,
        "training rows": len(train), "validation rows": len(validation),
    }  # fmt: skip
    ranks = Ranks()
    if ranks.size > 1:
        ranks.check_alike(
            "fit", settings | {"epochs": epochs, "x": digest(train), "validation data": digest(validation)}
        )
        ranks.spread(model.state_dict().values())
    run = Run(model, made, generator, callbacks, settings, len(validation) > 0)
    for callback in callbacks:
        callback.on_train_begin(run)
    model.train()
    try:
        _train(run, ranks, train, validation, epochs, batch_size, precision, progress)
    except KeyboardInterrupt:
        if ranks.size > 1:  # in the middle of a batch, which the others can neither finish nor leave
            raise
        run.stop("interrupted")
    for callback in callbacks:
        callback.on_train_end(run)
    return run.history


def _train(
    run: Run, ranks: Ranks, train: Tensor, validation: Tensor, epochs: int, batch_size: int, precision: str,
    progress: bool,
) -> None:  # fmt: skip
    steps = math.ceil(len(train) / batch_size)
    losses = train.new_empty(steps)
    cast = torch.autocast(train.device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
    take_step = _step_on(run, ranks, train, -(-batch_size // ranks.size), precision, cast)
    with Progress(epochs, steps, run.history.epochs, enabled=progress and ranks.rank == 0) as bar:
        while run.history.epochs < epochs and run.history.stopped is None:
            good = [p.detach().clone() for p in run.model.parameters()]
            started = time.perf_counter()
            order = torch.randperm(len(train), generator=run.generator).to(train.device)
            for step, rows in enumerate(order.split(batch_size)):
                losses[step] = take_step(ranks.share(rows))
                bar.step(step)
            step_losses = losses.tolist()  # the epoch's one wait for the device
            seconds = time.perf_counter() - started
            val_loss = mean_squared_error(run.model, validation, cast, ranks) if run.has_validation else None
            _check_finite(run, step_losses, val_loss, good)
            last_rows = len(train) - (steps - 1) * batch_size
            total = math.fsum(step_losses[:-1]) * batch_size + step_losses[-1] * last_rows
            run.history.loss.append(total / len(train))
            if val_loss is not None:
                run.history.val_loss.append(val_loss)
            run.history.rows_per_s.append(len(train) / seconds)
            for callback in run.callbacks:
                callback.on_epoch_end(run)
            run.history.stopped = next(filter(None, ranks.all(run.history.stopped)), None)
            bar.epoch(run.history)


def _step_on(
    run: Run, ranks: Ranks, train: Tensor, batch_size: int, precision: str, cast: AbstractContextManager[Any]
) -> Callable[[Tensor], Tensor]:
    """What takes a step on this rank's rows, and returns the loss of all: a `TrainStep`, or autograd's loop."""
    reason = why_not(run.model)
    if reason is None:
        step = TrainStep(run.model, run.optimizer, batch_size, precision, ranks.group)
        data = train.to(step.dtype)
        return lambda rows: step(data, rows)
    if ranks.rank == 0:
        logger.warning("fit trains this model layer by layer through autograd, not by a TrainStep: %s", reason)
    batch = train.new_empty(batch_size, train.shape[1])  # one buffer: a step is over before the next batch is gathered
    trainable = [p for p in run.model.parameters() if p.requires_grad]
    mean = None if ranks.group is None else Mean(trainable, ranks.group)

    def autograd_step(rows: Tensor) -> Tensor:
        run.optimizer.zero_grad(set_to_none=True)
        loss = train.new_zeros(())
        if len(rows):
            with cast:
                loss = run.model.loss(torch.index_select(train, 0, rows, out=batch[: len(rows)]))
            loss.backward()
        if mean is not None:
            mean(loss.detach(), [p.grad for p in trainable], len(rows))
            loss = mean.loss
        run.optimizer.step()
        return loss.detach()

    return autograd_step


def mean_squared_error(
    model: DenseAutoencoder, x: Tensor, cast: AbstractContextManager[Any] | None = None, ranks: Ranks | None = None
) -> float:
    """The mean over all values of x [rows, features] of the squared reconstruction error, a chunk of rows at a time.

    Each of the `ranks` computes its share of x, which is the same on all, and so is the result.
    """
    mine = x if ranks is None else ranks.share(x)
    step = max(1, CHUNK_VALUES // max(model.features + model.decoder_features))
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    with torch.no_grad(), cast or nullcontext():
        for rows in mine.split(step) if len(mine) else ():
            total += mse_loss(model(rows), rows).double() * len(rows)
    return (total if ranks is None else ranks.sum(total)).item() / len(x)


def split_rows(rows: int, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(training rows, validation rows): indices, the second a random `fraction` of them, each in rising order."""
    held_out = round(rows * fraction)
    if fraction > 0 and not 0 < held_out < rows:
        raise ValueError(
            f"fit: validation_split must leave rows on both sides; got {fraction} of {rows} rows (0 for no validation)"
        )
    order = torch.randperm(rows, generator=generator) if held_out else torch.arange(rows)
    return order[held_out:].sort().values, order[:held_out].sort().values


def _check_finite(run: Run, step_losses: list[float], val_loss: float | None, good: list[Tensor]) -> None:
    """A loss or weight that is not finite ends training, with the weights of the last finished epoch."""
    epoch = run.history.epochs + 1
    parameters = list(run.model.parameters())
    for step, loss in enumerate(step_losses, 1):
        if not math.isfinite(loss):
            what = f"{loss} at epoch {epoch}, step {step} of {len(step_losses)}"
            break
    else:
        finite = all(torch.stack([p.isfinite().all() for p in parameters]).tolist())
        if finite and (val_loss is None or math.isfinite(val_loss)):
            return
        what = f"weights or a val_loss that are not, after epoch {epoch}, step {len(step_losses)}"
    with torch.no_grad():
        for parameter, value in zip(parameters, good, strict=True):
            parameter.copy_(value)
    raise FloatingPointError(
        f"fit: the loss must stay finite; got {what}. The model is back at the end of epoch {epoch - 1}; try a smaller "
        "lr, or scale the data"
    )


def _checked_data(x: NDArray[Any] | Tensor, model: DenseAutoencoder, like: Tensor, name: str) -> Tensor:
    check_rows(x, model.features[0], name)
    if len(x) == 0:
        raise ValueError(f"{name} must have at least one row; got {list(x.shape)}")
    check_all_finite(x, name)
    data = to_tensor(x, like).detach()
    check_all_finite(data, f"{name} as {str(like.dtype)[6:]}")  # 1e39 is finite in float64 alone
    return data


def _whole(name: str, value: int, least: int | None = 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"fit: {name} must be a whole number; got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"fit: {name} must be at least {least}; got {number}")
    return number


def _check_options(lr: float, weight_decay: float, validation_split: float, precision: str) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"fit: lr must be a positive number; got {lr}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"fit: weight_decay must be 0 or a positive number; got {weight_decay}")
    if not 0 <= validation_split < 1:
        raise ValueError(f"fit: validation_split must be at least 0 and below 1; got {validation_split}")
    if precision not in PRECISIONS:
        valid = ", ".join(PRECISIONS)
        raise ValueError(f"fit: precision must be one of {valid}; got {precision!r}{nearest(precision, PRECISIONS)}")


def _optimizer(
    name: str | torch.optim.Optimizer, model: DenseAutoencoder, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    if isinstance(name, torch.optim.Optimizer):
        own = {id(parameter) for parameter in model.parameters()}
        if not any(id(parameter) in own for group in name.param_groups for parameter in group["params"]):
            raise ValueError("fit: optimizer must be over the model's parameters; got one that holds none of them")
        return name
    if not isinstance(name, str):
        raise TypeError(f"fit: optimizer must be a name or an optimizer over the model's parameters; got {name!r}")
    if name not in OPTIMIZERS:
        valid = ", ".join(OPTIMIZERS)
        raise ValueError(f"fit: optimizer must be one of {valid}; got {name!r}{nearest(name, OPTIMIZERS)}")
    parameters = list(model.parameters())
    kind = parameters[0].device.type
    options = {"fused": kind in ("cpu", "cuda")}  # 3 to 5 times faster than the default on a CPU
    if kind == "cuda" and name != "sgd":
        options["capturable"] = True  # into the graph of a TrainStep
    return OPTIMIZERS[name](parameters, lr=lr, weight_decay=weight_decay, **options)
