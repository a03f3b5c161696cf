"""`fastae.profile`: its groups add up, its trace is what Perfetto reads, the model stays as it was, every error."""

import json
import re
import sys

import pytest
import torch

import fastae
from fastae import profile
from fastae.analysis.profile import _group
from fastae.analysis.profile_result import GROUPS
from fastae.cli import main as cli


def model(**options):
    torch.manual_seed(0)
    return fastae.DenseAutoencoder([20, 9, 5], **options)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    trace = tmp_path_factory.mktemp("p") / "deep" / "trace.json"
    return profile(model(activation="gelu"), torch.rand(16, 20), steps=4, trace=trace, progress=False)


def test_every_op_of_the_schedule_is_a_part_in_the_order_in_which_it_runs(found):
    explained = fastae.explain(model(activation="gelu"), 16)
    ran = [(part.name, part.layer) for part in found.parts if part.layer]
    assert ran == [(row.op, row.layer) for row in explained.rows if row.layer]
    assert {part.name for part in found.parts if not part.layer} == {"gather and total", "between the ops", "optimizer"}
    assert found.flops == sum(row.flops for row in explained.rows)


def test_the_groups_add_up_to_the_step_and_each_op_multiplies(found):
    assert set(found.us) == set(GROUPS)
    assert found.profiled_us == pytest.approx(sum(us for part in found.parts for us in part.us.values()))
    assert all(part.us["products"] > 0 for part in found.parts if part.layer)
    assert all(found.us[group] > 0 for group in GROUPS if group not in ("copies", "convolutions"))
    assert all(us >= 0 for part in found.parts for us in part.us.values())
    assert min(found.step_us, found.autograd_us, found.bare_us) > 0
    shares = re.search(r"^ share .*$", str(found), re.MULTILINE).group()
    percent = [int(share) for share in re.findall(r"(\d+) ?%", shares)]
    assert percent[0] == 100
    assert sum(percent[1:]) == pytest.approx(100, abs=len(GROUPS))  # rounded


def test_all_of_a_step_is_attributed(tmp_path):
    """The parts of one step add up to its range in the trace."""
    one = profile(model(), torch.rand(16, 20), steps=1, trace=tmp_path / "t.json", progress=False)
    (whole,) = (e["dur"] for e in events(one) if e["name"] == "fastae::step")
    assert one.profiled_us == pytest.approx(whole, rel=0.01)


def events(found):
    with open(found.trace) as file:
        return [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]


def test_the_trace_is_json_with_a_range_for_every_op_of_every_step(found):
    names = [e["name"] for e in events(found)]
    for part in found.parts:
        if part.layer:
            assert names.count(f"fastae::{part.name} {part.layer}") == 4
    assert names.count("fastae::step") == names.count("fastae::optimizer") == 4
    inside = {e["name"]: e for e in events(found)}
    step, op = inside["fastae::step"], inside["fastae::linear_act_fwd encoder.0"]
    assert step["ts"] <= op["ts"]
    assert op["ts"] + op["dur"] <= step["ts"] + step["dur"]
    assert any(name in names for name in ("aten::addmm", "mkldnn::_linear_pointwise"))


def test_the_model_stays_as_it_was_and_normal_steps_have_no_ranges():
    ae = model().eval()
    before = {name: p.detach().clone() for name, p in ae.named_parameters()}
    profile(ae, torch.rand(8, 20).numpy(), steps=1, precision="bfloat16", progress=False)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in ae.named_parameters())
    assert not ae.training
    step = fastae.TrainStep(ae, torch.optim.Adam(ae.parameters(), fused=True), 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as ran:
        step(torch.rand(8, 20))
    assert not [e.name for e in ran.events() if e.name.startswith("fastae::") and e.is_user_annotation]


@pytest.mark.parametrize(
    ("event", "where", "group"),
    [
        ("aten::addmm", "linear_act_fwd encoder.0", "products"),
        ("mkldnn::_linear_pointwise", "linear_wgrad decoder.1", "products"),
        ("aten::sum", "linear_wgrad decoder.1", "bias sums"),
        ("aten::clone", "linear_wgrad decoder.1", "copies"),
        ("aten::gelu", "linear_act_fwd encoder.0", "activations"),
        ("aten::threshold_backward", "linear_dgrad_act decoder.1", "activations"),
        ("aten::dot", "linear_act_loss decoder.1", "loss"),
        ("aten::mul_", "compute", "loss"),
        ("aten::_foreach_copy_", "compute", "copies"),
        ("aten::index_select", "step", "gather"),
        ("aten::add_", "step", "python"),
        ("aten::_fused_adam_", "optimizer", "optimizer"),
        ("aten::empty", "linear_wgrad decoder.1", "python"),
        ("fastae::linear_wgrad decoder.1", "linear_wgrad decoder.1", "python"),
    ],
)
def test_groups(event, where, group):
    assert _group(event, where) == group


@pytest.mark.parametrize(
    ("batch", "options", "error", "text"),
    [
        (torch.rand(4, 19), {}, ValueError, "profile: batch must be [rows, 20]; got [4, 19]"),
        ([[1.0]], {}, TypeError, "profile: batch must be a numpy array or a torch.Tensor; got list"),
        (torch.rand(4, 20), {"steps": 0}, ValueError, "steps and rows must be at least 1; got 0 steps of 4 rows"),
        (torch.rand(0, 20), {}, ValueError, "steps and rows must be at least 1; got 20 steps of 0 rows"),
        (torch.rand(4, 20), {"steps": 1.5}, TypeError, "profile: steps must be a whole number; got 1.5"),
        (torch.rand(4, 20), {"precision": "fp8"}, ValueError, "must be None, 'float32' or 'bfloat16'; got 'fp8'"),
    ],
)
def test_errors(batch, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        profile(model(), batch, **options)


def test_another_model_is_refused_and_an_island_profiled(capsys):
    with pytest.raises(TypeError, match=r"^profile: model must be an autoencoder of fastae; got Linear$"):
        profile(torch.nn.Linear(3, 3), torch.rand(4, 3))
    ae = fastae.DenseAutoencoder([6, 4])
    ae.encoder.append(torch.nn.BatchNorm1d(4))
    found = profile(ae, torch.rand(8, 6), steps=2, progress=False)
    assert found.us["products"] > 0
    assert found.us["loss"] > 0


def test_the_command(monkeypatch, capfd, tmp_path):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastae", "profile", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, *capfd.readouterr()

    trace = tmp_path / "t.json"
    small = ("--features", "20,9,5", "--batch", 8, "--steps", 2)
    code, out, _ = run(*small, "--trace", trace)
    assert code == 0
    assert out.startswith("20-9-5-9-20, batch 8, float32, on ")
    assert json.loads(trace.read_text())["traceEvents"]
    before = trace.read_bytes()
    code, _, err = run(*small, "--trace", trace)
    assert (code, err) == (2, f"fastae: --trace: {trace} exists; add --force to overwrite it\n")
    assert trace.read_bytes() == before
    code, _, err = run("--features", "20,9,5", "--batch", 0)
    assert (code, err) == (2, "fastae: --batch must be at least 1; got 0\n")
