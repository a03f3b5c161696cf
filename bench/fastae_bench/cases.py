"""Benchmark cases by level, at the sizes people have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fastae_bench import conv_variants, cost, epochs, inference_variants, op_variants, startup, training_variants
from fastae_bench.clocks import clocks
from fastae_bench.cost import Cost
from fastae_bench.rounds import OPTIONAL_VARIANTS, Budget, Times, measure
from fastae_bench.sizes import BENCH_PRECISIONS, NETWORKS, SIZES, Size
from fastae_bench.variants import MATMUL_ONLY, TOLERANCE, Variant

LEVELS = ("op", "step", "conv", "fit", "score", "encode", "startup")


@dataclass(frozen=True)
class BenchCase:
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
            return training_variants.rows_of_data(self.size)
        return 1 if self.level == "startup" else self.size.batch

    def names(self, device: torch.device, budget: Budget) -> list[str]:
        """The variants of this case on the device."""
        variants = {
            "op": op_variants, "step": training_variants, "conv": conv_variants, "fit": epochs, "startup": startup,
        }.get(self.level, inference_variants)  # fmt: skip
        names = variants.CPU_VARIANTS if device.type == "cpu" else variants.CUDA_VARIANTS
        unwanted = {MATMUL_ONLY} if self.what == "mse_loss" else set()
        unwanted |= set() if budget.compile else set(OPTIONAL_VARIANTS)
        return [name for name in names if name not in unwanted]

    def measure(self, device: torch.device, budget: Budget) -> Times:
        if budget.compile:
            torch.compiler.reset()  # it compiles a function for eight shapes in a process, and no more
        names, tolerance = self.names(device, budget), TOLERANCE[self.precision]
        if self.level == "startup":
            return startup.measure_startup(self.what, names, self.size, tolerance, budget)
        if self.level == "fit":
            problem = training_variants.TrainingProblem(self.size, self.precision, device)
            return epochs.measure_epochs(names, problem, tolerance, budget)
        return measure(names, self._maker(device), tolerance, clocks(device), budget)

    def _maker(self, device: torch.device) -> Callable[[str], Variant]:
        shape = self.size, self.precision, device
        if self.level == "op":
            return partial(op_variants.variant, problem=op_variants.OpProblem(self.what, *shape))
        if self.level == "step":
            return partial(training_variants.variant, problem=training_variants.TrainingProblem(*shape))
        if self.level == "conv":
            return partial(training_variants.variant, problem=conv_variants.ConvProblem(*shape))
        return partial(inference_variants.variant, problem=inference_variants.InferenceProblem(self.level, *shape))

    @property
    def cost(self) -> Cost | None:
        """FLOPs and bytes of one call, where they follow from the shapes."""
        layers = self.size.layers
        if self.level == "op":
            return cost.of_op(self.what, self.size, self.precision)
        if self.level == "step":
            return cost.of_step(self.size, self.precision)
        if self.level == "fit":
            step = cost.of_step(self.size, self.precision)
            steps = self.rows // self.size.batch
            return Cost(step.flops * steps, step.moved * steps)
        if self.level in ("conv", "startup"):
            return None
        layers = layers if self.level == "score" else layers[: len(self.size.features) - 1]
        return cost.of_layers(layers, self.size.batch, self.precision)


# Networks and batches of what is not measured at every size, to stay within fifteen minutes: embeddings have layers of
# MNIST's sizes, and `fit` at the widest networks is its steps.
_INFERENCE = {"tabular": 65536, "mnist": 4096, "embeddings": 4096, "genes": 1024, "recsys": 500, "wide": 1024}
BATCHES = {
    "op": {"tabular": 1024, "mnist": 1024, "genes": 1024, "wide": 1024},
    "fit": {"tabular": 1024, "mnist": 256, "embeddings": 4096, "genes": 128},
    "score": _INFERENCE,
    "encode": _INFERENCE,
}


def all_cases() -> list[BenchCase]:
    """The full benchmark."""
    cases = cases_at(SIZES, ("step",), BENCH_PRECISIONS)
    for level, batches in BATCHES.items():
        sizes = [Size(name, NETWORKS[name][0], batch) for name, batch in batches.items()]
        cases += cases_at(sizes, (level,), BENCH_PRECISIONS)
    cases += [BenchCase("conv", "convolutional step", conv_variants.SIZE, p) for p in BENCH_PRECISIONS]
    mnist = Size("mnist", (784, 256, 128), 256)
    cases += [BenchCase("startup", what, mnist, "float32") for what in startup.PROGRAMS]
    return sorted(cases, key=_order)


def quick_cases() -> list[BenchCase]:
    """MNIST's network and a tabular step in fp32, MNIST's step in bf16 too: under two minutes."""
    wanted = {"tabular": (32, 1024), "mnist": (256, 1024, 4096), "images": (128,)}
    return [
        case
        for case in all_cases()
        if case.size.batch in wanted.get(case.size.network, ())
        and (case.precision == "float32" or (case.level, case.size.batch) == ("step", 256))
        and (case.size.network != "tabular" or case.level == "step")
    ]


def cases_at(sizes: Sequence[Size], levels: Sequence[str], precisions: Sequence[str]) -> list[BenchCase]:
    """Every case of the levels at the sizes, start-up aside."""
    whats = {"op": tuple(op_variants.OPS), "step": ("training step",)}
    cases = [
        BenchCase(level, what, size, precision)
        for level in levels
        if level in (*whats, *BATCHES)
        for what in whats.get(level, (level,))
        for size in sizes
        for precision in precisions
    ]
    return sorted(cases, key=_order)


def _order(case: BenchCase) -> tuple[int, int, int, int, int]:
    whats = (*op_variants.OPS, "training step", "convolutional step", *LEVELS, *startup.PROGRAMS)
    networks = [*NETWORKS, case.size.network]
    return (
        LEVELS.index(case.level),
        whats.index(case.what),
        networks.index(case.size.network),
        case.size.batch,
        BENCH_PRECISIONS.index(case.precision),
    )
