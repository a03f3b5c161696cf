"""Every kind of model, small: what the matrix of `tests/models/test_every_kind.py` is about. A new kind joins here."""

from collections.abc import Callable
from typing import Any

import torch
from cases import uniform
from torch import Tensor

from fastae import ConvAutoencoder, DenseAutoencoder
from fastae.models.base import Autoencoder

ROWS, WIDTH = 40, 36
X = uniform(ROWS, WIDTH, low=0.05, high=0.95)


def dense(**options: Any) -> DenseAutoencoder:
    return DenseAutoencoder([WIDTH, 7, 3], **options)


def conv(**options: Any) -> ConvAutoencoder:
    return ConvAutoencoder((1, 6, 6), [3, 4], 3, **options)


VARIATIONAL: dict[str, Any] = {"likelihood": "bernoulli", "bottleneck": "variational"}
KINDS: dict[str, tuple[Callable[..., Autoencoder], dict[str, Any]]] = {
    "mse": (dense, {}),
    "mae": (dense, {"likelihood": "mae"}),
    "huber": (dense, {"likelihood": "huber:delta=0.3"}),
    "gaussian": (dense, {"likelihood": "gaussian"}),
    "gaussian, a scale": (dense, {"likelihood": "gaussian:scale=0.5"}),
    "gaussian, learned": (dense, {"likelihood": "gaussian:scale=learned"}),
    "gaussian, of each": (dense, {"likelihood": "gaussian:scale=per_feature"}),
    "bernoulli": (dense, {"likelihood": "bernoulli"}),
    "poisson": (dense, {"likelihood": "poisson"}),
    "nb": (dense, {"likelihood": "nb"}),
    "tied": (dense, {"tied": True}),
    "dropout": (dense, {"dropout": 0.3}),
    "gaussian noise": (dense, {"corrupt": "gaussian:0.3,low=0,high=1"}),
    "mask": (dense, {"corrupt": "mask:0.3"}),
    "masked alone": (dense, {"corrupt": "mask:0.3,masked"}),
    "salt and pepper": (dense, {"corrupt": "salt_pepper:0.3"}),
    "swap": (dense, {"corrupt": "swap:0.3,groups=0+1/5+7+9"}),
    "drop": (dense, {"corrupt": "drop:0.3"}),
    "variational": (dense, VARIATIONAL),
    "warm-up": (dense, VARIATIONAL | {"bottleneck": "variational:beta=0.5,warmup_steps=5"}),
    "capacity": (dense, VARIATIONAL | {"bottleneck": "variational:capacity=2.0"}),
    "free bits": (dense, VARIATIONAL | {"bottleneck": "variational:free_bits=0.2"}),
    "variational, learned": (dense, VARIATIONAL | {"likelihood": "gaussian:scale=learned"}),
    "all at once": (dense, VARIATIONAL | {"likelihood": "nb", "dropout": 0.2, "corrupt": "drop:0.2"}),
    "l1": (dense, {"bottleneck": "l1:0.01"}),
    "kl-sparse": (dense, {"bottleneck": "kl_sparse:0.1,c=0.02", "code_activation": "sigmoid"}),
    "contractive": (dense, {"bottleneck": "contractive:0.05", "activation": "tanh"}),
    "contractive, tied": (dense, {"bottleneck": "contractive:0.05", "tied": True, "corrupt": "mask:0.2"}),
    "l1, all at once": (dense, {"bottleneck": "l1:0.1", "likelihood": "nb", "dropout": 0.2, "corrupt": "drop:0.2"}),
    "convolutions": (conv, {}),
    "convolutions, l1": (conv, {"bottleneck": "l1:0.1", "code_activation": "relu"}),
    "convolutions, variational": (conv, VARIATIONAL | {"corrupt": "mask:0.2"}),
}
# Objectives of a whole batch's mean divergence, which no process has alone
OF_A_BATCH = {"capacity", "free bits", "kl-sparse"}


def make(kind: str, dtype: torch.dtype = torch.float32) -> Autoencoder:
    torch.manual_seed(0)
    model, options = KINDS[kind]
    return model(**options).to(dtype)


def trained(kind: str, x: Tensor = X, **options: Any) -> tuple[dict[str, Any], Tensor]:
    """What `fit` leaves: the history without times, and all parameters."""
    ae = make(kind)
    history = ae.fit(x, **({"epochs": 3, "batch_size": 16, "lr": 1e-2, "progress": False} | options)).to_dict()
    return {k: v for k, v in history.items() if k != "rows_per_s"}, flat(ae)


def flat(ae: Autoencoder) -> Tensor:
    return torch.cat([p.detach().flatten() for p in ae.parameters()])
