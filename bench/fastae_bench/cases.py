"""What is measured: every case by level, at the sizes people have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fastae_bench import epochs, inference_sides, op_sides, startup, training_sides, work
from fastae_bench.clocks import clocks
from fastae_bench.rounds import OPTIONAL_SIDES, Effort, Times, measure
from fastae_bench.sides import FLOOR, TOLERANCE, Side
from fastae_bench.sizes import NETWORKS, PRECISIONS, SIZES, Size
from fastae_bench.work import Work

LEVELS = ("op", "step", "fit", "score", "encode", "startup")


@dataclass(frozen=True)
class Case:
    """A piece of work: `what` of `level`, at a size and precision."""

    level: str
    what: str
    size: Size
    precision: str

    @property
    def key(self) -> str:
        """The same for the same case in every report."""
        return f"{self.what} {self.size.label} x {self.size.batch} {self.precision}"

    @property
    def rows(self) -> int:
        """Rows that one call takes through the network."""
        if self.level == "fit":
            return training_sides.rows_of_data(self.size)
        return 1 if self.level == "startup" else self.size.batch

    def names(self, device: torch.device, effort: Effort) -> list[str]:
        """The sides of this case on the device."""
        sides = {"op": op_sides, "step": training_sides, "fit": epochs, "startup": startup}.get(
            self.level, inference_sides
        )
        names = sides.CPU_SIDES if device.type == "cpu" else sides.CUDA_SIDES
        unwanted = {FLOOR} if self.what == "mse_loss" else set()
        unwanted |= set() if effort.compile else set(OPTIONAL_SIDES)
        return [name for name in names if name not in unwanted]

    def measure(self, device: torch.device, effort: Effort) -> Times:
        if effort.compile:
            torch.compiler.reset()  # it compiles a function for eight shapes in a process, and no more
        names, tolerance = self.names(device, effort), TOLERANCE[self.precision]
        if self.level == "startup":
            return startup.measure_startup(self.what, names, self.size, tolerance, effort)
        if self.level == "fit":
            problem = training_sides.Problem(self.size, self.precision, device)
            return epochs.measure_epochs(names, problem, tolerance, effort)
        return measure(names, self._maker(device), tolerance, clocks(device), effort)

    def _maker(self, device: torch.device) -> Callable[[str], Side]:
        shape = self.size, self.precision, device
        if self.level == "op":
            return partial(op_sides.side, problem=op_sides.OpProblem(self.what, *shape))
        if self.level == "step":
            return partial(training_sides.side, problem=training_sides.Problem(*shape))
        return partial(inference_sides.side, problem=inference_sides.InferenceProblem(self.level, *shape))

    @property
    def work(self) -> Work | None:
        """FLOPs and bytes of one call, where they follow from the shapes."""
        layers = self.size.layers
        if self.level == "op":
            return work.of_op(self.what, self.size, self.precision)
        if self.level == "step":
            return work.of_step(self.size, self.precision)
        if self.level == "fit":
            step = work.of_step(self.size, self.precision)
            steps = self.rows // self.size.batch
            return Work(step.flops * steps, step.moved * steps)
        if self.level == "startup":
            return None
        layers = layers if self.level == "score" else layers[: len(self.size.features) - 1]
        return work.of_layers(layers, self.size.batch, self.precision)


# Networks and batches of what is not measured at every size, to stay within fifteen minutes: embeddings have layers of
# MNIST's sizes, and `fit` at the widest networks is its steps.
_INFERENCE = {"tabular": 65536, "mnist": 4096, "embeddings": 4096, "genes": 1024, "recsys": 500, "wide": 1024}
BATCHES = {
    "op": {"tabular": 1024, "mnist": 1024, "genes": 1024, "wide": 1024},
    "fit": {"tabular": 1024, "mnist": 256, "embeddings": 4096, "genes": 128},
    "score": _INFERENCE,
    "encode": _INFERENCE,
}


def all_cases() -> list[Case]:
    """The full benchmark."""
    cases = cases_at(SIZES, ("step",), PRECISIONS)
    for level, batches in BATCHES.items():
        sizes = [Size(name, NETWORKS[name][0], batch) for name, batch in batches.items()]
        cases += cases_at(sizes, (level,), PRECISIONS)
    mnist = Size("mnist", (784, 256, 128), 256)
    cases += [Case("startup", what, mnist, "float32") for what in startup.PROGRAMS]
    return sorted(cases, key=_order)


def quick_cases() -> list[Case]:
    """MNIST's network and a tabular step in fp32, MNIST's step in bf16 too: under two minutes."""
    wanted = {"tabular": (32, 1024), "mnist": (256, 1024, 4096)}
    return [
        case
        for case in all_cases()
        if case.size.batch in wanted.get(case.size.network, ())
        and (case.precision == "float32" or (case.level, case.size.batch) == ("step", 256))
        and (case.size.network == "mnist" or case.level == "step")
    ]


def cases_at(sizes: Sequence[Size], levels: Sequence[str], precisions: Sequence[str]) -> list[Case]:
    """Every case of the levels at the sizes, start-up aside."""
    whats = {"op": tuple(op_sides.OPS), "step": ("training step",)}
    cases = [
        Case(level, what, size, precision)
        for level in levels
        if level in (*whats, *BATCHES)
        for what in whats.get(level, (level,))
        for size in sizes
        for precision in precisions
    ]
    return sorted(cases, key=_order)


def _order(case: Case) -> tuple[int, int, int, int, int]:
    whats = (*op_sides.OPS, "training step", *LEVELS, *startup.PROGRAMS)
    networks = [*NETWORKS, case.size.network]
    return (
        LEVELS.index(case.level),
        whats.index(case.what),
        networks.index(case.size.network),
        case.size.batch,
        PRECISIONS.index(case.precision),
    )
