"""fastae: autoencoders on fused Triton kernels, with a plain PyTorch twin of every kernel.

Importing it imports nothing else, PyTorch included: each name is fetched from its module when it is first used. So are
the ops `torch.ops.fastae.*`; `import fastae.engine.library` registers them for a graph that somebody saved.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastae import aliases as _aliases

if TYPE_CHECKING:
    from fastae.analysis.explain import explain
    from fastae.analysis.profile import profile
    from fastae.data.scaling import Scaler
    from fastae.engine.train_step import TrainStep
    from fastae.models.conv import ConvAutoencoder
    from fastae.models.dense import DenseAutoencoder
    from fastae.models.loading import load
    from fastae.nn.backend import get_backend, set_backend, use_backend
    from fastae.nn.linear_act import LinearAct, linear_act
    from fastae.nn.linear_act_loss import linear_act_loss, linear_act_mse
    from fastae.nn.losses import MSELoss, mse_loss
    from fastae.patching.patch import PatchReport, patch, unpatch
    from fastae.train.callbacks import EarlyStopping
    from fastae.train.checkpoint import Checkpoint
    from fastae.train.history import History
    from fastae.train.run import Callback

_aliases.register()

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "Checkpoint",
    "ConvAutoencoder",
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

_LATER = {
    "fastae.analysis.explain": ("explain",),
    "fastae.analysis.profile": ("profile",),
    "fastae.data.scaling": ("Scaler",),
    "fastae.engine.train_step": ("TrainStep",),
    "fastae.models.conv": ("ConvAutoencoder",),
    "fastae.models.dense": ("DenseAutoencoder",),
    "fastae.models.loading": ("load",),
    "fastae.nn.backend": ("get_backend", "set_backend", "use_backend"),
    "fastae.nn.linear_act": ("LinearAct", "linear_act"),
    "fastae.nn.linear_act_loss": ("linear_act_loss", "linear_act_mse"),
    "fastae.nn.losses": ("MSELoss", "mse_loss"),
    "fastae.patching.patch": ("PatchReport", "patch", "unpatch"),
    "fastae.train.callbacks": ("EarlyStopping",),
    "fastae.train.checkpoint": ("Checkpoint",),
    "fastae.train.history": ("History",),
    "fastae.train.run": ("Callback",),
}
_MODULE_OF = {name: module for module, names in _LATER.items() for name in names}
_MODULES = ("bottlenecks", "likelihoods", "noise", "verify")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"fastae.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fastae' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, *_MODULES})
