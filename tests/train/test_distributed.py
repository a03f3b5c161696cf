"""fit and TrainStep in a process group: two processes do what one does, and agree on everything."""

import contextlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from pair import Pair
from torch import Tensor

import fastae
from fastae import Callback, Checkpoint, DenseAutoencoder, EarlyStopping
from fastae.cli import main as cli


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    both = Pair(tmp_path_factory.mktemp("pair"))
    yield both
    both.close()


def model(seed: int = 0, **options: Any) -> DenseAutoencoder:
    torch.manual_seed(seed)
    return DenseAutoencoder([12, 8, 3], **options)


def data(rows: int = 70) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(rows, 3)) @ rng.normal(size=(3, 12))).astype(np.float32)


def own_loss(ae: DenseAutoencoder) -> list[list[float]]:
    """Give `ae` a loss of its own, which no TrainStep takes; returns the first feature of every batch it will see."""
    batches: list[list[float]] = []

    def loss(x: Tensor) -> Tensor:
        batches.append(x[:, 0].tolist())
        return DenseAutoencoder.loss(ae, x)

    ae.loss = loss  # type: ignore[method-assign]
    return batches


def trained(
    *, seed: int = 0, own: bool = False, callbacks: tuple[Callback, ...] = (), x: Any = None, tied: bool = False,
    likelihood: str = "mse", **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """What `fit` leaves, with the batches of this process if the loss is the model's own."""
    ae = model(seed, tied=tied, likelihood=likelihood)
    batches = own_loss(ae) if own else []
    options = {"epochs": 4, "batch_size": 16, "lr": 1e-2, "progress": False} | options
    history = ae.fit(data() if x is None else x, callbacks=callbacks, **options)
    weights = torch.cat([p.detach().flatten() for p in ae.parameters()]).numpy()
    left = history.to_dict() | {"weights": weights, "batches": batches}
    return {name: value for name, value in left.items() if name != "rows_per_s"}


def assert_alike(a: dict[str, Any], b: dict[str, Any]) -> None:
    """The same bits."""
    assert np.array_equal(a["weights"], b["weights"])
    assert (a["loss"], a["val_loss"], a["stopped"]) == (b["loss"], b["val_loss"], b["stopped"])


def assert_close(two: dict[str, Any], one: dict[str, Any]) -> None:
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-5)
    np.testing.assert_allclose(two["val_loss"], one["val_loss"], rtol=1e-5)
    assert two["stopped"] == one["stopped"]


def call(options: dict[str, Any]) -> dict[str, Any]:
    return trained(**options)


# ---------------------------------------------------------------- the loss of one process


@pytest.mark.parametrize(
    "options",
    [
        {},  # 63 training rows: batches of 16, the last of 15
        {"batch_size": 31},  # 31, 31 and a last batch of one row: nothing for rank 1
        {"batch_size": 1, "epochs": 1},
        {"batch_size": 63, "optimizer": "sgd"},
        {"tied": True, "optimizer": "adamw", "weight_decay": 0.1},
        {"validation_split": 0.02},  # one row
        {"validation_split": 0.0},
        {"validation_data": data(33) * 2},
        {"own": True},
        {"own": True, "batch_size": 31, "tied": True},
        {"likelihood": "gaussian:scale=per_feature", "batch_size": 31},
        {"likelihood": "nb", "x": np.abs(data()).round(), "lr": 1e-3},
    ],
    ids=str,
)
def test_two_processes_give_the_loss_of_one(options: dict[str, Any], pair: Pair) -> None:
    first, second = pair(call, options)
    assert_alike(first, second)
    assert_close(first, trained(**options))


def conv(_: object) -> dict[str, Any]:
    torch.manual_seed(0)
    ae = fastae.ConvAutoencoder((1, 7, 5), [4, 3], 4)
    x = np.random.default_rng(0).random((70, 1, 7, 5), dtype=np.float32)
    history = ae.fit(x, epochs=4, batch_size=16, lr=1e-2, progress=False)
    weights = torch.cat([p.detach().flatten() for p in ae.parameters()]).numpy()
    return history.to_dict() | {"weights": weights}


def test_convolutions_in_channels_last_train_as_in_one_process(pair: Pair) -> None:
    first, second = pair(conv, None)
    assert_alike(first, second)
    assert_close(first, conv(None))


def test_bfloat16_trains_and_the_ranks_agree(pair: Pair) -> None:
    first, second = pair(call, {"precision": "bfloat16", "epochs": 30})
    assert_alike(first, second)
    assert first["loss"][-1] < 0.6 * first["loss"][0]


def test_an_optimizer_of_your_own_gets_the_mean_gradients(pair: Pair) -> None:
    first, second = pair(with_momentum)
    assert_alike(first, second)
    assert_close(first, with_momentum())


def with_momentum() -> dict[str, Any]:
    ae = model()
    optimizer = torch.optim.SGD(ae.parameters(), lr=1e-2, momentum=0.9)
    history = ae.fit(data(), epochs=4, batch_size=31, optimizer=optimizer, progress=False)
    weights = torch.cat([p.detach().flatten() for p in ae.parameters()]).numpy()
    return history.to_dict() | {"weights": weights}


def test_every_rank_begins_with_the_weights_of_rank_0(pair: Pair) -> None:
    first, second = pair(seeded_by_rank)
    assert_alike(first, second)
    assert_close(first, trained(seed=3))


def seeded_by_rank() -> dict[str, Any]:
    return trained(seed=3 + dist.get_rank())


def test_shares_do_not_overlap_and_cover_every_row(pair: Pair) -> None:
    x = np.repeat(np.arange(70, dtype=np.float32)[:, None], 12, 1)
    options = {"own": True, "x": x, "batch_size": 13, "epochs": 2, "validation_split": 0.0, "lr": 1e-9}
    first, second = (rank["batches"] for rank in pair(call, options))
    one = trained(**options)["batches"]
    steps = math.ceil(70 / 13)
    assert [a + b for a, b in zip(first, second, strict=True)] == one  # batch for batch, in one process's order
    for epoch in range(2):
        batches = first[epoch * steps :][:steps] + second[epoch * steps :][:steps]
        assert sorted(row for batch in batches for row in batch) == list(range(70))
    assert {len(a) - len(b) for a, b in zip(first, second, strict=True)} <= {0, 1}


# ---------------------------------------------------------------- parameters without a gradient


def test_parameters_that_only_some_ranks_use(pair: Pair) -> None:
    """DDP's find_unused_parameters: the mean counts a rank without a gradient as zero; without any there is none."""
    for grads in pair(mean_of_some):
        assert grads == [[0.75, 0.75], None, [3.0]]


def mean_of_some() -> list[Any]:
    from fastae.engine.all_reduce import GradientAllReduce

    a, b, c = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 2, 1))
    mean = GradientAllReduce([a, b, c], dist.group.WORLD)
    both = torch.full((1,), 3.0)
    mine = (torch.ones(2), None, both) if dist.get_rank() == 0 else (None, None, both)
    mean(1.0, mine, 3 if dist.get_rank() == 0 else 1)
    assert mean.rows == 4
    assert mean.loss == 1
    return [None if p.grad is None else p.grad.tolist() for p in (a, b, c)]


# ---------------------------------------------------------------- agreement


def test_early_stopping_stops_every_rank_at_the_same_epoch(pair: Pair) -> None:
    options = {"callbacks": (EarlyStopping(patience=1, min_delta=0.3),), "epochs": 50}
    first, second = pair(call, options)
    assert_alike(first, second)
    assert first["stopped"] == "early stopping"
    assert_close(first, trained(**options))


class StopOnRankOne(Callback):
    def on_epoch_end(self, run: Any) -> None:
        if dist.get_rank() == 1 and run.history.epochs == 2:
            run.stop("enough")


def test_one_rank_stops_all(pair: Pair) -> None:
    first, second = pair(call, {"callbacks": (StopOnRankOne(),)})
    assert_alike(first, second)
    assert (first["stopped"], len(first["loss"])) == ("enough", 2)


def failure(options: dict[str, Any]) -> str:
    """The error that `fit` raises, without the weights that it leaves changing."""
    ae = options.pop("model", None) or model()
    try:
        ae.fit(options.pop("x", data()), progress=False, **({"batch_size": 16, "epochs": 4} | options))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def other_rows() -> str:
    return failure({"x": data() + dist.get_rank()})


def own_share() -> str:
    return failure({"x": data()[: 40 + dist.get_rank()]})


def other_lr() -> str:
    return failure({"lr": 10.0 ** -dist.get_rank()})


@pytest.mark.parametrize(("function", "text"), [
    (other_rows, "ValueError: fit: x must be the same on every rank, which takes its own share of the rows; got "),
    (own_share, "ValueError: fit: training rows must be the same on every rank, which takes its own share of the rows; "
                "got 36 on rank 0, 37 on rank 1"),
    (other_lr, "ValueError: fit: lr must be the same on every rank, which takes its own share of the rows; "
               "got 1.0 on rank 0, 0.1 on rank 1"),
])  # fmt: skip
def test_what_differs_between_ranks_is_refused_on_each(function: Any, text: str, pair: Pair) -> None:
    for error in pair(function):
        assert error.startswith(text)


def test_a_loss_that_explodes_ends_every_rank_with_the_last_good_weights(pair: Pair) -> None:
    first, second = pair(explode)
    assert first == second
    error, weights = first
    assert error.startswith("FloatingPointError: fit: the loss must stay finite; got ")
    assert weights == torch.cat([p.flatten() for p in model().parameters()]).tolist()


def explode() -> tuple[str, list[float]]:
    ae = model()
    error = failure({"model": ae, "optimizer": "sgd", "lr": 1e30})
    return error, torch.cat([p.flatten() for p in ae.parameters()]).tolist()


# ---------------------------------------------------------------- files and progress


def folder_of_own(root: Path) -> Path:
    return root / f"rank{dist.get_rank()}"


def with_checkpoint(root: Path, epochs: int, resume: bool, seed: int) -> dict[str, Any]:
    """Each rank names a folder of its own: what stands in that of rank 1, rank 1 has written."""
    stopping = EarlyStopping(patience=9, min_delta=1e9)  # the best stays epoch 1
    checkpoint = Checkpoint(folder_of_own(root), resume=resume)
    return trained(callbacks=(stopping, checkpoint), epochs=epochs, seed=seed)


def test_rank_0_alone_writes_and_a_resumed_run_has_the_bits_of_one_go(pair: Pair, tmp_path: Path) -> None:
    whole, _ = pair(with_checkpoint, tmp_path / "whole", 6, False, 0)
    pair(with_checkpoint, tmp_path / "parts", 3, False, 0)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["rank0"]
    first, second = pair(with_checkpoint, tmp_path / "parts", 6, True, 5)  # other initial weights, which are replaced
    assert_alike(first, second)
    assert_alike(first, whole)
    alone = trained(
        callbacks=(EarlyStopping(patience=9, min_delta=1e9), Checkpoint(tmp_path / "parts/rank0", resume=True)),
        epochs=8,
    )  # one process goes on from the checkpoint of two
    assert alone["loss"][:6] == whole["loss"]
    assert len(alone["loss"]) == 8


def truncated(root: Path) -> str:
    return failure({"callbacks": (Checkpoint(folder_of_own(root), resume=True),)})


def full_disk(root: Path) -> str:
    import os

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    fsync, os.fsync = os.fsync, full
    try:
        return failure({"callbacks": (Checkpoint(folder_of_own(root), overwrite=True),)})
    finally:
        os.fsync = fsync


def test_what_fails_on_rank_0_is_raised_on_every_rank(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank0/checkpoint.safetensors").write_text("loss,val_loss")
    for error in pair(truncated, tmp_path):
        assert error.startswith(
            f"ValueError: Checkpoint: {tmp_path / 'rank0/checkpoint.safetensors'} must be a checkpoint"
        )
    for error in pair(full_disk, tmp_path):
        assert error == "OSError: [Errno 28] No space left on device"


def progress() -> str:
    with contextlib.redirect_stderr(io.StringIO()) as text:
        trained(progress=True)
    return text.getvalue()


def test_rank_0_alone_shows_progress(pair: Pair) -> None:
    first, second = pair(progress)
    assert [line.split()[1] for line in first.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]
    assert second == ""


# ---------------------------------------------------------------- the command line


def command(*arguments: str) -> tuple[str, str]:
    """What `fastae` prints on this rank, or the error that ends it."""
    result = CliRunner().invoke(cli.cli, arguments)
    return result.output, str(result.exception or "")


def test_an_older_checkpoint_is_neither_lost_nor_mistaken_for_this_runs(pair: Pair, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", data())
    older = tmp_path / "older" / "checkpoint.safetensors"
    older.parent.mkdir()
    older.write_text("older")
    train = ["train", f"{tmp_path / 'rows.npy'}", "--features", "12,3", "--epochs", "1", "--batch-size", "16"]
    train += ["--out", f"{tmp_path / 'model'}", "--checkpoint", f"{older.parent}"]
    for _, error in pair(command, *train):
        assert f"{older} exists; add --resume to go on from it, or --force to start over" in error
    assert older.read_text() == "older"
    assert not (tmp_path / "model").exists()
    (first, error), (second, _) = pair(command, *train, "--force")
    assert not error
    assert "saved" in first
    assert second == ""
    for _, error in pair(command, *train, "--resume"):
        assert "model exists; choose another folder, or add --force" in error


# ---------------------------------------------------------------- TrainStep


def stepped(dtype: torch.dtype, tied: bool) -> tuple[list[float], list[Tensor], list[bool]]:
    """Losses, weights and gradients after steps on 31, 31 and 1 of 63 rows, and on none here where rank 1 is."""
    ae, x = model(tied=tied).to(dtype), torch.from_numpy(data(63)).to(dtype)
    group = dist.group.WORLD if dist.is_initialized() else None
    step = fastae.TrainStep(ae, torch.optim.Adam(ae.parameters(), lr=1e-2, fused=True), 31, group=group)
    losses = []
    for rows in torch.arange(63).split(31):
        mine = rows.tensor_split([20])[dist.get_rank()] if group else rows  # 20 and 11: not halves
        losses.append(step(x, mine))
    mean = step.mean_loss()
    assert math.isnan(step.mean_loss())
    return [*map(float, losses), mean], [p.detach() for p in ae.parameters()], [p.grad for p in ae.parameters()]


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_of_unequal_shares_is_the_step_of_all_rows(tied: bool, pair: Pair) -> None:
    wanted = stepped(torch.float64, tied)
    for found in pair(stepped, torch.float64, tied):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_fp16_gradients_are_summed_in_fp32(pair: Pair) -> None:
    wanted = stepped(torch.float64, False)[2]
    alone = stepped(torch.float16, False)[2]
    for _, _, grads in pair(stepped, torch.float16, False):
        assert {grad.dtype for grad in grads} == {torch.float16}
        for grad, one, truth in zip(grads, alone, wanted, strict=True):
            floor = 1e-3 * truth.abs().max()
            assert (grad.double() - truth).abs().max() <= 2 * (one.double() - truth).abs().max() + floor


def no_rows() -> str:
    ae = model()
    step = fastae.TrainStep(ae, torch.optim.Adam(ae.parameters()), 4, group=dist.group.WORLD)
    try:
        step(torch.zeros(0, 12))
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_step_without_rows_on_any_process_is_refused(pair: Pair) -> None:
    text = "TrainStep: a step must have at least one row in the group; got none on any process"
    assert pair(no_rows) == [text, text]
