"""fit: the bits of a hand-written loop, rows and losses accounted for, interruptions and losses that explode."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import fastae.train.fit
from fastae import Callback, Checkpoint, DenseAutoencoder, History
from fastae.train.rows import Rows


def model(seed: int = 0, **options: Any) -> DenseAutoencoder:
    torch.manual_seed(seed)
    return DenseAutoencoder([12, 8, 3], **options)


def data(rows: int = 70, dtype: Any = np.float32) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(rows, 3)) @ rng.normal(size=(3, 12))).astype(dtype)


def numbered(rows: int = 70) -> np.ndarray:
    """Sorted data: row i holds i everywhere."""
    return np.repeat(np.arange(rows, dtype=np.float32)[:, None], 12, 1)


def fit(ae: DenseAutoencoder, x: Any, *callbacks: Callback, **options: Any) -> History:
    return ae.fit(x, **({"epochs": 4, "batch_size": 16, "callbacks": callbacks, "progress": False} | options))


def at_step(ae: DenseAutoencoder, step: int, action: Any) -> list[Tensor]:
    """Let `action` have the loss of that step (from 1, over all epochs); returns the list of the batches."""
    loss, batches = ae.loss, []

    def poisoned(x: Tensor) -> Tensor:
        if not ae.training:  # validation
            return loss(x)
        batches.append(x.detach().clone())
        return action(loss(x)) if len(batches) == step else loss(x)

    ae.loss = poisoned
    return batches


class Weights(Callback):
    """Keeps the parameters at the end of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[list[Tensor]] = []

    def on_epoch_end(self, run: Any) -> None:
        self.epochs.append([p.detach().clone() for p in run.model.parameters()])


def assert_weights(ae: DenseAutoencoder, wanted: list[Tensor]) -> None:
    for a, b in zip(ae.parameters(), wanted, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- the numbers


def test_the_run_equals_a_loop_in_plain_pytorch() -> None:
    x, ae = data(), model()
    history = fit(ae, x, validation_split=0.2, lr=1e-2)
    twin = model()
    w = [layer for stack in (twin.encoder, twin.decoder) for layer in stack]
    plain = nn.Sequential(*[nn.Linear(layer.in_features, layer.out_features) for layer in w])
    for a, b in zip(plain.parameters(), twin.parameters(), strict=True):
        a.data.copy_(b.data)

    def forward(rows: Tensor) -> Tensor:
        return plain[3](F.relu(plain[2](plain[1](F.relu(plain[0](rows))))))

    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(70, generator=generator)
    train, held_out = torch.from_numpy(x)[order[14:].sort().values], torch.from_numpy(x)[order[:14].sort().values]
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2, fused=True)
    for epoch in range(4):
        total = 0.0
        for rows in torch.randperm(56, generator=generator).split(16):
            optimizer.zero_grad()
            loss = F.mse_loss(forward(train[rows]), train[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        with torch.no_grad():
            val_loss = F.mse_loss(forward(held_out), held_out).item()
        assert history.loss[epoch] == pytest.approx(total / 56, rel=1e-5)
        assert history.val_loss[epoch] == pytest.approx(val_loss, rel=1e-5)
    for a, b in zip(ae.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "adamw", "weight_decay": 0.01}, {"optimizer": "sgd", "lr": 0.1}, {"precision": "bfloat16"}],
)
def test_the_loss_falls_and_parameters_stay_float32(options: dict[str, Any], tied: bool) -> None:
    ae = model(tied=tied)
    history = fit(ae, data(), epochs=30, **({"lr": 1e-2} | options))
    assert history.loss[-1] < 0.6 * history.loss[0]
    assert history.val_loss[-1] < 0.6 * history.val_loss[0]
    assert (len(history.loss), len(history.val_loss), len(history.rows_per_s), history.stopped) == (30, 30, 30, None)
    assert {p.dtype for p in ae.parameters()} == {torch.float32}


def test_bfloat16_computes_in_bfloat16() -> None:
    ae, dtypes = model(), []
    ae.decoder.register_forward_hook(lambda _, args, y: dtypes.append((args[0].dtype, y.dtype)))
    fit(ae, data(), epochs=1, precision="bfloat16")
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}


def test_float64_keeps_every_digit_of_the_data() -> None:
    ae, x = model(dtype=torch.float64), 1 + data(dtype=np.float64) * 1e-12
    batches = at_step(ae, 0, None)
    fit(ae, x, epochs=1, precision="float64", validation_split=0)
    assert np.array_equal(np.sort(torch.cat(batches).numpy(), 0), np.sort(x, 0))


@pytest.mark.parametrize("kind", ["memmap", "float64", "float16", "tensor", "leaf", "strided"])
def test_every_kind_of_input_trains_the_same(kind: str, tmp_path: Path) -> None:
    x, ae, twin = data().astype(np.float16).astype(np.float32), model(), model()
    np.save(tmp_path / "x.npy", x)
    given = {
        "memmap": np.load(tmp_path / "x.npy", mmap_mode="r"), "float64": x.astype(np.float64),
        "float16": x.astype(np.float16), "tensor": torch.from_numpy(x.copy()),
        "leaf": torch.from_numpy(x.copy()).requires_grad_(), "strided": np.repeat(x, 2, 1)[:, ::2],
    }[kind]  # fmt: skip
    before = x.copy()
    for options in ({}, {"validation_data": given[:20]}):
        wanted = options and {"validation_data": x[:20]}
        assert fit(ae, given, **options).val_loss == fit(twin, x, **wanted).val_loss
        assert_weights(ae, list(twin.parameters()))
    assert np.array_equal(given.detach().numpy() if isinstance(given, Tensor) else given, before)
    assert getattr(given, "grad", None) is None


def test_an_optimizer_of_your_own_is_used() -> None:
    ae, twin, idle = model(), model(), model()
    assert fit(ae, data(), optimizer=torch.optim.Adam(ae.parameters(), lr=1e-3, fused=True)).loss == (
        fit(twin, data()).loss
    )
    assert_weights(ae, list(twin.parameters()))
    optimizer = torch.optim.SGD(idle.parameters(), lr=0.0)
    fit(idle, data(), optimizer=optimizer, lr=0.5)
    assert_weights(idle, list(model().parameters()))


def test_weight_decay_reaches_the_optimizer() -> None:
    ae = model()
    fit(ae, np.zeros((70, 12), np.float32), optimizer="sgd", lr=0.1, weight_decay=0.5, epochs=1, batch_size=63)
    torch.testing.assert_close(ae.encoder[0].weight[0], model().encoder[0].weight[0] * 0.95, rtol=0.05, atol=1e-3)
    assert ae.encoder[0].weight.norm() < 0.97 * model().encoder[0].weight.norm()


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    runs = []
    for seed in (3, 3, 4):
        ae = model()
        torch.manual_seed(len(runs))  # the global generator has no say
        history = fit(ae, data(), seed=seed)
        runs.append((history.loss, history.val_loss, torch.cat([p.detach().flatten() for p in ae.parameters()])))
    assert runs[0][:2] == runs[1][:2] != runs[2][:2]
    assert torch.equal(runs[0][2], runs[1][2])
    assert not torch.equal(runs[0][2], runs[2][2])


def test_fit_leaves_the_global_generator_alone() -> None:
    ae = model()
    before = torch.get_rng_state()
    fit(ae, data())
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("batch_size", [1, 7, 16, 31, 32, 63])
def test_each_epoch_takes_every_training_row_once_in_another_order(batch_size: int) -> None:
    ae = model()
    batches = at_step(ae, 0, None)
    fit(ae, numbered(), epochs=2, batch_size=batch_size, lr=1e-9)
    steps = math.ceil(63 / batch_size)
    assert [len(batch) for batch in batches] == ([batch_size] * (63 // batch_size) + [63 % batch_size])[:steps] * 2
    first, second = (torch.cat(batches[i : i + steps])[:, 0].tolist() for i in (0, steps))
    assert len(set(first)) == 63
    assert sorted(first) == sorted(second)
    assert len({tuple(first), tuple(second), tuple(sorted(first))}) == 3


def test_validation_rows_are_random_and_none_of_the_training_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    ae, held_out = model(), []
    batches = at_step(ae, 0, None)
    monkeypatch.setattr(fastae.train.fit, "mean_loss", lambda _, rows, *__: held_out.append(rows.x[:, 0].tolist()) or 1)
    for seed in (0, 1):
        fit(ae, numbered(100), epochs=2, validation_split=0.3, seed=seed, lr=1e-9)
    assert held_out[0] == held_out[1] != held_out[2]
    assert len(set(held_out[0])) == 30
    assert set(torch.cat(batches[:10])[:, 0].tolist()) | set(held_out[0]) == set(range(100))
    assert sum(torch.cat(batches[:5])[:, 0].tolist()) + sum(held_out[0]) == sum(range(100))
    assert max(np.histogram(held_out[0], 4, (0, 100))[0]) <= 15  # spread over the file, not a block of it


def test_validation_data_are_used_as_they_are() -> None:
    ae, other = model(), data(100)[70:]
    batches = at_step(ae, 0, None)
    history = fit(ae, data(), validation_data=other, epochs=1)
    assert sum(map(len, batches)) == 70
    assert history.val_loss == [pytest.approx(ae.score(other).mean(), rel=1e-6)]


def test_no_validation() -> None:
    ae = model()
    batches = at_step(ae, 0, None)
    assert fit(ae, data(), validation_split=0, epochs=1).val_loss == []
    assert sum(map(len, batches)) == 70


def test_the_loss_of_an_epoch_is_weighted_by_rows() -> None:
    ae, x = model(), data(33)
    x[20:] *= 10
    history = fit(ae, x, validation_split=0, epochs=1, lr=1e-12)
    assert history.loss == [pytest.approx(ae.score(x).mean(), rel=1e-5)]


def test_the_validation_loss_is_worked_through_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    ae, sizes, x = model(), [], torch.from_numpy(data(50))
    monkeypatch.setattr(fastae.train.fit, "CHUNK_VALUES", 16 * 12)
    ae.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    assert fastae.train.fit.mean_loss(ae, Rows(x)) == pytest.approx(ae.score(x).mean().item(), rel=1e-5)
    assert sizes[:4] == [16, 16, 16, 2]


# ---------------------------------------------------------------- endings


def test_ctrl_c_keeps_the_model_as_it_is_and_the_finished_epochs() -> None:
    def press(_: Tensor) -> Tensor:
        raise KeyboardInterrupt

    ae, weights = model(), Weights()
    whole = fit(model(), data())
    at_step(ae, 11, press)  # the third step of the third epoch
    history = fit(ae, data(), weights)
    assert (history.stopped, history.epochs) == ("interrupted", 2)
    assert history.loss == whole.loss[:2]
    assert history.val_loss == pytest.approx(whole.val_loss[:2], rel=1e-6)  # by another sum: its loss is its own
    assert not torch.equal(ae.encoder[0].weight, weights.epochs[-1][0])


@pytest.mark.parametrize(
    "poison", [lambda loss: loss * math.nan, lambda loss: loss * math.inf, lambda loss: -loss * math.inf]
)
def test_a_loss_that_is_not_finite_brings_back_the_last_epoch(poison: Any, tmp_path: Path) -> None:
    ae, weights = model(), Weights()
    at_step(ae, 10, poison)
    with pytest.raises(
        FloatingPointError, match=r"got -?(nan|inf) at epoch 3, step 2 of 4\. The model is back"
    ) as caught:
        fit(ae, data(), Checkpoint(tmp_path), weights)
    assert "at the end of epoch 2; try a smaller lr, or scale the data" in str(caught.value)
    assert len(weights.epochs) == 2
    assert_weights(ae, weights.epochs[1])
    tensors = load_file(tmp_path / "checkpoint.safetensors")
    for name, value in ae.state_dict().items():
        assert torch.equal(tensors[f"model.{name}"], value)


def test_weights_that_are_not_finite_are_found_behind_a_finite_loss() -> None:
    ae, weights = model(), Weights()
    at_step(ae, 8, lambda loss: loss + (ae.encoder[0].bias.sum() * 0).sqrt())  # its gradient is 0 * inf
    with pytest.raises(FloatingPointError, match=r"after epoch 2, step 4\. The model is back at the end of epoch 1"):
        fit(ae, data(), weights, validation_split=0, batch_size=18)
    assert_weights(ae, weights.epochs[0])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_huge_lr_ends_with_the_weights_it_began_with(optimizer: str, tmp_path: Path) -> None:
    ae = model()
    with pytest.raises(FloatingPointError, match=r"epoch 1, step \d of 4\. The model is back at the end of epoch 0"):
        fit(ae, data(), Checkpoint(tmp_path), optimizer=optimizer, lr=1e30)
    assert_weights(ae, list(model().parameters()))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- progress and history


def test_progress_off_a_terminal_is_about_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    history = fit(model(), data(), epochs=100, progress=True)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert (out, len(lines)) == ("", 10)
    figures = f"loss {history.loss[-1]:.6f}  val_loss {history.val_loss[-1]:.6f}  {history.rows_per_s[-1]:,.0f} rows/s"
    assert lines[-1] == f"epoch 100/100  {figures}"
    for epochs in (1, 5, 14, 19, 25, 39, 101):
        fit(model(), data(), epochs=epochs, progress=True)
        lines = capsys.readouterr().err.splitlines()
        assert min(epochs, 6) <= len(lines) <= 14, epochs
        assert lines[-1].startswith(f"epoch {epochs}/{epochs}  ")


def test_progress_on_a_terminal_is_a_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    history = fit(model(), data(), progress=True)
    last = terminal.getvalue().rsplit("\r", 1)[-1]
    assert "epoch 4/4" in last
    assert f"loss {history.loss[-1]:.6f}  val_loss {history.val_loss[-1]:.6f}" in last
    assert last.rstrip().endswith("\x1b[?25h")  # the cursor is shown again


def test_no_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    fit(model(), data(), progress=False)
    assert capsys.readouterr() == ("", "")


def test_history_goes_through_json_and_a_plot(tmp_path: Path) -> None:
    for history in (
        fit(model(), data()),
        fit(model(), data(), validation_split=0),
        History([0.0, 1.0], [], [1.0, 1.0]),
    ):
        assert History(**json.loads(json.dumps(history.to_dict()))) == history
        history.plot(tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
        (tmp_path / "loss.png").unlink()
        history.plot(tmp_path / "curve")  # no suffix: a .png, as matplotlib has it
        (tmp_path / "curve.png").unlink()
    assert history.to_dict()["loss"] is not history.loss
