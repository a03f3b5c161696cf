"""fastae: dense autoencoders on fused Triton kernels, with a plain PyTorch twin of every kernel."""

from fastae.analysis.explain import explain
from fastae.analysis.profile import profile
from fastae.data.scaling import Scaler
from fastae.engine.train_step import TrainStep
from fastae.models.dense import DenseAutoencoder
from fastae.models.loading import load
from fastae.nn.backend import get_backend, set_backend, use_backend
from fastae.nn.linear_act import LinearAct, linear_act
from fastae.nn.linear_act_loss import linear_act_mse
from fastae.nn.losses import MSELoss, mse_loss
from fastae.patching.patch import PatchReport, patch, unpatch
from fastae.train.callbacks import Checkpoint, EarlyStopping
from fastae.train.history import History
from fastae.train.run import Callback

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
    "linear_act_mse",
    "load",
    "mse_loss",
    "patch",
    "profile",
    "set_backend",
    "unpatch",
    "use_backend",
]
