"""Every way of writing a piece of work computes the same, and a variant that does not gets no ratio."""

from dataclasses import replace

import pytest
import torch
from fastae_bench import clocks, epochs, startup
from fastae_bench.cases import LEVELS, BenchCase, all_cases, cases_at, quick_cases
from fastae_bench.cost import of_layers, of_op, of_step
from fastae_bench.growth import measure_growth
from fastae_bench.growth_points import Point
from fastae_bench.memory import peaks_mib
from fastae_bench.peak import measure_peak
from fastae_bench.report import line, ratio_cell
from fastae_bench.results import Measured
from fastae_bench.rounds import Budget, measure, take_turns
from fastae_bench.sizes import NETWORKS, SIZES, Size
from fastae_bench.training_variants import TrainingProblem, variant
from fastae_bench.variants import FASTAE, MATMUL_ONLY, TOLERANCE, Variant, difference, relative_distance
from torch import Tensor

from fastae.analysis.plain import PlainAutoencoder
from fastae.analysis.products import multiplications

CPU = torch.device("cpu")
TINY = Size("own", (12, 8, 4), 512)
ONCE = Budget(rounds=1, slice_s=0, limit_s=0, compile=False)
CASES = cases_at([TINY], LEVELS, tuple(TOLERANCE))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_a_micro_run_of_every_case(case: BenchCase) -> None:
    times = case.measure(CPU, ONCE)
    assert (times.refused, times.missing) == ({}, {})
    assert list(times.seconds) == ["wall"]
    assert list(times.seconds["wall"]) == case.names(CPU, ONCE)
    assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in times.seconds["wall"].values())
    measured = Measured.of(case, times)
    assert set(measured.ratios) == {"idiom", "tuned"}
    assert f"tuned {measured.ratios['tuned'].median:5.2f}" in line(measured)


@pytest.mark.thorough
@pytest.mark.parametrize("what", startup.PROGRAMS)
def test_a_micro_run_of_start_up(what: str) -> None:
    case = BenchCase("startup", what, TINY, "float32")
    times = case.measure(CPU, ONCE)
    assert (times.refused, times.missing) == ({}, {})
    assert set(times.seconds["wall"]) == set(startup.PROGRAMS[what]) - {"compiled"}


@pytest.mark.filterwarnings("default")  # torch.compile warns of what concerns PyTorch alone
def test_a_compiled_variant_runs_or_says_why_not() -> None:
    times = BenchCase("score", "score", TINY, "float32").measure(CPU, replace(ONCE, compile=True))
    assert times.refused == {}
    assert ("compiled" in times.seconds["wall"]) != ("compiled" in times.missing)


def test_torch_compile_is_reset_before_every_case(monkeypatch) -> None:
    """Without it, the ninth shape is refused: dynamo's recompile_limit."""
    seen = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: seen.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = BenchCase("score", "score", TINY, "float32")
    for _ in range(2):
        assert "compiled" in case.measure(CPU, replace(ONCE, compile=True)).seconds["wall"]
    assert seen == ["reset", "reset"]


@pytest.mark.parametrize("level", ["step", "fit"])
def test_where_torch_compile_fails_the_other_variants_are_measured(level: str, monkeypatch) -> None:
    def fails(*_, **__):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    case = next(case for case in CASES if case.level == level)
    times = case.measure(CPU, replace(ONCE, compile=True))
    assert times.missing == {"compiled": "RuntimeError: no C++ compiler found"}
    assert {FASTAE, "idiom", "tuned"} <= set(times.seconds["wall"])


def test_a_failure_of_any_other_variant_is_an_error() -> None:
    def fails() -> dict[str, Tensor]:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure([FASTAE], lambda name: Variant(name, fails, fails), 1e-3, clocks.clocks(CPU), ONCE)


# ---------------------------------------------------------------- refusal


def test_a_wrong_variant_is_refused_and_never_timed() -> None:
    problem, timed = TrainingProblem(TINY, "float32", CPU), []

    def make(name: str) -> Variant:
        made = variant(name, problem)
        if name != "tuned":
            return made
        wrong = {**made.results(), "loss 1": made.results()["loss 1"] * 1.1}
        return Variant(name, lambda: timed.append(name), lambda: wrong)

    times = measure([FASTAE, "idiom", "tuned"], make, TOLERANCE["float32"], clocks.clocks(CPU), ONCE)
    assert set(times.refused) == {"tuned"}
    assert "loss 1 differs by" in times.refused["tuned"]
    assert "allowed 1e-03" in times.refused["tuned"]
    assert timed == []
    measured = Measured.of(CASES[0], times)
    assert set(measured.ratios) == {"idiom"}
    assert ratio_cell(measured, "tuned") == "refused"
    assert "tuned REFUSED (loss 1 differs by" in line(measured)


def test_a_variant_that_trains_another_network_is_refused() -> None:
    problem = TrainingProblem(TINY, "float32", CPU)

    def make(name: str) -> Variant:
        if name == "tuned":
            other = TrainingProblem(TINY, "float32", CPU)
            torch.nn.init.zeros_(other.model.decoder[0].bias)
            return variant(name, other)
        return variant(name, problem)

    times = measure([FASTAE, "tuned"], make, TOLERANCE["float32"], clocks.clocks(CPU), ONCE)
    assert "gradient" in times.refused["tuned"]


def test_a_variant_whose_updates_differ_is_refused(monkeypatch) -> None:
    """The first losses and gradients are equal; another learning rate shows in the losses after it."""
    problem = TrainingProblem(TINY, "float32", CPU)
    ours = variant(FASTAE, problem).results()
    assert difference(ours, variant("tuned", problem).results(), TOLERANCE["float32"]) is None
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, **options: adam(parameters, lr=3e-3, **options))
    differs = difference(ours, variant("tuned", problem).results(), TOLERANCE["float32"])
    assert differs is not None
    assert "loss 1" not in differs
    assert "gradient" not in differs
    assert "loss 3 differs" in differs


def test_an_epoch_that_differs_is_refused(monkeypatch) -> None:
    real = epochs._epoch
    monkeypatch.setattr(
        epochs, "_epoch", lambda name, p: (lambda: 2 * real(name, p)()) if name == "idiom" else real(name, p)
    )
    case = next(case for case in CASES if case.level == "fit")
    times = case.measure(CPU, ONCE)
    assert set(times.refused) == {"idiom"}
    assert set(times.seconds["wall"]) == {FASTAE, "tuned"}


def test_start_up_that_differs_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(startup, "PROGRAMS", {"load": {FASTAE: "1.0", "tuned": "2.0"}})
    monkeypatch.setattr(startup, "_run", lambda program, *_: (0.1, float(program)))
    times = startup.measure_startup("load", (FASTAE, "tuned"), TINY, 1e-3, replace(ONCE, rounds=3))
    assert set(times.refused) == {"tuned"}
    assert times.seconds["wall"] == {FASTAE: [0.1] * 3}


def test_what_counts_as_a_difference() -> None:
    one = {"y": torch.ones(4)}
    assert difference(one, {"y": torch.ones(4) + 5e-4}, 1e-3) is None
    assert difference(one, {"y": torch.ones(4) + 5e-3}, 1e-3) == "y differs by 5.0e-03, allowed 1e-03"
    assert difference(one, {"y": torch.full((4,), torch.nan)}, 1e-3) == "y differs by nan, allowed 1e-03"
    assert difference(one, {"y": torch.ones(1)}, 1e-3) == "y is [4] here and [1] there"
    assert difference(one, {"z": torch.ones(4)}, 1e-3) == "results are ['y'] here and ['z'] there"
    assert difference({"y": torch.zeros(3)}, {"y": torch.zeros(3)}, 1e-3) is None
    assert relative_distance(torch.ones(2), torch.zeros(2)) == float("inf")


# ---------------------------------------------------------------- turns, sizes, peaks


def test_variants_alternate_and_every_round_begins_with_another() -> None:
    calls: list[str] = []
    variants = [Variant(name, lambda name=name: calls.append(name)) for name in "abc"]
    took = take_turns(variants, lambda run, _: (run(), 1.0)[1], Budget(rounds=4, slice_s=0, limit_s=1e9))
    assert {name: len(rounds) for name, rounds in took.items()} == {"a": 4, "b": 4, "c": 4}
    assert "".join(calls[-12:]) == "abcbcacababc"


def test_slow_cases_get_fewer_rounds_but_five() -> None:
    variants = [Variant("a", lambda: None)]
    took = take_turns(variants, lambda run, calls: 2.0, Budget(rounds=50, slice_s=0, limit_s=14.0))
    assert len(took["a"]) == 7
    took = take_turns(variants, lambda run, calls: 100.0, Budget(rounds=50, slice_s=0, limit_s=14.0))
    assert len(took["a"]) == 5


def test_the_listed_sizes_are_all_measured() -> None:
    steps = {(case.size, case.precision) for case in all_cases() if case.level == "step"}
    assert steps == {(size, precision) for size in SIZES for precision in TOLERANCE}
    for level in ("score", "encode"):
        assert {case.size.network for case in all_cases() if case.level == level} == set(NETWORKS)
    assert {case.level for case in quick_cases()} == set(LEVELS)
    keys = [case.key for case in all_cases()]
    assert len(keys) == len(set(keys))


def test_work_is_counted_from_the_shapes() -> None:
    assert TINY.layers == [(12, 8), (8, 4), (4, 8), (8, 12)]
    assert of_layers([(12, 8)], 512, "float32") == (2 * 512 * 12 * 8, 4 * (512 * 12 + 12 * 8 + 512 * 8))
    products = 512 * (12 * 8 + 8 * 4 + 4 * 8 + 8 * 12)
    assert of_step(TINY, "bfloat16").flops == 6 * products - 2 * 512 * 12 * 8
    assert of_op("mse_loss", TINY, "bfloat16") == (0, 3 * 512 * 12 * 2)
    assert TINY.parameters == sum(p.numel() for p in TrainingProblem(TINY, "float32", CPU).model.parameters())


def test_matmul_only_multiplies_right() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(3, 5), torch.rand(4, 5)
    for way in multiplications(a, b.t()):
        torch.testing.assert_close(way(), a @ b.t())


def test_a_plain_network_with_another_activation_is_refused() -> None:
    import fastae

    with pytest.raises(ValueError, match="activations must be relu or identity; got 'gelu'"):
        PlainAutoencoder(fastae.DenseAutoencoder([4, 3, 2], activation="gelu"))


def test_peaks_are_positive_rates(monkeypatch) -> None:
    monkeypatch.setattr("fastae_bench.peak.CPU_WIDTHS", (32,))
    peak = measure_peak(CPU, ("float32", "bfloat16"))
    assert min(*peak.flops_per_s.values(), peak.bytes_per_s) > 0


@pytest.mark.thorough
def test_memory_grows_with_the_layers() -> None:
    small, large = Point("width", [64, 32, 16], 32), Point("width", [1024, 512, 256], 32)
    peaks = peaks_mib("tuned", [small, large], CPU)
    parameters = 2 * (1024 * 512 + 512 * 256)
    assert not peaks or peaks[1] - peaks[0] > 4 * 4 * parameters / 2**20 * 0.9  # weights, gradients, two averages


def test_curves_have_a_time_at_every_point(monkeypatch) -> None:
    monkeypatch.setattr("fastae_bench.growth.peaks_mib", lambda variant, points, device: [5.0] * len(points))
    steps = [Point("depth", [8] * depth, 16) for depth in (2, 3, 4)]
    monkeypatch.setattr("fastae_bench.growth.AXES", {
        "depth": ("step", steps), "rows": ("epoch", [Point("rows", [12, 8, 4], 16, rows) for rows in (16, 32, 48, 64)]),
    })  # fmt: skip
    curves = list(measure_growth(CPU, replace(ONCE, points=3)))
    assert [(c.axis, c.side, c.x) for c in curves] == [
        (axis, variant, x)
        for axis, x in (("depth", [2, 4, 6]), ("rows", [16, 48, 64]))
        for variant in (FASTAE, "tuned")
    ]
    assert all(len(c.seconds) == 3 and min(c.medians) > 0 and c.peak_mib == [5.0] * 3 for c in curves)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_a_micro_run_of_every_case_on_a_gpu(case: BenchCase) -> None:
    cuda = torch.device("cuda")
    times = case.measure(cuda, ONCE)
    assert times.refused == {}
    assert {FASTAE, "tuned"} <= set(next(iter(times.seconds.values()))) <= {*case.names(cuda, ONCE), MATMUL_ONLY}
    assert case.level == "fit" or list(times.seconds) == ["step", "host", "kernel"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("level", ["step", "score", "op"])
def test_the_modes_of_torch_compile_on_a_gpu(level: str) -> None:
    case = next(case for case in CASES if case.level == level)
    times = case.measure(torch.device("cuda"), replace(ONCE, compile=True))
    assert (times.refused, times.missing) == ({}, {})


@pytest.mark.gpu
def test_peaks_of_memory_on_a_gpu() -> None:
    small, large = Point("width", [64, 32, 16], 32), Point("width", [1024, 512, 256], 32)
    peaks = peaks_mib("tuned", [small, large], torch.device("cuda"))
    assert peaks[1] - peaks[0] > 4 * 4 * 2 * (1024 * 512 + 512 * 256) / 2**20 * 0.9
