"""Weights of rows and targets that are not the rows: in `loss`, `TrainStep` and `fit`."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from cases import uniform
from torch import Tensor, nn

import fastae
from fastae import DenseAutoencoder

X = uniform(40, 9, low=0.05, high=0.95)
TARGET = X.flip(1).contiguous()
WEIGHT = torch.tensor([0.0, 1.0, 2.0, 0.5]).repeat(10)
LOSSES = ["mse", "mae", "huber:delta=0.2", "bernoulli", "gaussian", "poisson"]


def model(dtype: torch.dtype = torch.float64, **options: Any) -> DenseAutoencoder:
    torch.manual_seed(0)
    return DenseAutoencoder([9, 7, 3], **options).to(dtype)


def weighted(ae: DenseAutoencoder, x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Sum r l / M, each l by the model itself."""
    return torch.stack([w * ae.loss(a[None], t[None]) for a, t, w in zip(x, target, weight, strict=True)]).mean()


def trained_plainly(ae: DenseAutoencoder, weight: Tensor, batches: list[Tensor]) -> None:
    optimizer = torch.optim.Adam(ae.parameters(), lr=1e-2)
    for rows in batches:
        optimizer.zero_grad()
        weighted(ae, X.double()[rows], TARGET.double()[rows], weight[rows]).backward()
        optimizer.step()


@pytest.mark.parametrize("likelihood", LOSSES)
def test_a_step_with_weights_and_a_target(likelihood: str, backend: str) -> None:
    ae = model(likelihood=likelihood)
    other, batches = copy.deepcopy(ae), [*torch.randperm(40).split(16)]  # 16, 16, 8
    step = fastae.TrainStep(ae, torch.optim.Adam(ae.parameters(), lr=1e-2), 16)
    losses = [step(X.double(), rows, TARGET.double(), WEIGHT).clone() for rows in batches]
    first = weighted(other, X.double()[batches[0]], TARGET.double()[batches[0]], WEIGHT[batches[0]])
    torch.testing.assert_close(losses[0], first.detach(), rtol=1e-12, atol=0)
    trained_plainly(other, WEIGHT.double(), batches)
    for p, q in zip(ae.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("likelihood", ["mse", "bernoulli"])
def test_weights_where_an_island_comes_last(likelihood: str, backend: str) -> None:
    ae = model(likelihood=likelihood)
    ae.decoder.append(nn.Linear(9, 9).double())
    other = copy.deepcopy(ae)
    fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), lr=0.1), 40)(X.double(), None, TARGET.double(), WEIGHT)
    weighted(other, X.double(), TARGET.double(), WEIGHT.double()).backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    for p, q in zip(ae.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)


def test_loss_with_weights_is_the_plain_one_of_each_row() -> None:
    ae = model()
    x, target = X.double(), TARGET.double()
    torch.testing.assert_close(ae.loss(x, target, WEIGHT), weighted(ae, x, target, WEIGHT), rtol=1e-12, atol=0)
    torch.testing.assert_close(ae.loss(x, sample_weight=torch.ones(40)), ae.loss(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_whole_weights_are_rows_taken_so_often(precision: str) -> None:
    """The same gradient by weights 0, 1, 2 and by rows that are there as often; weights are scaled to a mean of 1."""
    whole = torch.tensor([0, 1, 2, 1]).repeat(10)
    options: dict[str, Any] = {
        "epochs": 3, "optimizer": "sgd", "lr": 0.5, "validation_split": 0, "progress": False, "precision": precision,
    }  # fmt: skip
    ae, other = model(torch.float32), model(torch.float32)
    one = ae.fit(X, sample_weight=7.0 * whole.numpy(), batch_size=40, **options)
    two = other.fit(X.repeat_interleave(whole, 0), batch_size=40, **options)
    tolerance = 1e-5 if precision == "float32" else 1e-2
    assert one.loss == pytest.approx(two.loss, rel=tolerance)
    for p, q in zip(ae.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance / 10)


def test_a_row_of_weight_0_changes_nothing() -> None:
    ae, other, x = model(torch.float32), model(torch.float32), X.clone()
    x[::4] = 1e3  # where WEIGHT is 0
    options: dict[str, Any] = {"epochs": 3, "validation_split": 0, "progress": False, "sample_weight": WEIGHT.numpy()}
    assert ae.fit(x, **options).loss == other.fit(X, **options).loss
    assert all(map(torch.equal, ae.parameters(), other.parameters()))


def test_fit_towards_a_target_and_its_validation() -> None:
    ae = model(torch.float32)
    history = ae.fit(X, target=TARGET, epochs=300, lr=1e-2, progress=False, sample_weight=WEIGHT)
    assert history.val_loss[-1] < 0.5 * history.val_loss[0]
    error = (ae(X) - TARGET).square().mean()
    assert error < 0.5 * (ae(X) - X).square().mean()
    given = ae.fit(X, target=TARGET, epochs=1, lr=1e-9, progress=False, validation_data=(X[:7], TARGET[:7]))
    assert given.val_loss == [pytest.approx(ae.loss(X[:7], TARGET[:7]).item(), rel=1e-5)]


def test_the_validation_loss_is_the_weighted_mean() -> None:
    ae = model(torch.float32)
    weight = WEIGHT + 0.25
    history = ae.fit(X, sample_weight=weight, epochs=1, lr=1e-9, progress=False, validation_split=0.25, seed=3)
    held_out = fastae.train.rows.split_rows(40, 0.25, torch.Generator().manual_seed(3))[1]
    losses = ae.score(X[held_out])
    assert history.val_loss[0] == pytest.approx(
        float((losses * weight[held_out]).sum() / weight[held_out].sum()), rel=1e-5
    )


def test_a_run_with_weights_resumes_to_the_same_bits(tmp_path: Any) -> None:
    options: dict[str, Any] = {"target": TARGET, "sample_weight": WEIGHT, "progress": False, "batch_size": 16}
    ae, other = model(torch.float32), model(torch.float32)
    whole = ae.fit(X, epochs=4, **options)
    other.fit(X, epochs=2, callbacks=[fastae.Checkpoint(tmp_path)], **options)
    other = model(torch.float32)
    resumed = other.fit(X, epochs=4, callbacks=[fastae.Checkpoint(tmp_path, resume=True)], **options)
    assert resumed.loss == whole.loss
    assert all(map(torch.equal, ae.parameters(), other.parameters()))
    for name, value in (("target", X), ("sample_weight", WEIGHT * 2 + 1)):
        with pytest.raises(ValueError, match=f"Checkpoint: {name} must be "):
            other.fit(X, epochs=4, callbacks=[fastae.Checkpoint(tmp_path, resume=True)], **(options | {name: value}))


BAD = [
    ({"sample_weight": np.zeros(40)}, "sample_weight must be above 0 for a training row; all are 0"),
    ({"sample_weight": -WEIGHT}, r"sample_weight must be 0 or positive numbers; got -1.0 at row 1"),
    ({"sample_weight": np.full(40, np.nan)}, "sample_weight must be 0 or positive numbers; got nan at row 0"),
    ({"sample_weight": np.ones(39)}, r"sample_weight must be \[40\] real numbers, one a row; got \[39\]"),
    ({"sample_weight": np.ones((40, 1))}, r"sample_weight must be \[40\] real numbers, one a row; got \[40, 1\]"),
    ({"target": X[:7]}, "target must have as many rows as x, 40; got 7"),
    ({"target": X[:, :3]}, r"target must be \[rows, 9\]; got \[40, 3\]"),
    ({"target": X, "validation_data": X}, r"validation_data must be \(rows, their target\), as there is a target"),
    ({"validation_data": (X, X)}, "validation_data must be rows alone, as there is no target; got a pair"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_weights_and_targets_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(torch.float32).fit(X, progress=False, **options)


def test_a_step_refuses_weights_that_do_not_fit() -> None:
    ae = model(torch.float32)
    step = fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), lr=0.1), 40)
    for weight, got in ((torch.ones(7), r"\[7\]"), (1.0, "float")):
        with pytest.raises(ValueError, match=r"sample_weight must be a tensor \[40\] on cpu; got " + got):
            step(X, None, None, weight)
    ae.loss = lambda x: DenseAutoencoder.loss(ae, x)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="sample_weight must be None: DenseAutoencoder has a loss of its own"):
        step(X, None, None, torch.ones(40))
