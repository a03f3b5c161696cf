"""A training step, written in the ways people write it: every variant from the same weights, on the same batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from fastae.analysis.plain import PlainAutoencoder
from fastae.analysis.products import products
from fastae.engine.train_step import TrainStep
from fastae.models.base import Autoencoder
from fastae.models.dense import DenseAutoencoder
from fastae_bench.compiling import compiled
from fastae_bench.sizes import Size
from fastae_bench.variants import FASTAE, MATMUL_ONLY, Variant

CPU_VARIANTS = (FASTAE, "idiom", "tuned", "compiled", MATMUL_ONLY)
CUDA_VARIANTS = (FASTAE, "idiom", "tuned", "compiled", "reduce-overhead", "max-autotune", "graphed", MATMUL_ONLY)
COMPARED_STEPS = 3  # the first has the initial weights; the later ones show whether the updates were the same
SEED = 1  # of the order of the batches
DATA_VALUES = 1 << 24  # of the resident data, where the compared batches are not more: 64 MiB in fp32


def rows_of_data(size: Size) -> int:
    """Whole batches, as many as are compared at least."""
    return size.batch * max(COMPARED_STEPS, min(4096, DATA_VALUES // size.features[0]) // size.batch)


class TrainingProblem:
    """Weights and data that all variants share. The data is uniform in [0, 1), as scaled pixels and features are."""

    def __init__(self, size: Size, precision: str, device: torch.device, rows: int | None = None) -> None:
        torch.manual_seed(0)
        self.size, self.precision, self.device = size, precision, device
        self.rows = rows or rows_of_data(size)
        self.model = self.model_of(size)
        self.x = torch.rand(self.rows, size.features[0]).to(device)

    def model_of(self, size: Size) -> Autoencoder:
        return DenseAutoencoder(size.features, device=self.device)

    def plain(self, tuned: bool) -> nn.Module:
        """The same network, with the same weights, from `torch.nn`."""
        assert isinstance(self.model, DenseAutoencoder)
        return PlainAutoencoder(self.model)

    def loss(self, y: Tensor, batch: Tensor) -> Tensor:
        return F.mse_loss(y, batch)

    @property
    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    @cached_property
    def resident(self) -> Tensor:
        """The data in the precision of the products."""
        return self.x.to(getattr(torch, self.precision))

    def batches(self) -> Iterator[Tensor]:
        """Indices of full batches, drawn anew for every pass over the data; the same for every variant."""
        generator = torch.Generator().manual_seed(SEED)
        while True:
            order = torch.randperm(self.rows, generator=generator).to(self.device)
            yield from order.split(self.size.batch)


def variant(name: str, problem: TrainingProblem) -> Variant:
    """The variant of that name, one call of which is one step."""
    if name == MATMUL_ONLY:
        dtype = getattr(torch, problem.precision)
        size, device = problem.size, problem.device
        return Variant(MATMUL_ONLY, products(size.layers, size.batch, dtype, device, backward=True))
    make = {FASTAE: _fastae, "idiom": _idiom, "graphed": _graphed}.get(name)
    return make(problem) if make else _tuned(problem, name, MODES[name])


# ---------------------------------------------------------------- fastae


def _fastae(problem: TrainingProblem) -> Variant:
    model = copy.deepcopy(problem.model)
    step = TrainStep(model, _adam(model, problem.device), problem.size.batch, problem.precision)
    data, batches = problem.resident, problem.batches()
    return _of_steps(FASTAE, model, lambda: step(data, next(batches)))


def _adam(model: nn.Module, device: torch.device) -> torch.optim.Adam:
    """Fused, and on CUDA such that a graph can hold it."""
    return torch.optim.Adam(model.parameters(), fused=True, capturable=device.type == "cuda")


# ---------------------------------------------------------------- PyTorch

# Names of the variants that are the tuned step, and the mode of torch.compile that they are compiled in.
MODES = {"tuned": None, "compiled": "default", "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune"}


def idiom_step(problem: TrainingProblem, model: nn.Module) -> Callable[[Tensor], float]:
    """As tutorials have it: Adam's defaults and `loss.item()`; the batches come from a DataLoader."""
    optimizer = torch.optim.Adam(model.parameters())

    def step(batch: Tensor) -> float:
        batch = batch.to(problem.device)
        with problem.autocast:
            loss = problem.loss(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def loader(problem: TrainingProblem, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """A DataLoader as `shuffle=True` makes it, with a generator that gives the order of `batches`."""
    sampler = RandomSampler(problem.x, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(problem.x.cpu()), problem.size.batch, sampler=sampler, drop_last=True)


def tuned_step(problem: TrainingProblem, model: nn.Module, mode: str | None) -> Callable[[Tensor], Tensor]:
    """A step on x[rows]: resident data, `index_select`, `Adam(fused=True)`, `set_to_none`, autocast for bf16.

    In bf16 the data is resident in bf16, as ours is: that is up to 1.2 times faster than casting every batch. Forward
    pass and loss are compiled if there is a mode.
    """
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    data = problem.resident

    def loss_of(batch: Tensor) -> Tensor:
        with problem.autocast:
            return problem.loss(model(batch), batch)

    compute = compiled(loss_of, mode) if mode else loss_of

    def step(rows: Tensor) -> Tensor:
        loss: Tensor = compute(data.index_select(0, rows))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _idiom(problem: TrainingProblem) -> Variant:
    model = problem.plain(tuned=False)
    step = idiom_step(problem, model)
    passes = loader(problem, SEED)
    batches = (batch for _ in repeat(None) for (batch,) in passes)
    return _of_steps("idiom", model, lambda: torch.tensor(step(next(batches))))


def _tuned(problem: TrainingProblem, name: str, mode: str | None) -> Variant:
    model = problem.plain(tuned=True)
    step, batches = tuned_step(problem, model, mode), problem.batches()
    return _of_steps(name, model, lambda: step(next(batches)))


def _graphed(problem: TrainingProblem) -> Variant:
    """The tuned step captured as a CUDA graph, by PyTorch's documented pattern; batches are copied into its memory."""
    model = problem.plain(tuned=True)
    optimizer = _adam(model, problem.device)
    batches, data = problem.batches(), problem.resident
    static = data[: problem.size.batch].clone()
    graph, losses = torch.cuda.CUDAGraph(), list[Tensor]()

    def whole_step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with problem.autocast:
            loss = problem.loss(model(static), static)
        loss.backward()
        optimizer.step()
        return loss.detach()

    warm = 0

    def step() -> Tensor:
        nonlocal warm
        torch.index_select(data, 0, next(batches), out=static)
        if warm < COMPARED_STEPS:  # real steps on a side stream, as capture wants them
            warm += 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                loss = whole_step()
            torch.cuda.current_stream().wait_stream(stream)
            return loss
        if not losses:
            with torch.cuda.graph(graph):
                losses.append(whole_step())
        graph.replay()
        return losses[0]

    return _of_steps("graphed", model, step)


# ---------------------------------------------------------------- results


def _of_steps(name: str, model: nn.Module, step: Callable[[], Tensor]) -> Variant:
    def results() -> Mapping[str, Tensor]:
        losses = [step().clone()]
        grads = {f"gradient {i}": p.grad.clone() for i, p in enumerate(model.parameters()) if p.grad is not None}
        losses += [step().clone() for _ in range(COMPARED_STEPS - 1)]
        return {f"loss {i}": loss for i, loss in enumerate(losses, 1)} | grads

    return Variant(name, step, results)
