"""The shape of Hugging Face accelerate's quick tour: everything through `prepare`, and `accelerator.backward`."""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
digits = TensorDataset(torch.tensor(load_digits().data, dtype=torch.float32) / 16)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))
loader = DataLoader(digits, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
criterion = nn.MSELoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for _ in range(5):
    total = 0.0
    for (x,) in loader:
        optimizer.zero_grad()
        loss = criterion(model(x), x)
        accelerator.backward(loss)
        optimizer.step()
        total += loss.item() * len(x)
    print("loss", total / len(digits))
