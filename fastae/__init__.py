"""fastae: dense autoencoders on fused Triton kernels, with a plain PyTorch twin of every kernel."""

from fastae._backend import get_backend, set_backend, use_backend
from fastae.autoencoder import DenseAutoencoder
from fastae.callbacks import Checkpoint, EarlyStopping
from fastae.explain import explain
from fastae.history import History
from fastae.linear_act import LinearAct, linear_act
from fastae.linear_act_mse import linear_act_mse
from fastae.mse_loss import MSELoss, mse_loss
from fastae.patch import PatchReport, patch, unpatch
from fastae.persistence import load
from fastae.profile import profile
from fastae.run import Callback
from fastae.scaling import Scaler
from fastae.train_step import TrainStep

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
