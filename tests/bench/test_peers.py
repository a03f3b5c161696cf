"""The peer benchmark's own pieces, none of which needs a peer: the refusal of ratios, the table, a child process."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

from peers import __main__ as run  # noqa: E402
from peers import report  # noqa: E402
from peers.problem import PROBLEMS, PeerProblem  # noqa: E402
from peers.report import Result  # noqa: E402
from peers.variants import VARIANTS, Fastae, load, torch_network  # noqa: E402

SMALL = PeerProblem("tabular", (30, 8, 4), 16, 2, 40)


def one(loss=0.1, fit_s=1.0, score_s=0.5, peak_mib=300.0, mean_score=None):
    return {"rows": 1000, "fit_s": fit_s, "scored": 500, "score_s": score_s, "loss": loss, "peak_mib": peak_mib,
            "mean_score": loss if mean_score is None else mean_score}  # fmt: skip


def result(variant, *rounds):
    versions = dict.fromkeys(VARIANTS[variant].packages, "1.2")
    return Result(variant, "tabular", versions, 250.0, list(rounds))


def table(*results):
    entry = {"machine": "a machine", "commit": "abc", "rounds": 3, "load": 0.2, "command": "make bench-peers",
             "problem": asdict(SMALL), "results": [asdict(r) for r in results]}  # fmt: skip
    text = report.markdown({"problems": {"tabular": json.loads(json.dumps(entry))}})
    return [line for line in text.splitlines() if line.startswith("| ") and "library" not in line], text


# ---------------------------------------------------------------- the table


def test_rates_and_ratios_are_medians_round_by_round():
    """Both variants slow down by the same factor in one round: the ratio does not move."""
    ours = result("fastae", one(fit_s=1.0), one(fit_s=4.0), one(fit_s=1.0))
    theirs = result("Keras", one(fit_s=5.0), one(fit_s=20.0), one(fit_s=5.0, peak_mib=400.0))
    rows, text = table(ours, theirs)
    assert rows[0] == "| fastae 1.2 | 1,000 | - | 1,000 | - | 0.10000 | 300 | 50 |"
    assert rows[1] == "| Keras 1.2 | 200 | 5.00 (5.00 to 5.00) | 1,000 | 1.00 (1.00 to 1.00) | 0.10000 | 400 | 150 |"
    assert "a machine, load average 0.2 at the start. Commit abc, `make bench-peers`." in text
    assert "30-8-4-8-30, batch 16, float32" in text


@pytest.mark.parametrize(("loss", "said"), [(0.2, "+100%"), (0.09, "-10%"), (float("nan"), "+nan%")])
def test_no_ratio_between_unlike_results(loss, said):
    rows, _ = table(result("fastae", *[one()] * 3), result("skorch", *[one(loss=loss)] * 3))
    assert (
        f"| no ratio: final loss {said} from fastae's | 1,000 | no ratio: final loss {said} from fastae's |" in rows[1]
    )
    assert "1.00" not in rows[1]


def test_a_loss_within_the_tolerance_is_compared():
    rows, _ = table(
        result("fastae", *[one()] * 3), result("skorch", *[one(loss=0.1 * (1 + report.TOLERANCE * 0.9))] * 3)
    )
    assert "no ratio" not in rows[1]


@pytest.mark.parametrize("wrong", ["ours", "theirs"])
def test_no_scoring_ratio_where_scores_are_not_the_errors(wrong):
    good, bad = one(), one(mean_score=0.3)
    ours, theirs = (
        result("fastae", bad if wrong == "ours" else good),
        result("Keras", bad if wrong == "theirs" else good),
    )
    rows, _ = table(ours, theirs)
    assert rows[1].split(" | ")[2] == "1.00 (1.00 to 1.00)"
    assert rows[1].split(" | ")[4] == "no ratio: scores 200% from the loss"


def test_a_row_that_is_not_equal_says_in_what():
    _, text = table(result("fastae", one()), result("PyOD", one()))
    assert "PyOD differs: drops the last, short batch" in text


def test_committed_results_are_what_their_json_gives():
    """The published table is made from the published rounds, with every library in it."""
    results = BENCH / "results"
    entries = json.loads((results / "peers.json").read_text())
    assert (results / "peers.md").read_text() == report.markdown(entries)
    assert set(entries["problems"]) == set(PROBLEMS)
    for name, entry in entries["problems"].items():
        assert [r["side"] for r in entry["results"]] == [
            s for s in VARIANTS if PROBLEMS[name].precision in VARIANTS[s].precisions
        ]
        assert all(len(r["rounds"]) == entry["rounds"] >= 5 for r in entry["results"])
        assert {**entry["problem"], "features": tuple(entry["problem"]["features"])} == asdict(PROBLEMS[name])


# ---------------------------------------------------------------- the variants


def test_every_torch_variant_starts_from_the_same_weights():
    x = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    network = torch_network(SMALL)
    load(network, SMALL, 3)
    variant = Fastae(SMALL, x)
    variant.prepare(3, 1)
    theirs = network(torch.from_numpy(x))
    torch.testing.assert_close(variant.model(torch.from_numpy(x)), theirs, rtol=1e-5, atol=1e-6)
    assert len(network) == 2 * len(SMALL.widths) - 3  # no activation after the last layer
    variant.prepare(4, 1)
    assert not torch.allclose(variant.model(torch.from_numpy(x)), theirs, atol=1e-3)


@pytest.mark.thorough
def test_our_variant_in_a_process_of_its_own():
    problem = PeerProblem("tabular", (30, 8, 4), 16, 2, 40, "bfloat16")
    (found,) = run.compare(problem, ["fastae"], 2)
    assert found.versions == {"fastae": "0.1.0", "torch": torch.__version__}
    assert found.baseline_mib > 50
    assert [r["rows"] for r in found.rounds] == [80, 80]
    assert found.rounds[0]["loss"] != found.rounds[1]["loss"]  # another seed
    assert all(r["mean_score"] == pytest.approx(r["loss"], rel=report.SCORE_TOLERANCE) for r in found.rounds)
    assert all(r["fit_s"] > 0 and r["score_s"] > 0 and r["peak_mib"] >= found.baseline_mib for r in found.rounds)


@pytest.mark.thorough
def test_a_library_that_is_not_there_is_named(monkeypatch, tmp_path):
    """Its process ends; the last line of what it said is the error, and no process is left."""
    (tmp_path / "skorch.py").write_text("raise ModuleNotFoundError(\"No module named 'skorch'\")\n")  # if it is there
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(":"))
    made = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    with pytest.raises(RuntimeError, match=r"^skorch stopped: ModuleNotFoundError: No module named 'skorch'"):
        run.compare(SMALL, ["fastae", "skorch"], 1)
    assert all(process.poll() is not None for process in made)


def test_a_wrong_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers", "--problems", "mnist,tabulr"])
    with pytest.raises(SystemExit):
        run.main()
    assert "'tabulr' is none of mnist, mnist-bf16, tabular" in capsys.readouterr().err
