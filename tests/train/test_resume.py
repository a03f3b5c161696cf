"""A checkpoint knows its run: what is written reads back equal, other data, scaling and options are refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.optim.lr_scheduler import MultiStepLR

from fastae import Callback, Checkpoint, DenseAutoencoder, EarlyStopping, History, Scaler
from fastae.train import checkpoint as module


def data(rows: int = 70) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(rows, 3)) @ rng.normal(size=(3, 12))).astype(np.float32)


def model(seed: int = 0) -> DenseAutoencoder:
    torch.manual_seed(seed)
    return DenseAutoencoder([12, 8, 3])


def fit(
    *callbacks: Callback, ae: DenseAutoencoder | None = None, x: np.ndarray | None = None, **options: Any
) -> History:
    options = {"epochs": 6, "batch_size": 16, "progress": False} | options
    return (ae or model()).fit(data() if x is None else x, callbacks=callbacks, **options)


class Schedule(Callback):
    """A scheduler whose state has a Counter of whole numbers."""

    def on_train_begin(self, run: Any) -> None:
        self.scheduler = MultiStepLR(run.optimizer, [2, 4], gamma=0.1)

    def on_epoch_end(self, run: Any) -> None:
        self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)


class State(Callback):
    """A callback with the state it is given."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state, self.loaded = state, None

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


# ---------------------------------------------------------------- what is written reads back equal

STATE: dict[str, Any] = {
    "keys": {1: "a", (2, 3): {"b": [1, (2, None)]}, 0.5: True},
    "counter": Counter({5: 1, 10: 2}),
    "numbers": [1, 2.5, float("inf"), -0.0, True, np.float32(0.1), np.int64(3)],
    "dollar": {"$tuple": [1, 2], "$dict": 3},
    "nested": [{"t": torch.arange(3), "empty": {}}, ()],
    "tensor": torch.ones(2, dtype=torch.bfloat16),
}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def test_the_state_of_a_callback_reads_back_equal(tmp_path: Path) -> None:
    fit(State(STATE), Checkpoint(tmp_path), epochs=1)
    again = State(STATE)
    fit(again, Checkpoint(tmp_path, resume=True), epochs=2)
    assert again.loaded is not None
    assert set(again.loaded) == set(STATE)
    assert all(equal(STATE[key], again.loaded[key]) for key in STATE), again.loaded


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2), np.float32(1e-2)], ids=["float", "tensor", "numpy"])
def test_a_schedule_goes_on_as_in_one_run(lr: Any, tmp_path: Path) -> None:
    def run(ae: DenseAutoencoder, checkpoint: list[Callback], epochs: int) -> History:
        rate = lr.clone() if isinstance(lr, torch.Tensor) else lr
        optimizer = torch.optim.Adam(ae.parameters(), rate, fused=not isinstance(lr, torch.Tensor))
        return fit(Schedule(), *checkpoint, ae=ae, optimizer=optimizer, epochs=epochs)

    whole, resumed = model(), model(5)
    wanted = run(whole, [], 6)
    run(model(), [Checkpoint(tmp_path)], 3)
    found = run(resumed, [Checkpoint(tmp_path, resume=True)], 6)
    assert found.loss == wanted.loss
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("state", "where", "kind"),
    [
        ({"a": {1, 2}}, "a", "set"), ({"a": [lambda: 0]}, r"a\.0", "function"),
        ({"a": {"b": object()}}, r"a\.b", "object"), ({"a": np.ones(2)}, "a", "ndarray"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_by_name_before_an_epoch(
    state: dict[str, Any], where: str, kind: str, tmp_path: Path
) -> None:
    ae = model()
    before = {name: t.clone() for name, t in ae.state_dict().items()}
    message = rf"^Checkpoint: callback\.State\.0\.{where} must be made of numbers, strings, tensors, .*; got {kind}$"
    with pytest.raises(TypeError, match=message):
        fit(State(state), Checkpoint(tmp_path), ae=ae)
    assert all(torch.equal(t, before[name]) for name, t in ae.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_best_weights_live_in_memory_of_their_own(tmp_path: Path) -> None:
    fit(EarlyStopping(patience=9, min_delta=1e9), Checkpoint(tmp_path), epochs=2)
    state = Checkpoint(tmp_path, resume=True)._read()
    before = {name: t.clone() for name, t in state.items() if isinstance(t, torch.Tensor)}
    path = tmp_path / "checkpoint.safetensors"
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(state[name], t) for name, t in before.items())


# ---------------------------------------------------------------- another run


def test_one_other_value_among_the_rows_is_other_data(tmp_path: Path) -> None:
    x = data()
    fit(Checkpoint(tmp_path), x=x, epochs=1)
    for row in (1, 33, 69):
        other = x.copy()
        other[row, 5] = np.nextafter(other[row, 5], np.float32(9))
        ae = model(5)
        with pytest.raises(ValueError, match=r"^Checkpoint: (x|validation data) must be '\[.*\] \w{8}', as in the ch"):
            fit(Checkpoint(tmp_path, resume=True), ae=ae, x=other)
        assert torch.equal(ae.encoder[0].weight, model(5).encoder[0].weight)
    fit(Checkpoint(tmp_path, resume=True), x=x.copy(), epochs=2)


def test_another_scaling_is_named(tmp_path: Path) -> None:
    x, ae = data(), model()
    ae.scaler = Scaler.fit(x, "standard")
    fit(Checkpoint(tmp_path), ae=ae, x=ae.scaler.transform(x), epochs=1)
    with pytest.raises(ValueError, match=r"^Checkpoint: scale must be 'standard', as in the checkpoint; got 'none'$"):
        fit(Checkpoint(tmp_path, resume=True), x=x)


def test_a_stopped_run_goes_on_with_more_patience(tmp_path: Path) -> None:
    def stopping(patience: int) -> EarlyStopping:
        return EarlyStopping(patience, min_delta=1e9, restore_best=False)

    assert fit(stopping(2), Checkpoint(tmp_path), epochs=9).epochs == 3
    same = fit(stopping(2), Checkpoint(tmp_path, resume=True), epochs=9)
    assert (same.epochs, same.stopped) == (3, "early stopping")
    more = fit(stopping(4), Checkpoint(tmp_path, resume=True), epochs=9)
    assert (more.epochs, more.stopped) == (5, "early stopping")
    assert fit(Checkpoint(tmp_path, resume=True), epochs=7).epochs == 7


def test_the_history_names_the_epoch_whose_weights_the_model_has() -> None:
    ae = model()
    history = fit(EarlyStopping(patience=2, min_delta=1e9), ae=ae, epochs=9)
    assert (history.best_epoch, history.epochs) == (1, 3)
    assert ae.trained is not None
    assert (ae.trained["best_epoch"], ae.trained["best_loss"]) == (1, history.val_loss[0])
    assert fit(epochs=2).best_epoch is None
    assert History(**history.to_dict()) == history


@pytest.mark.parametrize("what", ["generator", "weights", "optimizer", "option", "kind", "nan"])
def test_a_damaged_state_changes_nothing(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model()
    fit(Checkpoint(tmp_path), ae=first, optimizer=torch.optim.Adam(first.parameters()), epochs=1)
    state = Checkpoint(tmp_path, resume=True)._read()
    damage = {
        "generator": {"generator": torch.zeros_like(state["generator"])},
        "weights": {"model.decoder.1.weight": torch.zeros(3)},
        "optimizer": {"param_groups": state["param_groups"] * 2},
        "option": {"param_groups": [{k: v for k, v in state["param_groups"][0].items() if k != "betas"}]},
        "kind": {"param_groups": [state["param_groups"][0] | {"eps": "1e-8"}]},
        "nan": {"model.decoder.1.weight": state["model.decoder.1.weight"] * float("nan")},
    }
    values, tensors = module._encoded(state | damage[what])
    save_file(tensors, tmp_path / "checkpoint.safetensors", {"fastae": json.dumps(values)})
    ae = model(5)
    before = {name: t.clone() for name, t in ae.state_dict().items()}
    optimizer = torch.optim.Adam(ae.parameters())
    with pytest.raises(ValueError, match=r"^Checkpoint: .* must (be a checkpoint of fastae|hold finite)"):
        fit(Checkpoint(tmp_path, resume=True), ae=ae, optimizer=optimizer)
    assert all(torch.equal(t, before[name]) for name, t in ae.state_dict().items())
    assert not optimizer.state


def test_options_that_may_differ(tmp_path: Path) -> None:
    """An implementation that was chosen, lists of files before tuples were kept, a scheduler that is new."""
    first, second = model(), model()
    chosen = torch.optim.Adam(first.parameters(), foreach=True)
    fit(Checkpoint(tmp_path), ae=first, optimizer=chosen, epochs=1)
    path = tmp_path / "checkpoint.safetensors"
    state = Checkpoint(tmp_path, resume=True)._read()
    state["param_groups"][0]["betas"] = list(state["param_groups"][0]["betas"])
    values, tensors = module._encoded(state)
    save_file(tensors, path, {"fastae": json.dumps(values)})
    optimizer = torch.optim.Adam(second.parameters())
    fit(Schedule(), Checkpoint(tmp_path, resume=True), ae=second, optimizer=optimizer, epochs=4)
    assert optimizer.param_groups[0]["initial_lr"] == 1e-3


def test_a_buffer_may_hold_inf(tmp_path: Path) -> None:
    def masked(seed: int) -> DenseAutoencoder:
        ae = model(seed)
        ae.register_buffer("mask", torch.full((3,), -float("inf")))
        return ae

    fit(Checkpoint(tmp_path), ae=masked(0), epochs=1)
    assert fit(Checkpoint(tmp_path, resume=True), ae=masked(5), epochs=2).epochs == 2


def test_tensors_of_like_places_are_kept_apart() -> None:
    state = {"c.a.b": torch.zeros(1), "c.a": {"b": torch.ones(1)}, "c": {1: torch.ones(2), "1": torch.zeros(2)}}
    values, tensors = module._encoded(state)
    assert equal(tensors["c.a.b"], state["c.a.b"])
    for name in ("c.a", "c"):
        assert equal(module._decoded(values[name], tensors), state[name])


def test_the_codec_is_the_identity_on_what_it_takes() -> None:
    values, tensors = module._encoded(STATE)
    assert all(equal(STATE[k], module._decoded(v, tensors)) for k, v in values.items())
