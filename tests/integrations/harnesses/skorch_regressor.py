"""The shape of skorch's quick start: a module in a scikit-learn estimator."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetRegressor
from torch import nn

torch.manual_seed(0)
digits = load_digits().data.astype(np.float32) / 16
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))
net = NeuralNetRegressor(
    model, criterion=nn.MSELoss, optimizer=torch.optim.Adam, lr=1e-3, max_epochs=5, batch_size=64, train_split=None,
    iterator_train__shuffle=True, verbose=0,
)  # fmt: skip
net.fit(digits, digits)
for loss in net.history[:, "train_loss"]:
    print("loss", loss)
