"""fastae: autoencoders on fused Triton kernels, with a plain PyTorch twin of every kernel."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastae import aliases as _aliases
from fastae.data.scaling import Scaler
from fastae.engine.train_step import TrainStep
from fastae.models.dense import DenseAutoencoder
from fastae.models.loading import load
from fastae.nn.backend import get_backend, set_backend, use_backend
from fastae.nn.linear_act import LinearAct, linear_act
from fastae.nn.linear_act_loss import linear_act_loss, linear_act_mse
from fastae.nn.losses import MSELoss, mse_loss
from fastae.train.callbacks import Checkpoint, EarlyStopping
from fastae.train.history import History
from fastae.train.run import Callback

if TYPE_CHECKING:
    from fastae.analysis.explain import explain
    from fastae.analysis.profile import profile
    from fastae.patching.patch import PatchReport, patch, unpatch

_aliases.register()

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "Checkpoint",
    "DenseAutoencoder",
    "EarlyStopping",
    "History",
    "LinearAct",
    "MSELoss",
    "PatchReport",
    "Scaler",
    "TrainStep",
    "explain",
    "get_backend",
    "linear_act",
    "linear_act_loss",
    "linear_act_mse",
    "load",
    "mse_loss",
    "patch",
    "profile",
    "set_backend",
    "unpatch",
    "use_backend",
]

# Imported on first use: a program that loads a model and scores rows needs none of them
_LATER = {
    "explain": "fastae.analysis.explain",
    "profile": "fastae.analysis.profile",
    "PatchReport": "fastae.patching.patch",
    "patch": "fastae.patching.patch",
    "unpatch": "fastae.patching.patch",
    "likelihoods": "",
    "verify": "",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'fastae' has no attribute {name!r}")
    found = getattr(import_module(_LATER[name]), name) if _LATER[name] else import_module(f"fastae.{name}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
