"""`fit`: the training loop. Data stays resident, the loop never waits for the device inside an epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from fastae_kernels.elementwise import LossKind
from numpy.typing import NDArray
from torch import Tensor, nn

from fastae.data.arrays import CHUNK_VALUES, check_all_finite, check_rows, to_tensor
from fastae.engine.parameters import is_dense
from fastae.engine.train_step import Trainable, TrainStep
from fastae.nn.arguments import is_dtensor, nearest, seed_number, whole_number
from fastae.nn.log_likelihood import check_support
from fastae.nn.losses import eager_loss
from fastae.train.checkpoint import Checkpoint
from fastae.train.distributed import Ranks, digest
from fastae.train.history import History
from fastae.train.progress import Progress
from fastae.train.run import Callback, Run

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.float32,
    "float64": torch.float64,
}  # -> dtype of the parameters


class TrainableModel(Trainable, Protocol):
    """Model that `fit` can train: an `nn.Module` that hands over its program and knows its widths and its loss."""

    training: bool
    scaler: Any
    trained: dict[str, Any] | None

    @property
    def in_features(self) -> int: ...

    @property
    def widest(self) -> int: ...

    @property
    def kind(self) -> LossKind: ...

    @property
    def loss_parameter(self) -> nn.Parameter | None: ...

    def config(self) -> dict[str, Any]: ...

    def loss(self, x: Tensor, target: Tensor | None = None) -> Tensor: ...

    def logits(self, x: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def __call__(self, x: Any) -> Any: ...


@torch.inference_mode(False)
@torch.enable_grad()
def fit(
    model: TrainableModel,
    x: NDArray[Any] | Tensor,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    optimizer: str | torch.optim.Optimizer,
    weight_decay: float,
    validation_split: float,
    validation_data: NDArray[Any] | Tensor | None,
    seed: int,
    precision: str,
    callbacks: Sequence[Callback],
    progress: bool,
) -> History:
    """The training loop of `Autoencoder.fit`, whose docstring says what it does."""
    epochs, batch_size, seed = (
        whole_number("fit", "epochs", epochs, 1),
        whole_number("fit", "batch_size", batch_size, 1),
        seed_number("fit", seed),
    )
    lr, weight_decay = float(lr), float(weight_decay)
    _check_options(lr, weight_decay, precision)
    like = next(model.parameters())
    if any(map(is_dtensor, model.parameters())):
        raise TypeError(
            "fit: parameters must be plain tensors; got DTensors: call fit before fully_shard, or train the sharded "
            "model in a loop of your own, model.loss(x).backward() and optimizer.step()"
        )
    made = _optimizer(optimizer, model, lr, weight_decay)
    # a Checkpoint last: it holds the others' state
    callbacks = sorted(_checked_callbacks(callbacks), key=lambda callback: isinstance(callback, Checkpoint))
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
    batch_size = min(batch_size, len(train))
    settings = {
        "config": model.config(), "scale": "none" if model.scaler is None else model.scaler.kind,
        "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "seed": seed,
        "optimizer": optimizer if isinstance(optimizer, str) else type(optimizer).__name__, "precision": precision,
        "training rows": len(train), "validation rows": len(validation),
    }  # fmt: skip
    ranks = Ranks()
    if ranks.size > 1 or any(isinstance(callback, Checkpoint) for callback in callbacks):
        settings |= {"x": digest(train), "validation data": digest(validation)}
    if ranks.size > 1:
        ranks.check_alike("fit", settings | {"epochs": epochs})
        ranks.broadcast(model.state_dict().values())
    run = Run(model, made, generator, callbacks, settings, len(validation) > 0)
    for callback in callbacks:
        callback.on_train_begin(run)
    mode = model.training
    model.train()
    try:
        _train(run, ranks, train, validation, epochs, batch_size, precision, progress)
    except KeyboardInterrupt:
        if ranks.size > 1:  # in the middle of a batch, which the others can neither finish nor leave
            raise
        run.stop("interrupted")
    finally:
        model.train(mode)
    for callback in callbacks:
        callback.on_train_end(run)
    model.trained = record(run)
    return run.history


def record(run: Run) -> dict[str, Any]:
    """How a model was trained, as `fastae info` tells it."""
    history = run.history
    watched = history.val_loss or history.loss
    lowest = min(range(len(watched)), key=watched.__getitem__, default=None)
    best = lowest if history.best_epoch is None else history.best_epoch - 1
    names = ("training rows", "validation rows", "batch_size", "lr", "weight_decay", "optimizer", "seed", "precision")
    return {
        **{name.replace(" ", "_"): run.settings[name] for name in names},
        "epochs": history.epochs,
        "stopped": history.stopped,
        "best_epoch": None if best is None else best + 1,
        "best_loss": None if best is None else watched[best],
        "versions": {"torch": str(torch.__version__)},
    }


def _train(
    run: Run, ranks: Ranks, train: Tensor, validation: Tensor, epochs: int, batch_size: int, precision: str,
    progress: bool,
) -> None:  # fmt: skip
    steps = math.ceil(len(train) / batch_size)
    losses = train.new_empty(steps)
    cast = torch.autocast(train.device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
    step = TrainStep(run.model, run.optimizer, -(-batch_size // ranks.size), precision, ranks.group)
    data = train.to(step.dtype)
    with Progress(epochs, steps, run.history.epochs, enabled=progress and ranks.rank == 0) as bar:
        while run.history.epochs < epochs and run.history.stopped is None:
            good = {name: t.detach().clone() for name, t in run.model.state_dict().items()}
            started = time.perf_counter()
            order = torch.randperm(len(train), generator=run.generator).to(train.device)
            for number, rows in enumerate(order.split(batch_size)):
                losses[number] = step(data, ranks.share(rows))
                bar.step(number)
            step_losses = losses.tolist()  # the epoch's one wait for the device
            seconds = time.perf_counter() - started
            val_loss = mean_loss(run.model, validation, cast, ranks) if run.has_validation else None
            _check_finite(run, step_losses, val_loss, good)
            last_rows = len(train) - (steps - 1) * batch_size
            total = math.fsum(step_losses[:-1]) * batch_size + step_losses[-1] * last_rows
            run.history.loss.append(total / len(train))
            if val_loss is not None:
                run.history.val_loss.append(val_loss)
            run.history.rows_per_s.append(len(train) / seconds)
            for callback in run.callbacks:
                callback.on_epoch_end(run)
            run.history.stopped = next(filter(None, ranks.gather(run.history.stopped)), None)
            bar.epoch(run.history)


def mean_loss(
    model: TrainableModel, x: Tensor, cast: AbstractContextManager[Any] | None = None, ranks: Ranks | None = None
) -> float:
    """The model's mean loss over x [rows, features] in eval mode, a chunk of rows at a time.

    By PyTorch's own sum, which is nearer to the truth over a chunk's millions of values than a step's dot product is
    (2e-5 off at 500 x 784). Each of the `ranks` computes its share of x, which is the same on all, and so is the
    result.
    """
    mine = x if ranks is None else ranks.share(x)
    step, own = max(1, CHUNK_VALUES // model.widest), model.program().own_loss is not None
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    mode = model.training
    model.train(False)
    try:
        with torch.no_grad(), cast or nullcontext():
            for rows in mine.split(step) if len(mine) else ():
                loss = model.loss(rows) if own else _eager(model, rows)
                total += loss.double() * len(rows)
    finally:
        model.train(mode)
    return (total if ranks is None else ranks.sum(total)).item() / len(x)


def _eager(model: TrainableModel, rows: Tensor) -> Tensor:
    y, trained = model.logits(rows), model.loss_parameter
    wide = torch.promote_types(y.dtype, torch.float32)
    parameter = None if trained is None else trained.to(wide)
    return eager_loss(y.to(wide), rows.to(wide), model.kind, "mean", parameter)


def split_rows(rows: int, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(training rows, validation rows): indices, the second a random `fraction` of them, each in rising order."""
    if not 0 <= fraction < 1:
        raise ValueError(f"fit: validation_split must be at least 0 and below 1; got {fraction}")
    held_out = round(rows * fraction)
    if fraction > 0 and not 0 < held_out < rows:
        raise ValueError(
            f"fit: validation_split must leave rows on both sides; got {fraction} of {rows} rows (0 for no validation)"
        )
    order = torch.randperm(rows, generator=generator) if held_out else torch.arange(rows)
    return order[held_out:].sort().values, order[:held_out].sort().values


def _check_finite(run: Run, step_losses: list[float], val_loss: float | None, good: dict[str, Tensor]) -> None:
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
    state = run.model.state_dict()
    with torch.no_grad():
        for name, value in good.items():  # buffers too
            if name in state:
                state[name].copy_(value)
    raise FloatingPointError(
        f"fit: the loss must stay finite; got {what}. The model is back at the end of epoch {epoch - 1}; try a smaller "
        "lr, or scale the data"
    )


def _checked_data(x: NDArray[Any] | Tensor, model: TrainableModel, like: Tensor, name: str) -> Tensor:
    check_rows(x, model.in_features, name)
    if len(x) == 0:
        raise ValueError(f"{name} must have at least one row; got {list(x.shape)}")
    check_all_finite(x, name)
    data = to_tensor(x, like).detach()
    check_all_finite(data, f"{name} as {str(like.dtype)[6:]}")  # 1e39 is finite in float64 alone
    check_support(model.kind.name, data, name)
    return data


def _checked_callbacks(callbacks: object) -> list[Callback]:
    if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
        raise TypeError(f"fit: callbacks must be a list of callbacks; got {type(callbacks).__name__}")
    given = list(callbacks)
    for callback in given:
        if isinstance(callback, type):
            raise TypeError(f"fit: callbacks must be objects; got the class {callback.__name__}: {callback.__name__}()")
        if not isinstance(callback, Callback):
            raise TypeError(f"fit: callbacks must be of class fastae.Callback; got {type(callback).__name__}")
    return given


def _check_options(lr: float, weight_decay: float, precision: str) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"fit: lr must be a positive number; got {lr}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"fit: weight_decay must be 0 or a positive number; got {weight_decay}")
    if precision not in PRECISIONS:
        valid = ", ".join(PRECISIONS)
        raise ValueError(f"fit: precision must be one of {valid}; got {precision!r}{nearest(precision, PRECISIONS)}")


def _optimizer(
    name: str | torch.optim.Optimizer, model: TrainableModel, lr: float, weight_decay: float
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
    # 3 to 5 times faster than the default on a CPU; it writes between the elements of a slice
    options = {"fused": kind in ("cpu", "cuda") and all(map(is_dense, parameters))}
    if kind == "cuda" and name != "sgd":
        options["capturable"] = True  # into the graph of a TrainStep
    return OPTIMIZERS[name](parameters, lr=lr, weight_decay=weight_decay, **options)
