"""What `fit` and its neighbours are handed by mistake or by habit: taken as others take it, or refused in one line."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastae
from fastae import DenseAutoencoder, EarlyStopping, Scaler, TrainStep


def data(rows: int = 64, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, 12)).astype(dtype)


def model() -> DenseAutoencoder:
    torch.manual_seed(0)
    return DenseAutoencoder([12, 8, 3])


def fit(x: Any = None, ae: DenseAutoencoder | None = None, **options: Any) -> fastae.History:
    return (ae or model()).fit(data() if x is None else x, **{"epochs": 2, "progress": False} | options)


def test_fewer_rows_than_a_batch_are_one_batch() -> None:
    ae, same = model(), model()
    assert fit(ae=ae).loss == fit(ae=same, batch_size=58).loss  # 64 rows, 6 of them held out
    assert ae.trained is not None
    assert ae.trained["batch_size"] == 58
    assert fit(data(2), validation_split=0).epochs == 2


def masked() -> Any:
    return np.ma.masked_greater(data(), 1.0)


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "masked rows": (
        lambda: fit(masked()), TypeError, "fit: x must have no mask; got a masked array: fill it, x.filled(value)"
    ),
    "masked score": (lambda: model().score(masked()), TypeError, "DenseAutoencoder: x must have no mask"),
    "masked scaler": (lambda: Scaler.fit(masked(), "unit"), TypeError, "Scaler: x must have no mask"),
    "masked transform": (
        lambda: Scaler.fit(data(), "unit").transform(masked()), TypeError, "Scaler: x must have no mask"
    ),
    "masked validation": (
        lambda: fit(validation_data=masked()), TypeError, "fit: validation_data must have no mask"
    ),
    "scaler of a tensor": (
        lambda: Scaler.fit(torch.ones(3, 2), "unit"), TypeError,
        "Scaler: x must be a numpy array; got Tensor: x.numpy(force=True) makes one",
    ),
    "scaler of a list": (
        lambda: Scaler.fit([[1.0]], "unit"), TypeError,
        "Scaler: x must be a numpy array; got list: np.asarray(x) makes one",
    ),
    "transform of a tensor": (
        lambda: Scaler.fit(data(), "unit").transform(torch.ones(3, 12)), TypeError, "Scaler: x must be a numpy array"
    ),
    "sparse rows": (
        lambda: fit(torch.from_numpy(data()).to_sparse()), TypeError,
        "fit: x must be dense; got sparse_coo, convert it: x.to_dense()",
    ),
    "float8 rows": (
        lambda: fit(torch.from_numpy(data()).to(torch.float8_e4m3fn)), TypeError,
        "fit: x must be float32, float64 or of half precision; got float8_e4m3fn: x.float()",
    ),
    "one callback": (
        lambda: fit(callbacks=EarlyStopping()), TypeError,
        "fit: callbacks must be a list of callbacks; got EarlyStopping",
    ),
    "a class": (
        lambda: fit(callbacks=[EarlyStopping]), TypeError,
        "fit: callbacks must be objects; got the class EarlyStopping: EarlyStopping()",
    ),
    "something else": (
        lambda: fit(callbacks=[print]), TypeError, "fit: callbacks must be of class fastae.Callback; got builtin"
    ),
    "closure": (
        lambda: fit(ae=(ae := model()), optimizer=torch.optim.LBFGS(ae.parameters())), TypeError,
        "TrainStep: optimizer must step without a closure; LBFGS needs one",
    ),
    "numpy step": (
        lambda: step()(data()), TypeError, "TrainStep: x must be a torch.Tensor; got ndarray: torch.from_numpy(x) makes"
    ),
    "list of rows": (
        lambda: step()(torch.from_numpy(data()), [1, 2]), TypeError,
        "TrainStep: rows must be an int64 tensor; got list: torch.as_tensor(rows)",
    ),
    "seed": (lambda: fit(seed=2**64), ValueError, f"fit: seed must be a whole number of 64 bits; got {2**64}"),
}  # fmt: skip


def step() -> TrainStep:
    ae = model()
    return TrainStep(ae, torch.optim.SGD(ae.parameters(), 0.1), 64)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str) -> None:
    call, error, text = REFUSED[case]
    with pytest.raises(error, match=f"^{re.escape(text)}") as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_fit_trains_where_gradients_are_off(mode: Callable[[], Any]) -> None:
    class Own(DenseAutoencoder):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 1

    for kind in (DenseAutoencoder, Own):
        losses = []
        for context in (mode, torch.enable_grad):
            torch.manual_seed(0)
            ae = kind([12, 8, 3])
            with context():
                losses.append(fit(ae=ae).loss)
        assert losses[0] == losses[1]


def test_profile_leaves_the_random_state() -> None:
    class Dropped(DenseAutoencoder):
        def __init__(self, features: list[int]) -> None:
            super().__init__(features)
            self.encoder.append(nn.Dropout(0.5))

    ae, before = Dropped([12, 8, 3]), torch.get_rng_state()
    fastae.profile(ae, data(), steps=1, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_save_to_one_path(tmp_path: Path) -> None:
    errors: list[BaseException] = []
    models = [model() for _ in range(4)]

    def save(ae: DenseAutoencoder) -> None:
        try:
            for _ in range(20):
                ae.save(tmp_path / "model")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(ae,)) for ae in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    fastae.load(tmp_path / "model")
