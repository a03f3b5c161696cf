"""The shape of PyTorch's own tutorials: a module, a DataLoader, an optimizer and two loops."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))

    def forward(self, x):
        return self.decoder(self.encoder(x))


torch.manual_seed(0)
digits = TensorDataset(torch.tensor(load_digits().data, dtype=torch.float32) / 16)
model = Autoencoder()
loader = DataLoader(digits, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
criterion = nn.MSELoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

for _ in range(5):
    total = 0.0
    for (x,) in loader:
        loss = criterion(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(x)
    print("loss", total / len(digits))
