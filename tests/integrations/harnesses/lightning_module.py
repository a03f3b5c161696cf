"""The shape of Lightning's own introduction: a LightningModule with an encoder and a decoder, and a Trainer."""

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class LitAutoEncoder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))
        self.total = 0.0

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def training_step(self, batch, batch_index):
        (x,) = batch
        loss = F.mse_loss(self(x), x)
        self.total += loss.item() * len(x)
        return loss

    def on_train_epoch_end(self):
        print("loss", self.total / len(digits))
        self.total = 0.0

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


L.seed_everything(0)
digits = TensorDataset(torch.tensor(load_digits().data, dtype=torch.float32) / 16)
model = LitAutoEncoder()
loader = DataLoader(digits, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
trainer = L.Trainer(
    max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip
trainer.fit(model, loader)
