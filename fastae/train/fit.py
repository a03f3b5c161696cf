"""`fit`: the training loop. Data stays resident, the loop never waits for the device inside an epoch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from fastae_kernels.elementwise import LossKind
from numpy.typing import NDArray
from torch import Tensor, nn

from fastae.data.arrays import CHUNK_VALUES
from fastae.engine.parameters import is_dense
from fastae.engine.train_step import Trainable, TrainStep
from fastae.nn.arguments import is_dtensor, nearest, seed_number, whole_number
from fastae.nn.losses import eager_loss, row_losses
from fastae.train.checkpoint import Checkpoint
from fastae.train.distributed import Ranks, digest
from fastae.train.history import History
from fastae.train.progress import Progress
from fastae.train.rows import Rows, checked_rows, checked_weight, scaled, split_rows
from fastae.train.run import Callback, Run

logger = logging.getLogger(__name__)

ACTIVE = 0.01  # the variance of a latent's mean from which it counts as in use
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
    features: list[int]
    bottleneck: Any

    @property
    def variational(self) -> Any: ...

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def widest(self) -> int: ...

    @property
    def kind(self) -> LossKind: ...

    @property
    def loss_parameter(self) -> nn.Parameter | None: ...

    def config(self) -> dict[str, Any]: ...

    def loss(self, x: Tensor, target: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor: ...

    def encode(self, x: Tensor) -> Tensor: ...

    def logits(self, x: Tensor) -> Tensor: ...

    def to_rows(self, x: Any, name: str) -> Any: ...

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
    target: NDArray[Any] | Tensor | None,
    sample_weight: NDArray[Any] | Tensor | None,
    epochs: int,
    batch_size: int,
    lr: float,
    optimizer: str | torch.optim.Optimizer,
    weight_decay: float,
    validation_split: float,
    validation_data: NDArray[Any] | Tensor | tuple[Any, Any] | None,
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
    widths, loss = (model.in_features, model.out_features), model.kind.name

    def rows(x: Any, target: Any, name: str) -> Rows:
        of = None if target is None else model.to_rows(target, "fit: target")
        return checked_rows(model.to_rows(x, name), of, widths, like, name, loss)

    data = rows(x, target, "fit: x")
    if sample_weight is not None:
        data = data._replace(weight=checked_weight(sample_weight, len(data.x), like))
    generator = torch.Generator().manual_seed(seed)
    if validation_data is not None:
        held_out = _with_target(validation_data, target is not None)
        train, validation = data, rows(*held_out, "fit: validation_data")
    else:
        train_rows, validation_rows = split_rows(len(data.x), validation_split, generator)
        validation = data.map(lambda t: t[validation_rows.to(t.device)])
        train = data
        if len(validation.x):  # all rows need no second copy
            train = data.map(lambda t: t[train_rows.to(t.device)])
    train, validation = scaled(train, validation)
    batch_size = min(batch_size, len(train.x))
    settings = {
        "config": model.config(), "scale": "none" if model.scaler is None else model.scaler.kind,
        "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "seed": seed,
        "optimizer": optimizer if isinstance(optimizer, str) else type(optimizer).__name__, "precision": precision,
        "training rows": len(train.x), "validation rows": len(validation.x),
    }  # fmt: skip
    ranks = Ranks()
    if ranks.size > 1 or any(isinstance(callback, Checkpoint) for callback in callbacks):
        settings |= {"x": digest(train.x), "validation data": digest(validation.x)}
        for name, values in (("target", train.target), ("sample_weight", train.weight)):
            settings |= {} if values is None else {name: digest(values)}
    if ranks.size > 1:
        ranks.check_alike("fit", settings | {"epochs": epochs})
        ranks.broadcast(model.state_dict().values())
    run = Run(model, made, generator, callbacks, settings, len(validation.x) > 0)
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
    _warn_of_collapse(run)
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
    run: Run, ranks: Ranks, train: Rows, validation: Rows, epochs: int, batch_size: int, precision: str,
    progress: bool,
) -> None:  # fmt: skip
    count, device = len(train.x), train.x.device
    steps = math.ceil(count / batch_size)
    losses = train.x.new_empty(steps)
    cast = torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
    step = TrainStep(
        run.model, run.optimizer, -(-batch_size // ranks.size), precision, ranks.group, run.settings["seed"]
    )
    step.load_state_dict(step.state_dict() | {"steps": run.history.epochs * steps})  # of a run that is gone on with
    data = train.to(step.dtype)
    raised = train.x.new_zeros(2, steps)  # KL, and what the bottleneck raised the loss by
    _warn_of_warmup(run.model.variational, epochs * steps)
    with Progress(epochs, steps, run.history.epochs, enabled=progress and ranks.rank == 0) as bar:
        while run.history.epochs < epochs and run.history.stopped is None:
            good = {name: t.detach().clone() for name, t in run.model.state_dict().items()}
            started = time.perf_counter()
            order = torch.randperm(count, generator=run.generator).to(device)
            for number, rows in enumerate(order.split(batch_size)):
                mine, first = ranks.share(rows), ranks.first(len(rows))
                losses[number] = step(data.x, mine, data.target, data.weight, first)
                if step.is_sampled:
                    raised[0, number], raised[1, number] = step.divergence()
                elif step.is_penalised:
                    raised[1, number] = step.penalty()
                bar.step(number)
            step_losses = losses.tolist()  # the epoch's one wait for the device
            seconds = time.perf_counter() - started
            val_loss = mean_loss(run.model, validation, cast, ranks) if run.has_validation else None
            _check_finite(run, step_losses, val_loss, good)
            last_rows = count - (steps - 1) * batch_size

            def mean(of_steps: list[float], last_rows: int = last_rows) -> float:
                return (math.fsum(of_steps[:-1]) * batch_size + of_steps[-1] * last_rows) / count

            run.history.loss.append(mean(step_losses))
            kl, penalty = (mean(row) for row in raised.tolist())
            if step.is_penalised:
                run.history.penalty.append(penalty)
            if step.is_sampled:
                run.history.nll.append(run.history.loss[-1] - penalty)
                run.history.kl.append(kl)
                run.history.active_units.append(active_units(run.model, validation if run.has_validation else train))
            if val_loss is not None:
                run.history.val_loss.append(val_loss)
            run.history.rows_per_s.append(count / seconds)
            for callback in run.callbacks:
                callback.on_epoch_end(run)
            run.history.stopped = next(filter(None, ranks.gather(run.history.stopped)), None)
            bar.epoch(run.history)


def mean_loss(
    model: TrainableModel, data: Rows, cast: AbstractContextManager[Any] | None = None, ranks: Ranks | None = None
) -> float:
    """The model's mean loss over the rows in eval mode, each row's by its weight, a chunk of rows at a time.

    By PyTorch's own sum, which is nearer to the truth over a chunk's millions of values than a step's dot product is
    (2e-5 off at 500 x 784). Each of the `ranks` computes its share of the rows, which are the same on all, and so is
    the result.
    """
    mine = data if ranks is None else data.map(ranks.share)
    step, own = max(1, CHUNK_VALUES // model.widest), model.program().own_loss is not None
    total = torch.zeros((), dtype=torch.float64, device=data.x.device)
    mode = model.training
    model.train(False)
    try:
        with torch.no_grad(), cast or nullcontext():
            for rows in mine.split(step):
                total += _loss_sum(model, rows, own)
    finally:
        model.train(mode)
    weights = len(data.x) if data.weight is None else float(data.weight.double().sum())
    return (total if ranks is None else ranks.sum(total)).item() / weights


def active_units(model: TrainableModel, data: Rows) -> int:
    """How many latents' means vary over the rows, by more than 0.01 (Burda et al. 2016); of 10,000 rows at most."""
    with torch.no_grad():
        return int((model.encode(data.x[:10_000]).float().var(0, correction=0) > ACTIVE).sum())


def _warn_of_warmup(part: Any, steps: int) -> None:
    if part is not None and part.warmup_steps > steps:
        logger.warning(
            "fit: beta rises over %d steps and training takes %d: it will not reach %g",
            part.warmup_steps, steps, part.beta,
        )  # fmt: skip


def _warn_of_collapse(run: Run) -> None:
    """Say so in words where the code tells nothing of the rows."""
    history = run.history
    if history.active_units and history.active_units[-1] == 0:
        logger.warning(
            "fit: the code has collapsed: none of its %d latents varies with the rows (KL %.2g nats), and the decoder "
            "gives the same row to all; a smaller beta, warmup_steps or free_bits prevent it",
            run.model.features[-1], history.kl[-1],
        )  # fmt: skip


def _loss_sum(model: TrainableModel, rows: Rows, own: bool) -> Tensor:
    """The sum of the rows' losses, each times its weight, in fp64."""
    target = rows.x if rows.target is None else rows.target
    if own:
        return model.loss(rows.x, *(() if rows.target is None else (target,))).double() * len(rows.x)
    if model.bottleneck is not None:
        return model.loss(rows.x, target, rows.weight).double() * len(rows.x)
    y = model.logits(rows.x)
    wide = torch.promote_types(y.dtype, torch.float32)
    y, target = y.to(wide), target.to(wide)
    trained = model.loss_parameter
    parameter = None if trained is None else trained.to(wide)
    if rows.weight is None:
        return eager_loss(y, target, model.kind, "mean", parameter).double() * len(rows.x)
    values = eager_loss(y, target, model.kind, "none", parameter)
    return torch.dot(row_losses(values, model.kind).double(), rows.weight.double())


def _with_target(data: object, has_target: bool) -> tuple[Any, Any]:
    """(x, target) of validation_data."""
    pair = isinstance(data, tuple) and len(data) == 2
    if pair != has_target:
        wanted = "(rows, their target), as there is a target" if has_target else "rows alone, as there is no target"
        raise ValueError(f"fit: validation_data must be {wanted}; got {'a pair' if pair else type(data).__name__}")
    return data if isinstance(data, tuple) else (data, None)


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
