"""fit: what it says about options and data that do not fit, before it has touched the model."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from fastae import DenseAutoencoder


def model(seed: int = 0, **options: Any) -> DenseAutoencoder:
    torch.manual_seed(seed)
    return DenseAutoencoder([12, 8, 3], **options)


def data(rows: int = 70) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, 12)).astype(np.float32)


def poisoned(**values: float) -> np.ndarray:
    x = data()
    x[33, 5], x[60, 2] = values["first"], values["second"]
    return x


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1; got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1; got 0"),
        ({"lr": math.nan}, ValueError, "lr must be a positive number; got nan"),
        ({"lr": math.inf}, ValueError, "lr must be a positive number; got inf"),
        ({"lr": -0.1}, ValueError, "lr must be a positive number; got -0.1"),
        ({"lr": 0}, ValueError, "lr must be a positive number; got 0"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be 0 or a positive number; got -1"),
        ({"validation_split": 1.0}, ValueError, "validation_split must be at least 0 and below 1; got 1.0"),
        ({"validation_split": math.nan}, ValueError, "validation_split must be at least 0 and below 1; got nan"),
        (
            {"validation_split": 0.005},
            ValueError,
            "validation_split must leave rows on both sides; got 0.005 of 70 rows (0 for no validation)",
        ),
        (
            {"validation_split": 0.999},
            ValueError,
            "validation_split must leave rows on both sides; got 0.999 of 70 rows (0 for no validation)",
        ),
        (
            {"optimizer": "adamm"},
            ValueError,
            "optimizer must be one of adam, adamw, sgd; got 'adamm'; did you mean 'adam'?",
        ),
        (
            {"precision": "bfloat32"},
            ValueError,
            "precision must be one of float32, bfloat16, float64; got 'bfloat32'; did you mean 'float32'?",
        ),
        ({"precision": "float64"}, ValueError, "precision 'float64' needs float64 parameters; got float32"),
        ({"x": data().astype(int)}, TypeError, "x must be floating point; got int64, convert it: x.astype('float32')"),
        (
            {"x": torch.zeros(70, 12, dtype=torch.int32)},
            TypeError,
            "x must be floating point; got int32, convert it: x.float()",
        ),
        ({"x": data().astype(complex)}, TypeError, "x must be floating point; got complex128"),
        ({"x": data().tolist()}, TypeError, "x must be a numpy array or a torch.Tensor; got list"),
        ({"x": data()[:, :11]}, ValueError, "x must be [rows, 12]; got [70, 11]"),
        ({"x": data()[:0]}, ValueError, "x must have at least one row; got [0, 12]"),
        ({"validation_data": data()[:0]}, ValueError, "validation_data must have at least one row; got [0, 12]"),
        ({"validation_data": data()[:, 1:]}, ValueError, "validation_data must be [rows, 12]; got [70, 11]"),
        (
            {"x": poisoned(first=math.nan, second=-math.inf)},
            ValueError,
            "x must be finite; got 1 NaN and 1 inf, the first at row 33, column 5 (nan)",
        ),
        (
            {"x": torch.from_numpy(poisoned(first=-math.inf, second=math.inf))},
            ValueError,
            "x must be finite; got 2 inf, the first at row 33, column 5 (-inf)",
        ),
        (
            {"validation_data": poisoned(first=math.nan, second=1)},
            ValueError,
            "validation_data must be finite; got 1 NaN, the first at row 33, column 5 (nan)",
        ),
        (
            {"x": poisoned(first=1, second=1).astype(float) * np.where(np.arange(70) == 4, 1e45, 1)[:, None]},
            ValueError,
            "x as float32 must be finite; got 12 inf, the first at row 4, column 0 (",
        ),
        ({"epochs": 1.5}, (TypeError, ValueError), "epochs must be "),
        ({"batch_size": 2.5}, (TypeError, ValueError), "batch_size must be "),
        ({"optimizer": torch.optim.Adam}, (TypeError, ValueError), "optimizer must be "),
        ({"optimizer": torch.optim.Adam(model(1).parameters())}, (TypeError, ValueError), "optimizer must be "),
    ],
)
def test_options_and_data_that_do_not_fit(options: dict[str, Any], error: Any, text: str) -> None:
    ae, options = model(), dict(options)
    x = options.pop("x", data())
    with pytest.raises(error, match=f"^{re.escape('fit: ' + text)}"):
        ae.fit(x, **({"epochs": 2, "batch_size": 16, "progress": False} | options))
    for a, b in zip(ae.parameters(), model().parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_float64_model_says_which_precision_it_needs() -> None:
    with pytest.raises(ValueError, match=r"^fit: precision 'float32' needs float32 parameters; got float64$"):
        model(dtype=torch.float64).fit(data(), batch_size=16, progress=False)
