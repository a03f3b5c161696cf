"""EarlyStopping and Checkpoint: the right epoch, a resume bit for bit, and the text of every error."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastae import Callback, Checkpoint, DenseAutoencoder, EarlyStopping, History, TrainStep


def model(seed: int = 0, **options: Any) -> DenseAutoencoder:
    torch.manual_seed(seed)
    return DenseAutoencoder([12, 8, 3], **options)


def data(rows: int = 70) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(rows, 3)) @ rng.normal(size=(3, 12))).astype(np.float32)


class Keep(Callback):
    """Keeps the state of the run at the end of each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def on_epoch_end(self, run: Any) -> None:
        self.states.append(copy.deepcopy(run.state_dict()))


def train(x: np.ndarray, *callbacks: Callback, **options: Any) -> tuple[History, dict[str, Any]]:
    """(history, the state at the end of the last epoch) of a fresh model."""
    keep = Keep()
    options = {"epochs": 6, "batch_size": 16, "progress": False} | options
    history = options.pop("model", model()).fit(x, callbacks=[*callbacks, keep], **options)
    return history, keep.states[-1]


def assert_same_bits(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[name]), name
        elif name == "settings":
            digests = ("x", "validation data")  # are there beside a Checkpoint
            left, right = ({k: v for k, v in of[name].items() if k not in digests} for of in (a, b))
            assert left == right
        elif name == "history":
            assert [value["loss"], value["val_loss"]] == [b[name]["loss"], b[name]["val_loss"]]
        else:
            assert json.dumps(value) == json.dumps(b[name]), name


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(folder / "checkpoint.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["fastae"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def interrupt(ae: DenseAutoencoder, step: int) -> DenseAutoencoder:
    """Press Ctrl-C in that step (counted from 1 over all epochs)."""
    loss, steps = ae.loss, iter(range(1, 1000))

    def pressed(x: torch.Tensor) -> torch.Tensor:
        if ae.training and next(steps) == step:
            raise KeyboardInterrupt
        return loss(x)

    ae.loss = pressed
    return ae


# ---------------------------------------------------------------- early stopping


def follow(stopping: EarlyStopping, values: list[float], monitor: str = "val_loss") -> tuple[int, DenseAutoencoder]:
    """(the epoch that it stopped at, the model); after epoch e the encoder's first weight is e everywhere."""
    ae, history = model(), History()
    run: Any = SimpleNamespace(model=ae, history=history, has_validation=True)
    run.stop = lambda reason: setattr(history, "stopped", reason)
    stopping.on_train_begin(run)
    for epoch, value in enumerate(values, 1):
        torch.nn.init.constant_(ae.encoder[0].weight, epoch)
        history.loss.append(value if monitor == "loss" else -epoch)
        history.val_loss.append(value if monitor == "val_loss" else -epoch)
        stopping.on_epoch_end(run)
        if history.stopped:
            break
    stopping.on_train_end(run)
    assert history.stopped in (None, "early stopping")
    return history.epochs if history.stopped else 0, ae


@pytest.mark.parametrize("monitor", ["val_loss", "loss"])
@pytest.mark.parametrize(
    ("options", "values", "stopped", "best"),
    [
        ({"patience": 1}, [5, 4, 4, 3], 3, 2),  # no fall is no improvement
        ({"patience": 2}, [5, 4, 4.5, 3, 3.5, 3.2, 1], 6, 4),  # an improvement starts the count anew
        ({"patience": 3}, [5, 6, 7, 8, 1], 4, 1),
        ({"patience": 2}, [5, 4, 3, 2, 1, 2], 0, 5),
        ({"patience": 2, "min_delta": 0.5}, [5, 4.6, 4.4, 4.3, 4.2], 5, 3),  # measured from the best, not the last
        ({"patience": 2, "min_delta": 0.5}, [5, 4.5, 4.5], 3, 1),
        ({"patience": 2}, [-1, 0, 1], 3, 1),
    ],
)
def test_it_stops_at_the_right_epoch_with_the_best_weights(
    monitor: str, options: dict[str, Any], values: list[float], stopped: int, best: int
) -> None:
    stopping = EarlyStopping(monitor=monitor, **options)
    epoch, ae = follow(stopping, values, monitor)
    assert epoch == stopped
    assert (stopping.best_epoch, stopping.best) == (best, values[best - 1])
    assert ae.encoder[0].weight.unique().tolist() == [best]


def test_without_restore_best_the_last_weights_stay() -> None:
    epoch, ae = follow(EarlyStopping(patience=2, restore_best=False), [1, 2, 3])
    assert epoch == 3
    assert ae.encoder[0].weight.unique().tolist() == [3]


def test_one_object_can_serve_a_second_run() -> None:
    stopping = EarlyStopping(patience=2)
    follow(stopping, [1, 2, 3])
    epoch, ae = follow(stopping, [9, 8, 7])
    assert (epoch, stopping.best) == (0, 7)
    assert ae.encoder[0].weight.unique().tolist() == [3]


@pytest.mark.parametrize("tied", [False, True])
def test_in_a_real_run_it_stops_and_restores(tied: bool) -> None:
    ae, keep, stopping = model(tied=tied), Keep(), EarlyStopping(patience=2, min_delta=100.0)
    history = ae.fit(data(), epochs=9, batch_size=16, callbacks=[stopping, keep], progress=False)
    assert (history.stopped, history.epochs, stopping.best_epoch) == ("early stopping", 3, 1)
    for name, value in ae.state_dict().items():
        assert torch.equal(value, keep.states[0][f"model.{name}"])
        assert not torch.equal(value, keep.states[2][f"model.{name}"])


def test_the_best_weights_are_restored_after_an_interruption() -> None:
    ae, keep = interrupt(model(), 14), Keep()
    callbacks = [EarlyStopping(patience=9, min_delta=100.0), keep]
    assert ae.fit(data(), epochs=9, batch_size=16, callbacks=callbacks, progress=False).stopped == "interrupted"
    assert torch.equal(ae.encoder[0].weight, keep.states[0]["model.encoder.0.weight"])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: EarlyStopping(patience=0), "EarlyStopping: patience must be at least 1; got 0"),
        (
            lambda: EarlyStopping(monitor="val_los"),
            "EarlyStopping: monitor must be one of val_loss, loss; got 'val_los'; did you mean 'val_loss'?",
        ),
        (lambda: Checkpoint("x", every=0), "Checkpoint: every must be at least 1; got 0"),
    ],
)
def test_bad_arguments(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make()


def test_val_loss_cannot_be_watched_without_validation_data() -> None:
    text = "EarlyStopping: monitor 'val_loss' needs validation data; got none (or use monitor='loss')"
    with pytest.raises(ValueError, match=re.escape(text)):
        train(data(), EarlyStopping(), validation_split=0)
    train(data(), EarlyStopping(monitor="loss"), validation_split=0, epochs=1)


# ---------------------------------------------------------------- checkpoint and resume

RUNS = [
    {"optimizer": "adam"},
    {"optimizer": "adamw", "weight_decay": 0.1, "lr": 1e-2},
    {"optimizer": "sgd", "lr": 1e-2, "precision": "bfloat16"},
    {"optimizer": lambda ae: torch.optim.SGD(ae.parameters(), lr=1e-2, momentum=0.9)},
    {"optimizer": lambda ae: torch.optim.AdamW(ae.parameters(), amsgrad=True)},
]


def start(options: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """The options with a fresh model, and a fresh optimizer where it is the user's own."""
    ae = model(seed)
    made = options["optimizer"]
    return options | {"model": ae, "optimizer": made(ae) if callable(made) else made}


@pytest.mark.parametrize("first", ["stopping", "checkpoint"])  # callbacks may stand in any order
@pytest.mark.parametrize("options", RUNS)
def test_resuming_gives_the_bits_of_one_go(options: dict[str, Any], first: str, tmp_path: Path) -> None:
    def callbacks(resume: bool) -> list[Callback]:
        checkpoint = Checkpoint(tmp_path, resume=resume, overwrite=not resume)
        both = [EarlyStopping(patience=9, min_delta=1e9), checkpoint]  # the best stays epoch 1
        return both if first == "stopping" else both[::-1]

    whole_options = start(options)
    whole, wanted = train(data(), *callbacks(False), **whole_options)
    assert wanted["optimizer.0.exp_avg" if options["optimizer"] == "adam" else "model.decoder.1.bias"].any()
    train(data(), *callbacks(False), epochs=3, **start(options))
    resumed_options = start(options, seed=5)
    resumed, got = train(data(), *callbacks(True), **resumed_options)
    assert_same_bits(got, wanted)
    assert (resumed.loss, resumed.val_loss, resumed.epochs) == (whole.loss, whole.val_loss, 6)
    for a, b in zip(whole_options["model"].parameters(), resumed_options["model"].parameters(), strict=True):
        assert torch.equal(a, b)  # both are back at epoch 1


def test_resuming_is_what_was_interrupted_and_went_on(tmp_path: Path) -> None:
    never = 10**9  # a model with a loss of its own trains through autograd: so must those it is compared with
    _, wanted = train(data(), model=interrupt(model(), never))
    steps = 4  # 63 training rows of 16
    ae = interrupt(model(), 3 * steps + 3)
    history, kept = train(data(), Checkpoint(tmp_path), model=ae)
    assert (history.stopped, history.epochs) == ("interrupted", 3)
    values, tensors = read(tmp_path)
    assert len(values["history"]["loss"]) == 3
    assert_same_bits({name: value for name, value in kept.items() if name in tensors}, tensors)
    assert not torch.equal(ae.encoder[0].weight, tensors["model.encoder.0.weight"])  # two steps on, as promised
    resumed, got = train(data(), Checkpoint(tmp_path, resume=True), model=interrupt(model(5), never))
    assert_same_bits(got, wanted)
    assert resumed.stopped is None


def test_resuming_a_train_step_is_what_was_interrupted_and_went_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, wanted = train(data())
    steps, taken, call = 4, [0], TrainStep.__call__

    def interrupted(step: TrainStep, *args: Any) -> Any:
        taken[0] += 1
        if taken[0] == 3 * steps + 3:
            raise KeyboardInterrupt
        return call(step, *args)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    ae = model()
    history, _ = train(data(), Checkpoint(tmp_path), model=ae)
    assert (history.stopped, history.epochs) == ("interrupted", 3)
    resumed, got = train(data(), Checkpoint(tmp_path, resume=True), model=model(5))
    assert_same_bits(got, wanted)
    assert resumed.stopped is None


def test_resume_starts_afresh_where_there_is_no_checkpoint_and_no_resume_asks_for_overwrite(tmp_path: Path) -> None:
    _, wanted = train(data())
    folder = tmp_path / "a" / "b"
    assert_same_bits(train(data(), Checkpoint(folder, resume=True))[1], wanted)
    before = (folder / "checkpoint.safetensors").read_bytes()
    text = f"Checkpoint: {folder / 'checkpoint.safetensors'} exists; resume=True goes on from it, overwrite=True"
    with pytest.raises(ValueError, match=re.escape(text)):
        train(data(), Checkpoint(folder))
    assert (folder / "checkpoint.safetensors").read_bytes() == before
    assert_same_bits(train(data(), Checkpoint(folder, overwrite=True))[1], wanted)


def test_resuming_a_finished_run_trains_no_more(tmp_path: Path) -> None:
    _, wanted = train(data(), Checkpoint(tmp_path))
    ae = model(5)
    history = ae.fit(data(), epochs=6, batch_size=16, callbacks=[Checkpoint(tmp_path, resume=True)], progress=False)
    assert history.loss == wanted["history"]["loss"]
    assert torch.equal(ae.encoder[0].weight, wanted["model.encoder.0.weight"])


def test_every_says_which_epochs_are_written(tmp_path: Path) -> None:
    written: list[int] = []

    class Look(Callback):
        def on_epoch_end(self, run: Any) -> None:
            exists = (tmp_path / "checkpoint.safetensors").exists()
            written.append(len(read(tmp_path)[0]["history"]["loss"]) if exists else 0)

    train(data(), Checkpoint(tmp_path, every=2), Look(), epochs=5)
    assert written == [0, 0, 2, 2, 4]  # a Checkpoint is called last, wherever it stands


@pytest.mark.parametrize(
    ("name", "was", "now"),
    [
        ("batch_size", 16, 8), ("lr", 1e-3, 1e-2), ("seed", 0, 1), ("optimizer", "adam", "sgd"),
        ("precision", "float32", "bfloat16"), ("weight_decay", 0.0, 0.5),
    ],
)  # fmt: skip
def test_another_setting_is_refused_by_name_and_changes_nothing(name: str, was: Any, now: Any, tmp_path: Path) -> None:
    train(data(), Checkpoint(tmp_path), epochs=1)
    ae = model(5)
    with pytest.raises(ValueError, match=f"^Checkpoint: {name} must be {was!r}, as in the checkpoint; got {now!r}$"):
        train(data(), Checkpoint(tmp_path, resume=True), model=ae, **{name: now})
    assert torch.equal(ae.encoder[0].weight, model(5).encoder[0].weight)


def test_another_model_or_other_data_are_refused(tmp_path: Path) -> None:
    train(data(), Checkpoint(tmp_path), epochs=1)
    with pytest.raises(ValueError, match=r"^Checkpoint: config must be \{.*'tied': False.* got \{.*'tied': True"):
        train(data(), Checkpoint(tmp_path, resume=True), model=model(tied=True))
    with pytest.raises(ValueError, match=r"^Checkpoint: training rows must be 63, as in the checkpoint; got 72$"):
        train(data(80), Checkpoint(tmp_path, resume=True))


@pytest.mark.parametrize("content", ["half", "empty", "text", "tensors", "model", "json", "list", "dict"])
def test_a_truncated_or_foreign_checkpoint_is_refused(content: str, tmp_path: Path) -> None:
    train(data(), Checkpoint(tmp_path), epochs=1)
    path = tmp_path / "checkpoint.safetensors"
    whole, tensors = path.read_bytes(), {"a": torch.zeros(3)}
    if content == "model":
        model().save(tmp_path / "saved")
        path.write_bytes((tmp_path / "saved" / "model.safetensors").read_bytes())
    elif content in ("half", "empty", "text"):
        path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "text": b"loss,val_loss\n" * 99}[content])
    else:
        texts = {"tensors": None, "json": {"fastae": "{"}, "list": {"fastae": "[]"}, "dict": {"fastae": "{}"}}
        save_file(tensors, path, texts[content])
    text = f"Checkpoint: {path} must be a checkpoint of fastae; it is truncated, or was not written by fastae ("
    with pytest.raises(ValueError, match=re.escape(text)):
        train(data(), Checkpoint(tmp_path, resume=True))


def test_a_directory_that_cannot_be_written_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        train(data(), Checkpoint(tmp_path / "file"))
    train(data(), Checkpoint(tmp_path), epochs=2)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train(data(), Checkpoint(tmp_path, overwrite=True))
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "file"]


@pytest.mark.parametrize("option", [{"batch_size": np.int64(16)}, {"lr": np.float32(1e-3)}, {"seed": np.int64(0)}])
def test_numpy_numbers_are_settings_too(option: dict[str, Any], tmp_path: Path) -> None:
    train(data(), Checkpoint(tmp_path), epochs=1, **option)
    assert len(read(tmp_path)[0]["history"]["loss"]) == 1
