"""Epochs of `fit` beside epochs of loops that people write: after each of ours, one of every other variant."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastae.train.run import Callback, Run
from fastae_bench.clocks import wall
from fastae_bench.rounds import OPTIONAL_VARIANTS, Budget, Times, no_garbage_collection, why_missing
from fastae_bench.training_variants import MODES, SEED, TrainingProblem, idiom_step, loader, tuned_step
from fastae_bench.variants import FASTAE, difference

CPU_VARIANTS = CUDA_VARIANTS = (FASTAE, "idiom", "tuned", "compiled")
WARM_UP = 1  # the epoch whose losses are compared


def measure_epochs(names: Sequence[str], problem: TrainingProblem, tolerance: float, budget: Budget) -> Times:
    """Seconds of whole epochs: ours from the end of one callback to the next, so all that `fit` does is in them."""
    turns = _Turns({name: _epoch(name, problem) for name in names if name != FASTAE}, tolerance, budget)
    with no_garbage_collection():
        copy.deepcopy(problem.model).fit(
            problem.x, epochs=WARM_UP + budget.rounds, batch_size=problem.size.batch, validation_split=0.0, seed=SEED,
            precision=problem.precision, progress=False, callbacks=[turns],
        )  # fmt: skip
    return turns.times


class _Turns(Callback):
    def __init__(self, epochs: dict[str, Callable[[], float]], tolerance: float, budget: Budget) -> None:
        self.epochs, self.tolerance, self.budget = epochs, tolerance, budget
        self.took: dict[str, list[float]] = {name: [] for name in (FASTAE, *epochs)}
        self.times = Times({"wall": self.took})
        self.started = 0.0

    def on_train_begin(self, run: Run) -> None:
        self.began = self.started = time.perf_counter()

    def on_epoch_end(self, run: Run) -> None:
        seconds = time.perf_counter() - self.started
        if run.history.epochs <= WARM_UP:
            self._compare(run.history.loss[0])
        else:
            self.took[FASTAE].append(seconds)
            for name, epoch in self.epochs.items():
                self.took[name].append(wall(epoch, 1))
        spent = time.perf_counter() - self.began
        if len(self.took[FASTAE]) >= self.budget.fewest and spent > self.budget.limit_s:
            run.stop("time")
        if run.history.epochs <= WARM_UP:
            self.began = time.perf_counter()  # compiling is not measuring
        self.started = time.perf_counter()

    def _compare(self, our_loss: float) -> None:
        for name, epoch in list(self.epochs.items()):
            try:
                loss = epoch()
            except Exception as error:
                if name not in OPTIONAL_VARIANTS:
                    raise
                self.times.missing[name] = why_missing(error)
            else:
                losses = {"loss": torch.tensor(our_loss)}, {"loss": torch.tensor(loss)}
                if not (differs := difference(*losses, self.tolerance)):
                    continue
                self.times.refused[name] = differs
            del self.epochs[name], self.took[name]


def _epoch(name: str, problem: TrainingProblem) -> Callable[[], float]:
    """One pass over the data, from where the last one left the weights; its mean loss."""
    model = problem.plain(tuned=name != "idiom")
    if name == "idiom":
        step, passes = idiom_step(problem, model), loader(problem, SEED)

        def idiom() -> float:
            losses = [step(batch) for (batch,) in passes]
            return sum(losses) / len(losses)

        return idiom
    tuned, generator = tuned_step(problem, model, MODES[name]), torch.Generator().manual_seed(SEED)

    def epoch() -> float:
        order = torch.randperm(problem.rows, generator=generator).to(problem.device)
        losses: list[Tensor] = [tuned(rows) for rows in order.split(problem.size.batch)]
        return torch.stack(losses).mean().item()

    return epoch
