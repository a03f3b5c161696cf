"""`fastae.explain`: against counts by hand, against what a step really runs, every GPU, every error."""

import json
import re
import sys

import pytest
import torch
from fastae_kernels import onednn
from fastae_kernels.splits import split_rows
from kinds import KINDS, make

import fastae
from fastae.analysis import baseline as _baseline
from fastae.analysis import cost as _cost
from fastae.analysis.gpus import GAP_US, GPUS
from fastae.cli import main as cli
from fastae.engine import static_step
from fastae.nn import backend as _backend
from fastae.verify.eager import eager_step


@pytest.fixture(autouse=True)
def _auto(monkeypatch):
    monkeypatch.setattr(_backend._process, "name", "auto")


def step_of(features, batch, precision=None, **options):
    torch.manual_seed(0)
    ae = fastae.DenseAutoencoder(features, **options)
    return ae, fastae.TrainStep(ae, torch.optim.Adam(ae.parameters(), fused=True), batch, precision)


# ---------------------------------------------------------------- by hand


def test_flops_and_bytes_of_a_small_model_counted_by_hand():
    """96-64-32-64-96, 8 rows, bf16 on a GPU, where every op is one kernel and a value takes 2 bytes."""
    found = fastae.explain(fastae.DenseAutoencoder([96, 64, 32], dtype=torch.bfloat16), 8, "h100")
    counts = {(row.op, row.layer): (row.flops, row.bytes, row.launches) for row in found.rows}
    M = 8
    parameters = 2 * (96 * 64 + 64 * 32) + 64 + 32 + 64 + 96
    assert counts == {
        ("linear_act_fwd", "encoder.0"): (2 * M * 96 * 64, 2 * (M * 96 + 96 * 64 + 64 + M * 64), 1),
        ("linear_act_fwd", "encoder.1"): (2 * M * 64 * 32, 2 * (M * 64 + 64 * 32 + 32 + M * 32), 1),
        ("linear_act_fwd", "decoder.0"): (2 * M * 32 * 64, 2 * (M * 32 + 32 * 64 + 64 + M * 64), 1),
        # reads h (also what relu's derivative is written from), w, b, target; writes dp, dh and a part of the loss
        ("decoder_loss", "decoder.1"): (4 * M * 64 * 96, 2 * (M * 64 + 64 * 96 + 96 + 2 * M * 96 + M * 64) + 4, 1),
        # reads dp, x and a scale; writes dw and db
        ("linear_wgrad", "decoder.1"): (2 * M * 64 * 96, 2 * (M * 96 + M * 64 + 64 * 96 + 96) + 4, 1),
        ("linear_wgrad", "decoder.0"): (2 * M * 32 * 64, 2 * (M * 64 + M * 32 + 32 * 64 + 64) + 4, 1),
        ("linear_wgrad", "encoder.1"): (2 * M * 64 * 32, 2 * (M * 32 + M * 64 + 64 * 32 + 32) + 4, 1),
        ("linear_wgrad", "encoder.0"): (2 * M * 96 * 64, 2 * (M * 64 + M * 96 + 96 * 64 + 64) + 4, 1),
        ("linear_dgrad_act", "decoder.0"): (2 * M * 32 * 64, 2 * (M * 64 + 32 * 64 + M * 32), 1),
        ("linear_dgrad_act", "encoder.1"): (2 * M * 64 * 32, 2 * (M * 32 + 64 * 32 + 2 * M * 64), 1),  # and y, for relu
        ("sum_partials", ""): (0, 4 + 4, 1),  # the loss
        ("gather", ""): (0, 2 * 2 * M * 96, 1),
        ("adam", ""): (0, 7 * 2 * parameters, 1),
    }


def test_rows_that_are_filled_up_are_copied_and_counted_as_they_lie():
    """785 bf16 values are not a multiple of 32 bytes: kernels get 800, from copies made once a step."""
    found = fastae.explain(fastae.DenseAutoencoder([785, 64], dtype=torch.bfloat16), 8, "h100")
    assert found.rows[0].flops == 2 * 8 * 800 * 64
    copies = next(row for row in found.rows if row.op == "sum_partials")
    parameters, filled = 2 * 785 * 64 + 64 + 785, 2 * 800 * 64 + 64 + 800
    assert copies.bytes == 2 * (parameters + filled)
    assert copies.us["eager"] == 0


def test_bf16_copies_in_one_piece_of_memory_are_told_apart():
    ae = fastae.DenseAutoencoder([96, 64, 32])
    rows = [row for row in fastae.explain(ae, 8, "h100", "bfloat16").rows if row.layer]
    same = [row for row in fastae.explain(ae.bfloat16(), 8, "h100").rows if row.layer]
    forward = slice(0, 4)  # weight gradients are written in fp32 and in bf16
    assert rows[forward] == same[forward]


def test_modelled_time_by_hand():
    h100 = GPUS["h100"]
    found = fastae.explain(fastae.DenseAutoencoder([2048, 1024], dtype=torch.bfloat16), 65536, "h100")
    row = found.rows[0]
    flops, moved = 2 * 65536 * 2048 * 1024, 2 * (65536 * 2048 + 1024 * 2048 + 1024 + 65536 * 1024)
    bound = max(flops / (h100.half * 1e12), moved / (h100.bandwidth * 1e9))
    assert row.us["fastae"] == pytest.approx(1e6 * bound + GAP_US)
    assert row.us["eager"] == row.us["fastae"]  # the code's activation is identity: the same one kernel
    assert found.kernels_us["eager"] == pytest.approx(sum(row.us["eager"] for row in found.rows))
    assert found.step_us["eager"] >= found.kernels_us["eager"]
    for side in ("eager", "compiled"):
        ratio = found.step_us[side] / found.step_us["fastae"]
        assert f"{side} {found.step_us[side]:.0f} ({ratio:.2f}x)" in str(found)


def test_split_weight_gradients_write_partials():
    found = fastae.explain(fastae.DenseAutoencoder([64, 32], dtype=torch.bfloat16), 4096, "h100")
    row = next(row for row in found.rows if row.op == "linear_wgrad" and row.layer == "encoder.0")
    M, K, N = 4096, 64, 32
    splits, results = split_rows(M, N, K)[0], N * K + N
    assert splits > 1
    assert (row.bytes, row.launches) == (2 * M * (N + K) + 4 + 4 * splits * results, 1)
    (sums,) = (row for row in found.rows if row.op == "sum_partials")
    other = K * N + K
    assert sums.bytes == (4 * splits + 2) * (results + other) + 8  # both layers and the loss, in one launch
    assert sums.launches == 1


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("output", ["identity", "sigmoid"])
def test_eager_is_what_eager_runs(activation, output):
    """Its bytes, op by op, and 2 passes more: mse_loss is one op but two kernels, which hand the squares over."""
    ae = fastae.DenseAutoencoder([48, 40, 24], activation=activation, output_activation=output)
    ran = eager_step(ae, torch.rand(64, 48))
    rows = [row for row in fastae.explain(ae, 64).rows if row.layer]
    kernels = [
        k for row, layer in zip(rows, shapes(ae, 64, rows), strict=True) for k in _baseline.replaced(row.op, layer)[0]
    ]
    assert sum(k.bytes for k in kernels) == pytest.approx(sum(k.bytes for k in ran.kernels) + 2 * 64 * 48 * 4, abs=64)
    products = sum(k.name in ("mm", "addmm") for k in ran.kernels)
    assert sum(k.flops > 0 for k in kernels) == products == 11


def shapes(ae, rows, found):
    """The layer of each row, as `replaced` takes it."""
    layers = dict(ae.named_modules())
    names = list(dict.fromkeys(row.layer for row in found))
    for row in found:
        layer, index = layers[row.layer], names.index(row.layer)
        below = "identity" if index == 0 else layers[names[index - 1]].activation
        yield _baseline.Shape(
            rows, layer.in_features, layer.out_features, layer.activation, below, True, layer.weight.dtype
        )


def test_passes_over_the_reconstruction():
    """Eager 11, torch.compile 9, decoder_loss 3 and the batch's own read: B x D dominates where the code is narrow."""
    B, D = 4096, 4096
    rows = fastae.explain(fastae.DenseAutoencoder([D, 1], dtype=torch.bfloat16), B, "h100").rows
    rows = [row for row in rows if row.layer == "decoder.0"]
    layer = _baseline.Shape(B, 1, D, "identity", "identity", True, torch.bfloat16)
    eager, compiled = ([_baseline.replaced(row.op, layer)[side] for row in rows] for side in (0, 1))
    passes = [sum(k.bytes for kernels in side for k in kernels) / (2 * B * D) for side in (eager, compiled)]
    assert passes == pytest.approx([11, 9], rel=0.01)
    assert sum(row.bytes for row in rows) / (2 * B * D) == pytest.approx(3, rel=0.01)  # target, dp out, dp in


# ---------------------------------------------------------------- what really runs


@pytest.mark.parametrize("backend", ["torch", "onednn", "triton"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_ops_and_implementations_are_those_that_run(monkeypatch, backend, tied):
    ran, real = [], _backend.ops

    class Spy:
        def __init__(self, chosen):
            self.chosen = chosen

        def __getattr__(self, name):
            call = getattr(real(self.chosen), name)
            if name.startswith("fits_"):
                return call
            return lambda *args, **options: (ran.append((name, self.chosen)), call(*args, **options))[1]

    with fastae.use_backend(backend):
        found = fastae.explain(fastae.DenseAutoencoder([20, 9, 5], tied=tied, activation="gelu"), 12)
        monkeypatch.setattr(static_step, "ops", Spy)
        step_of([20, 9, 5], 12, tied=tied, activation="gelu")[1](torch.rand(12, 20))
    own = [(row.op, row.backend) for row in found.rows if row.layer]
    sums = [("sum_partials", "triton") for row in found.rows if row.op == "sum_partials"]
    assert [call for call in ran if call[0] != "sum_partials"] == own
    assert [call for call in ran if call[0] == "sum_partials"] == sums
    assert ("decoder_loss" in dict(ran)) == (backend == "triton")


@pytest.mark.parametrize("backend", ["torch", "onednn"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("output", ["identity", "sigmoid"])
def test_the_launches_and_bytes_on_a_cpu_are_those_of_the_step(backend, precision, output):
    """Every ATen op of a real step, in order, with its bytes and FLOPs; memory given as `out` changes nothing."""
    with fastae.use_backend(backend):
        ae, step = step_of([24, 16, 8], 32, precision, output_activation=output)
        found = fastae.explain(ae, 32, precision=precision)
        step(torch.rand(32, 24))
        with torch.no_grad(), _cost.OpCounter() as ran:
            step.static.compute(step.static.memory)
    rows = [row for row in found.rows if row.op not in ("gather", "adam", "autocast")]
    assert len(ran.kernels) == sum(row.launches for row in rows)
    assert sum(k.flops for k in ran.kernels) == sum(row.flops for row in rows)
    assert sum(k.bytes for k in ran.kernels) == sum(row.bytes for row in rows)
    copies = ["_foreach_copy_", "copy_"] if precision == "bfloat16" else ["mul_"]
    assert [row.op for row in rows if row.phase == "around"] == copies


def test_the_choice_of_auto_on_this_cpu_and_its_reason(monkeypatch):
    monkeypatch.setattr(onednn, "_fp32_pays", lambda: True)
    monkeypatch.setattr(onednn, "_full_width", lambda: False)
    ae = fastae.DenseAutoencoder([784, 256, 8], device="meta")
    found = {row.layer: row for row in fastae.explain(ae, 256).rows if row.layer}
    assert [found[name].backend for name in ("encoder.0", "encoder.1")] == ["onednn", "torch"]
    assert found["encoder.0"].reason == onednn.WHY[torch.float32]
    assert found["encoder.1"].reason.startswith("less than 16.8 million multiply-adds")
    monkeypatch.setattr(onednn, "_fp32_pays", lambda: False)
    row = fastae.explain(ae, 256).rows[0]
    assert (row.backend, row.reason) == ("torch", "MKL multiplies fp32 as fast on this CPU")
    with fastae.use_backend("torch"):
        assert fastae.explain(ae, 256).rows[0].reason == "the backend is set to torch"


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu(gpu):
    """By dtype and width what `auto` chooses there, though no driver is here; every time is positive."""
    ae = fastae.DenseAutoencoder([4096, 512, 16], device="meta")
    found = fastae.explain(ae, 512, gpu, "bfloat16")
    by_layer = {row.layer: (row.backend, row.reason) for row in found.rows if row.layer}
    assert by_layer["encoder.0"] == ("torch", _backend.TOO_WIDE)
    assert {by_layer[name] for name in list(by_layer)[1:]} == {("triton", _backend.FUSION_PAYS)}
    fp32 = fastae.explain(ae, 512, gpu)
    assert {(row.backend, row.reason) for row in fp32.rows if row.layer} == {("torch", _backend.NOT_HALF)}
    for explained in (found, fp32):
        assert all(row.us["fastae"] > 0 for row in explained.rows if row.launches)
        assert all(us > 0 for row in explained.rows if row.layer for us in row.us.values())
        assert "modelled, not measured" in str(explained)
        assert explained.to_dict()["times"] == "a model, not measured"
    gpu_is = GPUS[gpu]
    assert gpu_is.half > gpu_is.tf32 >= gpu_is.fp32 >= gpu_is.fp64
    assert gpu_is.source in str(found)


def test_fp32_products_follow_the_setting_of_torch():
    ae = fastae.DenseAutoencoder([4096, 4096], device="meta")
    before = torch.get_float32_matmul_precision()
    times = {}
    try:
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            times[setting] = fastae.explain(ae, 8192, "a100").rows[0].us["eager"] - GAP_US
    finally:
        torch.set_float32_matmul_precision(before)
    assert times["highest"] / times["high"] == pytest.approx(GPUS["a100"].tf32 / GPUS["a100"].fp32)


def test_frozen_layers_have_no_gradients():
    ae = fastae.DenseAutoencoder([20, 9, 5])
    for p in ae.encoder.parameters():
        p.requires_grad_(False)
    backward = [(row.layer, row.op) for row in fastae.explain(ae, 12).rows if row.phase == "backward"]
    last, first = "decoder.1", "decoder.0"
    assert backward == [(last, "linear_wgrad"), (last, "linear_dgrad_act"), (first, "linear_wgrad")]


def test_to_dict_is_json_and_the_table_names_every_op():
    found = fastae.explain(fastae.DenseAutoencoder([20, 9, 5]), 12)
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["layer"] == "encoder.0"
    assert found.to_dict()["times"] is None
    table = str(found)
    assert table.startswith("20-9-5-9-20, batch 12, float32, on cpu")
    assert all(row.op in table for row in found.rows)
    assert "us" not in table.splitlines()[2].split()


def test_islands_are_named_and_the_layers_around_them_counted():
    ae = fastae.DenseAutoencoder([20, 9, 5])
    plain = {(row.op, row.layer): row for row in fastae.explain(ae, 12).rows}
    ae.encoder.append(torch.nn.BatchNorm1d(5))
    found = fastae.explain(ae, 12)
    assert [(row.phase, row.layer, row.op) for row in found.rows if row.phase == "island"] == [
        ("island", "encoder.2", "module")
    ]
    assert found.rows[0] == plain["linear_act_fwd", "encoder.0"]
    assert "a module of its own, by autograd" in str(found)


# ---------------------------------------------------------------- errors, command


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            (4, "h200"),
            ValueError,
            "explain: gpu must be one of a100, h100, b200, mi300x, rtx4090; got 'h200'; did you mean",
        ),
        ((4, "v2"), ValueError, "explain: gpu must be one of a100, h100, b200, mi300x, rtx4090; got 'v2'"),
        ((0,), ValueError, "explain: batch_size must be at least 1; got 0"),
        ((2.5,), TypeError, "explain: batch_size must be a whole number; got 2.5"),
        ((4, None, "float16"), ValueError, "precision must be None, 'float32' or 'bfloat16'; got 'float16'"),
    ],
)
def test_errors(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        fastae.explain(fastae.DenseAutoencoder([6, 3]), *arguments)


def test_errors_of_models_and_backends():
    with pytest.raises(TypeError, match=r"^explain: model must be an autoencoder of fastae; got Linear$"):
        fastae.explain(torch.nn.Linear(3, 3), 4)
    ae = fastae.DenseAutoencoder([6, 3])
    with fastae.use_backend("onednn"), pytest.raises(RuntimeError, match="oneDNN runs on CPU tensors"):
        fastae.explain(ae, 4, "h100")


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastae", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0, *capsys.readouterr()


def test_the_command(monkeypatch, capsys, tmp_path):
    code, out, _ = command(
        monkeypatch, capsys, "explain", "--features", "20108,600,200", "--batch", 500, "--gpu", "b200"
    )
    assert code == 0
    assert out.startswith("20108-600-200-600-20108, batch 500, float32, on b200")
    fastae.DenseAutoencoder([6, 3]).save(tmp_path / "m")
    code, out, _ = command(monkeypatch, capsys, "explain", tmp_path / "m", "--json", "--precision", "bfloat16")
    assert code == 0
    assert json.loads(out)["dtype"] == "bfloat16"
    for arguments in ((), (tmp_path / "m", "--features", "6,3")):
        code, _, err = command(monkeypatch, capsys, "explain", *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert "one of the two" in err


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_explained(kind: str) -> None:
    ae = make(kind)
    rows = fastae.explain(ae, 64).rows
    assert any(row.phase == "loss" or row.phase == "island" for row in rows)
    assert ("linear_sample" in {row.op for row in rows}) == (ae.variational is not None)
    if not kind.startswith("convolutions"):
        assert "forward" in {row.phase for row in fastae.explain(ae, 64, gpu="h100").rows}
