"""`fastae bench` as a user meets it: what it prints and writes, comparisons, errors in one line."""

import json
import random
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fastae_bench import command, compare
from fastae_bench.command import BenchOptions
from fastae_bench.peak import Peak
from fastae_bench.report import duration, markdown, summary
from fastae_bench.results import Curve, Measured, Results, read_results
from fastae_bench.rounds import Budget, Times
from fastae_bench.spread import Spread

from fastae.cli import main as cli

TINY = ("--features", "12,8,4", "--batch", "512", "--rounds", "2", "--no-compile")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`fastae bench ARGS` in an empty folder, with small peaks: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "FULL", Budget(slice_s=0))
    monkeypatch.setattr(command, "measure_peak", lambda *_: Peak({"float32": 1e11, "bfloat16": 4e11}, 2e10))

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["fastae", "bench", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


def measured(seed=0, batch=256, ours=1.0, tuned=1.5, noise=0.02, **other):
    """A training step whose rounds scatter around the times given, in ms."""
    draw = random.Random(seed)
    took = {
        name: [ms / 1e3 * draw.gauss(1, noise) for _ in range(15)]
        for name, ms in (("fastae", ours), ("idiom", 2 * tuned), ("tuned", tuned))
    }
    key = f"training step 784-256-128 x {batch} float32"
    one = Measured("step", "training step", "mnist", [784, 256, 128], batch, "float32", key, batch, 10**8, 10**7,
                   {"wall": took}, {}, {})  # fmt: skip
    return replace(one, **other)


def results(*cases, machine="a processor, 2 cores"):
    described = {"machine": machine, "device": "cpu", "versions": "fastae 0.1.0, Python 3.11, torch 2.13.0",
                 "commit": "abc", "precision": "highest", "backend": "auto", "command": "fastae bench"}  # fmt: skip
    return Results(described, {}, {"float32": 1e11}, 2e10, list(cases))


# ---------------------------------------------------------------- the report


@pytest.mark.thorough
def test_a_network_of_your_own_from_start_to_report(run) -> None:
    code, out, err = run(*TINY, "--report", "r")
    assert (code, err) == (0, "")
    assert "training step               12-8-4" in out
    assert "Against the better of tuned and compiled PyTorch, fastae is faster in" in out
    levels = ("op", "step", "fit", "score", "encode")
    plots = [f"ratios-{level}.png" for level in levels] + ["roofline.png"]
    assert f"left in r: bench.md, bench.json, {', '.join(plots)}" in out
    assert sorted(path.name for path in Path("r").iterdir()) == sorted(["bench.md", "bench.json", *plots])
    assert all(Path("r", name).read_bytes().startswith(b"\x89PNG") for name in plots)
    text = Path("r/bench.md").read_text()
    assert "- machine: " in text
    assert "- command: `fastae bench --features 12,8,4 --batch 512" in text
    assert "| own 12-8-4 | 512 | float32 |" in text
    assert all(f"]({name})" in text for name in plots)
    document = json.loads(Path("r/bench.json").read_text())
    assert set(document["machine"]) == {"machine", "device", "versions", "commit", "precision", "backend", "command"}
    assert len(document["measured"]) == 2 * 8
    assert read_results(Path("r/bench.json")).to_json() == Path("r/bench.json").read_text()


def test_without_matplotlib_the_report_has_no_plots_and_says_so(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, _ = run(*TINY, "--only", "score", "--precision", "float32", "--report", "r")
    assert code == 0
    assert "no plots: plots need matplotlib: pip install 'fastae[plots]'" in out
    assert sorted(path.name for path in Path("r").iterdir()) == ["bench.json", "bench.md"]
    assert "No plots: matplotlib was not installed." in Path("r/bench.md").read_text()


def test_sittings_put_their_rounds_together(run) -> None:
    choice = ("--features", "12,8,4", "--only", "score,fit", "--precision", "float32", "--no-compile", "--report", "r")
    code, out, _ = run(*choice, "--rounds", "6", "--sittings", "2")
    assert code == 0
    assert out.count("\nsitting 2 of 2, with the rounds before it:\n") == 1
    measured = read_results(Path("r/bench.json")).measured
    assert [m.what for m in measured] == ["fit", "score"]
    assert all(len(rounds) == 6 for m in measured for rounds in m.took.values())


def test_a_case_that_has_had_its_time_needs_no_further_sitting(run, monkeypatch) -> None:
    seen = []

    def fake(case, device, budget):
        seen.append(budget)
        return Times({"wall": {"fastae": [0.4] * budget.rounds, "tuned": [0.6] * budget.rounds}})

    monkeypatch.setattr("fastae_bench.cases.BenchCase.measure", fake)
    for limit_s, sittings in ((1.0, 1), (9.0, 2), (10.0, 3)):  # of 1 s a round: 5, then 10 in two sittings
        seen.clear()
        monkeypatch.setattr(command, "FULL", Budget(rounds=15, limit_s=limit_s))
        run("--features", "12,8,4", "--only", "score", "--precision", "float32")
        assert [budget.rounds for budget in seen] == [5] * sittings


def test_a_sitting_has_its_share() -> None:
    share = Budget(rounds=15, fewest=5, limit_s=6.0, sittings=3).of_a_sitting()
    assert (share.rounds, share.fewest, share.limit_s, share.sittings) == (5, 3, 2.0, 1)
    whole = Budget(sittings=1)
    assert whole.of_a_sitting() == whole
    assert BenchOptions(rounds=1).budget.sittings == 1


def test_a_variant_that_a_later_sitting_refuses_has_no_ratio() -> None:
    m = measured()
    later = {name: [0.001] for name in ("fastae", "idiom")}
    m.add(Times({"wall": later}, refused={"tuned": "loss differs"}))
    assert set(m.ratios) == {"idiom"}
    assert len(m.took["fastae"]) == 16


def test_results_that_differ_end_in_exit_code_1_and_no_ratio(run, monkeypatch) -> None:
    monkeypatch.setattr("fastae_bench.cases.TOLERANCE", {"float32": -1.0})
    code, out, _ = run(*TINY, "--only", "score", "--precision", "float32")
    assert code == 1
    assert "REFUSED, score 12-8-4 x 512 float32: tuned computes something else: score differs by" in out
    assert "tuned  " not in out


def test_the_worst_row_stands_in_the_head() -> None:
    slow = measured(batch=32, tuned=0.8)
    compiled_slow = measured(batch=64)
    compiled_slow.took["compiled"] = [0.9 * s for s in compiled_slow.took["fastae"]]
    text = summary(results(measured(), slow, compiled_slow))
    assert "fastae is faster in 1 of 3 cases. The worst: **0.8" in text
    assert "against tuned in training step 784-256-128 x 32 float32." in text
    lines = text.splitlines()
    assert lines[-1].startswith("- training step, 2 of 3: 0.8")
    assert lines[-1].endswith(" 0.90 (compiled) at 784-256-128 x 64 float32")
    assert "**0.90 (0.90-0.90)**" in markdown(results(compiled_slow), [])


def test_growth_in_the_report() -> None:
    found = results(measured())
    found.curves.append(Curve("rows", "epoch", "fastae", [1, 10, 100], [[0.001], [0.01], [0.1]], [4.0, 4.0, 4.0]))
    found.curves.append(Curve("rows", "epoch", "tuned", [1, 10, 100], [[0.001], [0.01], [0.1]], []))
    text = markdown(found, [])
    assert "| rows | epoch | fastae | 1 to 100 | 1.00 ± 0.00 | 0.00 ± 0.00 | 1 to 100 ms | 4 to 4 MiB |" in text
    assert "| rows | epoch | tuned | 1 to 100 | 1.00 ± 0.00 | - | 1 to 100 ms | - |" in text


def test_durations_have_a_unit_that_suits() -> None:
    assert duration(Spread(0.0000123, 0.0000456, 0.0000789)) == "45.6 µs (12.3-78.9)"
    assert duration(Spread(0.00265, 0.00271, 0.00293)) == "2.71 ms (2.65-2.93)"
    assert duration(Spread(1.0, 1.5, 12345.0)) == "1.5 s (1-12345)"


def test_the_pages_have_the_figures_of_bench_results() -> None:
    """README and docs/benchmarks.md are what `python bench/readme.py` writes; `make bench` calls it."""
    pages = runpy.run_path(str(Path(__file__).parents[2] / "bench/readme.py"), run_name="readme")["pages"]()
    assert [path.name for path in pages] == ["README.md", "benchmarks.md"]
    assert all(path.read_text() == text for path, text in pages.items()), "run python bench/readme.py"


def test_the_table_of_the_readme_is_bold_where_fastae_is_slower() -> None:
    page = runpy.run_path(str(Path(__file__).parents[2] / "bench/readme.py"), run_name="readme")
    cases = [
        measured(level=level, what=what, batch=batch or 256, ours=ours, key=what)
        for (level, what, batch), ours in zip(page["FOUR"], (1.0, 1.2, 1.4, 3.0), strict=True)
    ]
    rows = page["four"](results(*cases)).splitlines()[2:6]
    assert [row.split(" | ")[0] for row in rows][:2] == ["| training step, batch 256", "| epoch of `fit`, 256 rows"]
    assert ["**" in row for row in rows] == [False, False, False, True]
    assert "**0.5" in rows[3]


# ---------------------------------------------------------------- comparing


def compared(run, old: Results, new: Results):
    Path("old.json").write_text(old.to_json())
    Path("new.json").write_text(new.to_json())
    return run("--compare", "old.json", "--new", "new.json")


def test_slower_beyond_noise_is_exit_code_1(run) -> None:
    code, out, _ = compared(run, results(measured(0)), results(measured(1, ours=1.3)))
    assert code == 1
    assert out.splitlines()[0].startswith("slower: training step 784-256-128 x 256 float32  time x 1.3")
    assert "1 cases compared: 1 slower beyond noise, 0 faster" in out


def test_noise_is_not_slower(run) -> None:
    for seed in range(20):
        code, out, _ = compared(run, results(measured(seed)), results(measured(seed + 100)))
        assert code == 0, out
    assert compared(run, results(measured(0, noise=0.3)), results(measured(1, ours=1.2, noise=0.3)))[0] == 0


def test_two_rounds_prove_nothing(run) -> None:
    old, new = measured(0), measured(1, ours=1.5)
    for m in (old, new):
        for rounds in m.took.values():
            del rounds[4:]
    assert compared(run, results(old), results(new))[0] == 0


def test_a_busy_machine_is_not_slower(run) -> None:
    """Both variants take twice as long: the time is longer, the relative time is not."""
    code, out, _ = compared(run, results(measured(0)), results(measured(1, ours=2.0, tuned=3.0)))
    assert code == 0
    assert "0 slower beyond noise" in out


def test_a_baseline_that_became_faster_is_not_slower(run) -> None:
    assert compared(run, results(measured(0)), results(measured(1, tuned=1.0)))[0] == 0


def test_between_machines_the_relative_time_decides(run) -> None:
    old, new = results(measured(0)), results(measured(1, ours=0.5, tuned=0.5), machine="another")
    assert compared(run, old, new)[0] == 1
    assert compared(run, old, results(measured(1, ours=3.0, tuned=4.5), machine="another"))[0] == 0


def test_faster_is_told_and_is_no_failure(run) -> None:
    code, out, _ = compared(run, results(measured(0)), results(measured(1, ours=0.7)))
    assert code == 0
    assert "faster: training step" in out


def test_without_a_baseline_the_time_decides() -> None:
    alone = [measured(seed, ours=ours) for seed, ours in ((0, 1.0), (1, 1.3))]
    for m in alone:
        del m.took["tuned"], m.took["idiom"]
    changes, _ = compare.compare(results(alone[0]), results(alone[1]))
    assert [c.slower for c in changes] == [True]


def test_cases_in_one_report_only_are_counted(run) -> None:
    code, out, _ = compared(run, results(measured(0), measured(2, batch=32)), results(measured(1)))
    assert code == 0
    assert "not compared, in one of the two only: 1 cases, training step 784-256-128 x 32 float32" in out


def test_reports_with_nothing_in_common(run) -> None:
    code, _, err = compared(run, results(measured(0)), results(measured(1, batch=32)))
    assert code == 2
    assert "has no case that was measured now; nothing to compare" in err


def test_compare_measures_the_cases_of_the_old_report(run, monkeypatch) -> None:
    Path("old.json").write_text(results(measured(0)).to_json())
    seen = []

    def fake(options, cases, say):
        seen.extend(case.key for case in cases)
        assert not options.growth
        return results(measured(1))

    monkeypatch.setattr(command, "run", fake)
    assert run("--compare", "old.json")[0] == 0
    assert seen == ["training step 784-256-128 x 256 float32"]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "steps"], "--only must be of op, step, conv, fit, score, encode, startup, growth; got 'steps'"),
        (["--network", "minst"], "did you mean 'mnist'?"),
        (["--precision", "fp32"], "--precision must be of float32, bfloat16; got 'fp32'"),
        (["--features", "784"], "--features must be two or more positive widths"),
        (["--features", "784,x"], "--features must be whole numbers with commas between"),
        (["--features", "8,4", "--batch", "0"], "--batch must be positive; got 0"),
        (["--batch", "32"], "--batch needs --features"),
        (["--features", "8,4", "--network", "mnist"], "leave out --network"),
        (["--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["--sittings", "0"], "--sittings must be at least 1; got 0"),
        (["--features", "8,4", "--only", "startup"], "leave nothing to measure"),
        (["--new", "."], "File '.' is a directory"),
        (["--compare", "none.json"], "'none.json' does not exist"),
    ],
)  # fmt: skip
def test_errors_are_one_line(run, args, message) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith("fastae: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "measured": [{}], "curves": []}'])
def test_a_file_that_is_no_report(run, text) -> None:
    Path("old.json").write_text(text)
    code, _, err = run("--compare", "old.json")
    assert code == 2
    assert "old.json must be the bench.json of a fastae bench --report; got something else" in err


def test_new_without_compare(run) -> None:
    Path("new.json").write_text("{}")
    assert "--new needs --compare OLD.json" in run("--new", "new.json")[2]


def test_cuda_without_a_gpu(run, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device cuda needs a GPU" in run(*TINY, "--device", "cuda")[2]


def test_what_is_chosen() -> None:
    assert BenchOptions().growth
    assert not BenchOptions(networks=("mnist",)).growth
    assert BenchOptions(only=("growth",)).cases() == []
    keys = [case.key for case in BenchOptions(only=("step",), networks=("mnist",), precisions=("bfloat16",)).cases()]
    assert keys == [f"training step 784-256-128 x {batch} bfloat16" for batch in (256, 1024, 8192)]
    assert BenchOptions(quick=True, rounds=3, compile=False).budget.rounds == 3
