"""`TrainStep`: loss, gradients and optimizer of an autoencoder on static memory."""

from __future__ import annotations

import inspect
import logging
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastae.bottlenecks import KLSparse
from fastae.engine.all_reduce import GradientAllReduce
from fastae.engine.cuda_graph import GraphedStep
from fastae.engine.optimizer import Update
from fastae.engine.parameters import is_dense
from fastae.engine.program import Module, Program
from fastae.engine.signature import HOOKS, Signature
from fastae.engine.static_step import StaticStep
from fastae.nn.arguments import is_dtensor, seed_number, whole_number
from fastae.nn.backend import get_backend, use_backend
from fastae.nn.thin_conv import ThinConv2d

logger = logging.getLogger(__name__)


class Trainable(Protocol):
    """A model that hands over a `Program`; every autoencoder of fastae does."""

    def program(self) -> Program: ...


class TrainStep:
    """One step of training an autoencoder: its loss, the gradients and the optimizer's update.

    Calling it does what `model.zero_grad(); loss(x).backward(); optimizer.step()` does, on memory that it allocates
    once: no graph of autograd for fastae's own layers, no wait for the device. Allocated anew are the results that
    oneDNN returns for large products on a CPU, and scratch there where the output has an activation or the step is in
    half precision. On a CPU the sequence of calls is recorded once and replayed, on a CUDA device it is captured as a
    graph. The model's parameters, their `.grad` and the optimizer's state stay what they are for everyone else. So do
    gradients of parameters that the optimizer holds and the model does not: `optimizer.step()` takes them.

    What is not fastae's own (a `BatchNorm1d` or `Dropout` among the layers, a layer with a hook or a parametrization)
    runs as an island of autograd inside the same step; a model with a `forward` of its own is one island, and its
    `loss`, if that is its own, is called as it is. What changes between steps (a frozen or new parameter, moved memory,
    a hook, an activation, the optimizer's groups or state) is noticed, and the step built anew.

        step = fastae.TrainStep(ae, torch.optim.Adam(ae.parameters(), fused=True), batch_size=256)
        for epoch in range(10):
            for rows in torch.randperm(len(x)).split(256):
                step(x, rows)
            print(step.mean_loss())

    Args:
        model: an autoencoder of fastae; frozen parameters are left alone, modules run in the mode they are in.
        optimizer: over the model's parameters. `Adam` and `AdamW` with fused=True cost least; on CUDA, capturable=True
            lets the update into the captured graph.
        batch_size: the most rows of a step; fewer, as in an epoch's last, are fine.
        precision: None computes in the parameters' dtype; "bfloat16" in bf16 with fp32 parameters, whose bf16 copy is
            made once per step.
        group: processes that take every step together, torch.distributed.group.WORLD say: each calls with rows of its
            own, or none, and has the loss, the gradients and the update of all their rows, after one all-reduce.
        seed: of whatever the step draws itself; it is part of `state_dict`.

    Raises TypeError for a model that has no program, ValueError if all its parameters are frozen, the optimizer holds
    none of them, or is fused over one that does not fill its memory (a slice of a larger tensor).
    """

    def __init__(
        self,
        model: Trainable,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        precision: str | None = None,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module) or not callable(getattr(model, "program", None)):
            raise TypeError(f"TrainStep: model must be an autoencoder of fastae; got {type(model).__name__}")
        self.batch_size = whole_number("TrainStep", "batch_size", batch_size, 1)
        self.seed = seed_number("TrainStep", seed)
        self.model: Any = model
        self.optimizer, self.steps = optimizer, 0
        self._precision, self._group, self._backend = precision, group, get_backend()
        self._warned = False
        self._total = torch.zeros((), dtype=torch.float64)
        self._rows: int | Tensor = 0
        self._build()

    def _build(self, before: StaticStep | None = None) -> None:
        """Make the step for the model as it is now."""
        if any(map(is_dtensor, self.model.parameters())):
            raise TypeError(
                "TrainStep: parameters must be plain tensors; got DTensors: train the sharded model in a loop of your "
                "own, model.loss(x).backward() and optimizer.step()"
            )
        program = self.model.program()
        self.dtype = compute_dtype(self.model, self._precision)
        with use_backend(self._backend):
            static = StaticStep(program, self.batch_size, self.dtype)
        if not static.trainable:
            raise ValueError("TrainStep: model must have a parameter that requires a gradient; all are frozen")
        self._check_optimizer(static)
        if before is not None:
            for p in before.trainable:
                p.grad = None  # of one that is frozen now, or belongs to the model no more
        if program.own_loss is not None and not self._warned:
            self._warned = True
            logger.warning("TrainStep calls the model's own loss through autograd: %s", program.own_loss)
        if self._group is not None and (what := _of_a_batch(program)):
            raise ValueError(f"TrainStep: group must be None for a code with {what}: that is of a whole batch's mean")
        self.static, self._signature, self._last = static, Signature(self.model, program), static.memory
        self._frozen = [p for p in self.model.parameters() if not p.requires_grad]
        self._total = self._total.to(static.device)
        lacks = bool(static.parameters.by_autograd) or self._group is not None
        self._update = Update(self.optimizer, static.trainable, lacks)
        extras = 2 if program.variational is not None else 1 if program.penalised is not None else 0
        self._mean = None if self._group is None else GradientAllReduce(static.trainable, self._group, extras)
        self._graphed = None
        if static.device.type == "cuda" and _capturable(program):
            memory = static.memory
            self._graphed = GraphedStep(  # with a group the all-reduce stands between the graph and the update
                lambda: static.run(memory), lambda loss: self.apply(loss, memory.count), lambda: static.publish(memory),
                self.optimizer, self._group is None,
            )  # fmt: skip

    def _check_optimizer(self, static: StaticStep) -> None:
        closure = inspect.signature(type(self.optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            name = type(self.optimizer).__name__
            raise TypeError(
                f"TrainStep: optimizer must step without a closure; {name} needs one: train by your own loop"
            )
        groups = self.optimizer.param_groups
        held = {id(p): group for group in groups for p in group["params"]}
        if not any(id(p) in held for p in static.trainable):
            raise ValueError(
                "TrainStep: optimizer must be over the model's parameters; got one that holds none of them"
            )
        for p in static.trainable:
            if id(p) in held and held[id(p)].get("fused") and not is_dense(p):
                raise ValueError(
                    f"TrainStep: optimizer must not be fused for a parameter {list(p.shape)} with strides "
                    f"{p.stride()}; got a slice of a larger tensor, between whose elements PyTorch writes: use "
                    "fused=False, or make the parameter contiguous"
                )

    def __call__(
        self,
        x: Tensor,
        rows: Tensor | None = None,
        target: Tensor | None = None,
        sample_weight: Tensor | None = None,
        first_row: int = 0,
    ) -> Tensor:
        """Take one step on x [M, features] (or images), or on x[rows], and return its loss: [], fp32 (fp64 for fp64).

        Args:
            x: a floating-point tensor on the model's device; one in the step's dtype is gathered in one pass.
            rows: int64 indices [M] of the rows of x and of the target; all of them if None. M is at most batch_size.
            target: what to reconstruct, x itself if None; [M, features] or, with `rows`, as long as x.
            sample_weight: factors of the rows' losses, [M] or, with `rows`, as long as x; the sum is divided by M, not
                by theirs. All 1 if None.
            first_row: of several processes, where these rows begin in the batch of all: it decides which random numbers
                they get, so that the processes train as one would.

        The loss is that before the update. On CUDA its memory is reused: read or copy it before the next call.
        """
        if not self._signature.holds():
            self._build(self.static)
        static = self.static
        if not _are_tensors(x, rows):
            _refuse_kind(x, rows)
        if x.dim() > 2 or (target is not None and target.dim() > 2):
            x, target = self._as_rows(x, target)
        count = len(x) if rows is None else len(rows)
        if count == 0 and self._mean is not None:
            return self._without_rows()
        if not 1 <= count <= self.batch_size or x.dim() != 2 or x.shape[1] != static.program.in_features:
            self._refuse(x, count)
        if x.device != static.device:
            raise ValueError(f"TrainStep: x must be on {static.device} as the model is; got {x.device}")
        if target is not None and static.program.share < 1:
            raise ValueError("TrainStep: target must be None where the loss is on masked values; got a tensor")
        if target is not None and target.shape != (len(x), static.program.out_features):
            raise ValueError(
                f"TrainStep: target must be {[len(x), static.program.out_features]}; got {list(target.shape)}"
            )
        if sample_weight is not None:
            self._check_weight(sample_weight, x)
        for p in self._frozen:
            p.grad = None  # as `zero_grad` does: the optimizer would update them by what someone left there
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # a microsecond less than torch.no_grad()
        try:
            memory = static.load(x, rows, target, count, sample_weight, (self.seed, self.steps, first_row))
            self._last = memory
            if self._graphed is not None and memory is static.memory and target is None and sample_weight is None:
                loss = self._graphed()
            else:
                loss = static.run(memory)
                self.apply(loss, count)
            self.steps += 1
            return self._counted(loss, count)
        finally:
            torch._C._set_grad_enabled(enabled)

    @property
    def is_sampled(self) -> bool:
        """Whether the step samples a variational code itself; a model's own loss may do so instead."""
        return self.static.program.variational is not None

    def divergence(self) -> tuple[Tensor, Tensor]:
        """Of a variational code, in the last step: the mean KL of its rows, and what it raised the loss by; both [].

        In a group those of all processes' rows. Raises ValueError for a model without such a code.
        """
        if self.static.program.variational is None:
            raise ValueError("TrainStep: divergence is that of a variational code; the model's is not sampled")
        kl, raised = self._raised_here() if self._mean is None else self._mean.extra.clone()
        return kl, raised

    @property
    def is_penalised(self) -> bool:
        """Whether the step raises the loss by a penalty on its code; a model's own loss may do so instead."""
        return self.static.program.penalised is not None

    def penalty(self) -> Tensor:
        """What the bottleneck raised the loss of the last step by: [].

        In a group that of all processes' rows. Raises ValueError for a model whose bottleneck is none of `L1`,
        `KLSparse` and `Contractive`.
        """
        if self.static.program.penalised is None:
            raise ValueError("TrainStep: penalty is that of a bottleneck; the model's raises no loss")
        (raised,) = self._raised_here() if self._mean is None else self._mean.extra.clone()
        return raised

    def _raised_here(self) -> tuple[Tensor, ...]:
        """On this process: the mean KL, if there is one, and what the loss was raised by, if it was; each []."""
        memory = self._last
        found = memory.found[memory.variant]
        if found.penalty is None:
            return ()
        raised = found.penalty.partials.sum()
        raised = raised if found.penalty.factor is None else raised * found.penalty.factor
        means = (raised / memory.count,)
        return means if found.kl is None else (found.kl.sum() / memory.count, *means)

    def apply(self, loss: Tensor, count: int) -> None:
        """Update the parameters with the gradients of the last `static.run`, in a group with those of all processes."""
        gradients = self.static.gradients
        if self._mean is not None:
            extra = self._raised_here()
            gradients = self._mean(loss, gradients, count, extra)
        self._update(gradients)

    def mean_loss(self) -> float:
        """The mean loss over all rows since the last call of this method; the one wait for the device. NaN for none."""
        rows = int(self._rows)
        mean = self._total.item() / rows if rows else float("nan")
        self._total.zero_()
        self._rows = 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """The seed and the number of steps taken: what the step's own random numbers follow from."""
        return {"seed": self.seed, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.seed = seed_number("TrainStep", state["seed"])
        self.steps = whole_number("TrainStep", "steps", state["steps"], 0)

    def _without_rows(self) -> Tensor:
        """A step to which this process has no rows, and the others may have."""
        assert self._mean is not None
        gradients = self._mean(0.0, [None] * len(self.static.trainable), 0)
        if all(grad is None for grad in gradients):
            raise ValueError("TrainStep: a step must have at least one row in the group; got none on any process")
        self._update(gradients)
        self.steps += 1
        return self._counted(self._mean.loss, 0)

    def _counted(self, loss: Tensor, count: int) -> Tensor:
        """The loss of the step, in a group that of all processes, after adding it to those `mean_loss` is asked for."""
        if self._mean is None:
            self._total.add_(loss, alpha=count)
            self._rows = self._rows + count
            return loss.clone() if self._graphed is None else loss  # the memory of the next one too
        self._total.add_(self._mean.loss * self._mean.rows)
        self._rows = self._rows + self._mean.rows
        return self._mean.loss.clone()

    def _as_rows(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What a model of images makes rows of."""
        to_rows = getattr(self.model, "to_rows", lambda t, _: t)
        return to_rows(x, "TrainStep: x"), None if target is None else to_rows(target, "TrainStep: target")

    def _check_weight(self, weight: object, x: Tensor) -> None:
        if not isinstance(weight, Tensor) or weight.shape != x.shape[:1] or weight.device != x.device:
            got = f"{list(weight.shape)} on {weight.device}" if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"TrainStep: sample_weight must be a tensor [{len(x)}] on {x.device}; got {got}")
        if self.static.program.own_loss is not None:
            raise ValueError(
                f"TrainStep: sample_weight must be None: {self.static.program.own_loss}, which takes no weights"
            )

    def _refuse(self, x: Tensor, count: int) -> None:
        features = self.static.program.in_features
        if x.dim() != 2 or x.shape[1] != features:
            raise ValueError(f"TrainStep: x must be [rows, {features}]; got {list(x.shape)}")
        raise ValueError(f"TrainStep: a step takes 1 to {self.batch_size} rows; got {count}")


def _are_tensors(x: object, rows: object) -> bool:
    return isinstance(x, Tensor) and (rows is None or isinstance(rows, Tensor))


def _refuse_kind(x: object, rows: object) -> NoReturn:
    if isinstance(x, Tensor):
        raise TypeError(f"TrainStep: rows must be an int64 tensor; got {type(rows).__name__}: torch.as_tensor(rows)")
    hint = ": torch.from_numpy(x) makes one" if isinstance(x, np.ndarray) else ""
    raise TypeError(f"TrainStep: x must be a torch.Tensor; got {type(x).__name__}{hint}")


def _of_a_batch(program: Program) -> str | None:
    """What of the code is a function of the mean over a whole batch, or None."""
    part, sampled = program.penalised, program.variational
    if isinstance(part, KLSparse):
        return "a KLSparse bottleneck"
    shaped = sampled is not None and (sampled.capacity is not None or sampled.free_bits > 0)
    return "capacity or free_bits" if shaped else None


def _capturable(program: Program) -> bool:
    """Whether a replay does all that the step does: Python of hooks and of people's own modules is not repeated."""
    if program.own_loss is not None:
        return False
    islands = [m for stage in program.stages if isinstance(stage, Module) for m in stage.module.modules()]
    return all(
        (type(m).__module__.startswith("torch.nn.modules") or type(m) is ThinConv2d)
        and not any(vars(m)[hooks] for hooks in HOOKS)
        and not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in m.parameters(recurse=False))
        for m in islands
    )


def compute_dtype(model: nn.Module, precision: str | None) -> torch.dtype:
    """Dtype in which a step of the model computes."""
    own = next(model.parameters()).dtype
    if precision in (None, str(own).removeprefix("torch.")):
        return own
    if precision != "bfloat16":
        raise ValueError(f"TrainStep: precision must be None, {str(own)[6:]!r} or 'bfloat16'; got {precision!r}")
    if own != torch.float32:
        raise ValueError(f"TrainStep: precision 'bfloat16' needs float32 parameters; got {str(own)[6:]}")
    return torch.bfloat16
