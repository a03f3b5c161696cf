"""`TrainStep`: loss, gradients and optimizer of a `DenseAutoencoder` on static memory, without autograd."""

from __future__ import annotations

import operator

import torch
import torch.distributed as dist
from torch import Tensor

from fastae.engine import schedule as _schedule
from fastae.engine.all_reduce import Mean
from fastae.engine.call_list import Replay, record
from fastae.engine.cuda_graph import Captured
from fastae.engine.optimizer import update_of
from fastae.engine.parameters import Lowered, layers_of, why_not_plain
from fastae.models.dense import DenseAutoencoder


class TrainStep:
    """One step of training a `DenseAutoencoder` by its mean squared error.

    Calling it does what `loss(x).backward(); optimizer.step()` does, on memory that it allocates once: no graph of
    autograd and no wait for the device. Allocated anew are the results that oneDNN returns for large products on a CPU,
    and scratch there where the output has an activation or the step is in half precision. On a CUDA device the step is
    captured as a graph and replayed. The model's parameters, their `.grad` and the optimizer's state stay what they are
    for everyone else.

        step = fastae.TrainStep(ae, torch.optim.Adam(ae.parameters(), fused=True), batch_size=256)
        for epoch in range(10):
            for rows in torch.randperm(len(x)).split(256):
                step(x, rows)
            print(step.mean_loss())

    Args:
        model: a `DenseAutoencoder` as the constructor makes it; frozen parameters are left alone.
        optimizer: over the model's parameters. `Adam` and `AdamW` with fused=True cost least; on CUDA, capturable=True
            lets the update into the captured graph.
        batch_size: the most rows of a step; fewer, as in an epoch's last, are fine.
        precision: None computes in the parameters' dtype; "bfloat16" in bf16 with fp32 parameters, whose bf16 copy is
            made once per step.
        group: processes that take every step together, torch.distributed.group.WORLD say: each calls with rows of its
            own, or none, and has the loss, the gradients and the update of all their rows, after one all-reduce.

    Raises ValueError for a model whose training cannot be written as this one schedule (its own `loss` or `forward`,
    hooks, parametrizations, tensor subclasses), saying what it is; train such a model with `loss(x).backward()`.
    """

    def __init__(
        self,
        model: DenseAutoencoder,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        precision: str | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if reason := why_not(model):
            raise ValueError(f"TrainStep: model must be a plain DenseAutoencoder; {reason}")
        try:
            self.batch_size = operator.index(batch_size)
        except TypeError:
            raise TypeError(f"TrainStep: batch_size must be a whole number; got {batch_size!r}") from None
        if self.batch_size < 1:
            raise ValueError(f"TrainStep: batch_size must be at least 1; got {batch_size}")
        self.model, self.optimizer = model, optimizer
        self.dtype = _compute_dtype(model, precision)
        self._layers = Lowered(layers_of(model), self.dtype, self.batch_size)
        if not self._layers.trainable:
            raise ValueError("TrainStep: model must have a parameter that requires a gradient; all are frozen")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in self._layers.trainable):
            raise ValueError(
                "TrainStep: optimizer must be over the model's parameters; got one that holds none of them"
            )
        self._update = update_of(optimizer, self._layers.trainable)
        self._mean = None if group is None else Mean(self._layers.trainable, group)
        self._memory = _Memory(self._layers, self.batch_size)
        self._slices: dict[int, _Memory] = {self.batch_size: self._memory}
        self._total = torch.zeros((), dtype=torch.float64, device=self._memory.x.device)
        self._rows: int | Tensor = 0
        self._below = any(any(need) for need in self._layers.needs[:-1])
        cuda = self._memory.x.device.type == "cuda"
        self._repeats = set(self._layers.plan.backends) == {"torch"} and not cuda
        self._captured = None
        if cuda:  # with a group the all-reduce stands between the graph and the update
            self._captured = Captured(lambda: self._compute(self._memory), self._apply, optimizer, group is None)

    def __call__(self, x: Tensor, rows: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """Take one step on x [M, features], or on x[rows], and return its loss: [], fp32 (fp64 for fp64).

        Args:
            x: a floating-point tensor on the model's device; one in the step's dtype is gathered in one pass.
            rows: int64 indices [M] of the rows of x and of the target; all of them if None. M is at most batch_size.
            target: what to reconstruct, x itself if None; [M, features] or, with `rows`, as long as x.

        The loss is that before the update. On CUDA its memory is reused: read or copy it before the next call.
        """
        count = len(x) if rows is None else len(rows)
        if self._mean is not None and count == 0:
            gradients = [grad for grad in self._mean(0.0, [None] * len(self._layers.trainable), 0) if grad is not None]
            if not gradients:
                raise ValueError("TrainStep: a step must have at least one row in the group; got none on any process")
            self._update(gradients)
            return self._counted(self._mean.loss, 0)
        self._count = count
        memory = self._slices.get(count)
        if memory is None or x.dim() != 2 or x.shape[1] != self._layers.features[0] or x.device != memory.x.device:
            memory = self._slice(count, x)
        with torch.no_grad():
            _gather(x, rows, memory.given)
            if target is not None:
                if target.shape != (len(x), self._layers.features[1]):
                    raise ValueError(
                        f"TrainStep: target must be {[len(x), self._layers.features[1]]}; got {list(target.shape)}"
                    )
                _gather(target, rows, memory.target()[:, : self._layers.features[1]])
            memory.denoises = target is not None
            if self._captured is not None and memory is self._memory and target is None:
                loss = self._captured()
            else:
                loss = self._run(memory)
            return self._counted(loss, count)

    def mean_loss(self) -> float:
        """The mean loss over all rows since the last call of this method; the one wait for the device. NaN for none."""
        rows = int(self._rows)
        mean = self._total.item() / rows if rows else float("nan")
        self._total.zero_()
        self._rows = 0
        return mean

    def _counted(self, loss: Tensor, count: int) -> Tensor:
        """The loss of the step, in a group that of all processes, after adding it to those `mean_loss` is asked for."""
        if self._mean is None:
            self._total.add_(loss, alpha=count)
            self._rows = self._rows + count
            return loss.clone() if self._captured is None else loss  # the memory of the next one too
        self._total.add_(self._mean.loss * self._mean.rows)
        self._rows = self._rows + self._mean.rows
        return self._mean.loss.clone()

    def _run(self, memory: _Memory) -> Tensor:
        loss = self._compute(memory)
        self._apply()
        return loss

    def _compute(self, memory: _Memory) -> Tensor:
        """The loss; the gradients go to `.grad`."""
        replay = memory.replays.get(memory.denoises) if self._repeats else None
        if replay is not None and replay[0].holds():
            again, self._loss, self._gradients = replay
            again()
        elif self._repeats:
            noted = record(lambda: self._schedule(memory), self._layers.parameters)
            self._repeats = noted is not None
            if noted is not None:
                memory.replays[memory.denoises] = noted, self._loss, self._gradients
        else:
            self._schedule(memory)
        self._layers.publish(self._gradients)
        return self._loss

    def _schedule(self, memory: _Memory) -> None:
        """Loss and gradients."""
        layers = self._layers
        layers.refresh()
        target = memory.target() if memory.denoises else memory.x
        done = _schedule.forward(
            memory.x, target, layers.weights, layers.biases, layers.plan, memory.buffers, self._below, later=True
        )
        if memory.scale is None:
            done.dp.mul_(memory.factor)
        _, grads = _schedule.backward(done, layers.weights, layers.plan, memory.buffers, layers.needs, memory.scale)
        self._gradients, self._loss = layers.collect(grads), done.loss

    def _apply(self) -> None:
        gradients = self._gradients
        if self._mean is not None:
            gradients = [grad for grad in self._mean(self._loss, gradients, self._count) if grad is not None]
        self._update(gradients)

    def _slice(self, count: int, x: Tensor) -> _Memory:
        features = self._layers.features[0]
        if x.dim() != 2 or x.shape[1] != features:
            raise ValueError(f"TrainStep: x must be [rows, {features}]; got {list(x.shape)}")
        if x.device != self._memory.x.device:
            raise ValueError(f"TrainStep: x must be on {self._memory.x.device} as the model is; got {x.device}")
        if not 1 <= count <= self.batch_size:
            raise ValueError(f"TrainStep: a step takes 1 to {self.batch_size} rows; got {count}")
        self._slices[count] = self._memory.first(count)
        return self._slices[count]


class _Memory:
    """What a step on `count` rows reads and writes; `full` is the memory whose first rows it shares."""

    x: Tensor
    buffers: _schedule.Buffers

    def __init__(self, layers: Lowered, count: int, full: _Memory | None = None) -> None:
        def rows(width: int, of: Tensor | None) -> Tensor:
            return layers.weights[0].new_empty(count, width) if of is None else of[:count]

        widths = [w.shape[0] for w in layers.weights]
        self.layers, self.count, self.denoises = layers, count, False
        self.x = rows(layers.weights[0].shape[1], None if full is None else full.x)
        self.given = self.x[:, : layers.features[0]]  # the columns that rows are gathered into
        self.x[:, layers.features[0] :] = 0
        self._target: Tensor | None = None
        self.replays: dict[bool, tuple[Replay, Tensor, list[Tensor]]] = {}  # by whether there is a target
        outputs, gradients = [], []
        for layer, width in enumerate(widths):
            gradients.append(rows(width, None if full is None else full.buffers.gradients[layer]))
            if layer < len(widths) - 1:
                y, p = (None, None) if full is None else full.buffers.outputs[layer] or (None, None)
                outputs.append((rows(width, y), rows(width, p) if layers.plan.saves[layer] == "p" else None))
        scratch = None
        if self.x.device.type == "cpu" and self.x.dtype.itemsize == 2:
            scratch = self.x.new_empty(count, widths[-1], dtype=torch.float32) if full is None else full.scratch(count)
        loss = self.x.new_empty((), dtype=torch.promote_types(self.x.dtype, torch.float32))
        self.buffers = _schedule.Buffers(outputs, gradients, scratch, loss, layers.buffers)
        self.factor = 2 / (count * layers.features[1])
        # Each weight gradient puts it in: from memory, in a kernel's epilogue, or as a number, which keeps the small
        # numbers of half precision. The twins multiply fp32 once.
        self.scale: Tensor | float | None = self.factor if self.x.dtype.itemsize == 2 else None
        if "triton" in layers.plan.backends or self.x.device.type != "cpu":
            wide = torch.promote_types(self.x.dtype, torch.float32)
            self.scale = torch.full((), self.factor, dtype=wide, device=self.x.device)

    def scratch(self, count: int) -> Tensor | None:
        return None if self.buffers.scratch is None else self.buffers.scratch[:count]

    def first(self, count: int) -> _Memory:
        return _Memory(self.layers, count, self)

    def target(self) -> Tensor:
        """The buffer of a target that is not x, made when it is first asked for."""
        if self._target is None:
            self._target = self.x.new_zeros(self.count, len(self.layers.weights[-1]))
        return self._target


# What a subclass, or a test, may replace; kept from before anyone could.
_OWN = {name: getattr(DenseAutoencoder, name) for name in ("forward", "encode", "decode", "loss", "__call__")}


def why_not(model: object) -> str | None:
    """None if `TrainStep` takes the model, or what stands in its way."""
    if not isinstance(model, DenseAutoencoder):
        return f"it is a {type(model).__name__}"
    for name, own in _OWN.items():
        if getattr(type(model), name) is not own or name in vars(model):
            return f"its {name} is not DenseAutoencoder's"
    return why_not_plain(model)


def _compute_dtype(model: DenseAutoencoder, precision: str | None) -> torch.dtype:
    own = next(model.parameters()).dtype
    if precision in (None, str(own).removeprefix("torch.")):
        return own
    if precision != "bfloat16":
        raise ValueError(f"TrainStep: precision must be None, {str(own)[6:]!r} or 'bfloat16'; got {precision!r}")
    if own != torch.float32:
        raise ValueError(f"TrainStep: precision 'bfloat16' needs float32 parameters; got {str(own)[6:]}")
    return torch.bfloat16


def _gather(source: Tensor, rows: Tensor | None, out: Tensor) -> None:
    """out = source[rows], in out's dtype."""
    if rows is None:
        out.copy_(source)
    elif source.dtype == out.dtype:
        torch.index_select(source, 0, rows, out=out)
    else:
        out.copy_(source.index_select(0, rows))
