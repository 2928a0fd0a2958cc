"""Standardise, train, save; then load the file elsewhere and predict from features in their own units."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from torchintro import Standardize, fit, load_model, save_model

torch.manual_seed(0)
area = 40 + 120 * torch.rand(300, 1)
rooms = (area / 30).round()
X = torch.cat([area, rooms], dim=1)
price = 2500 * area + 9000 * rooms + 20000

standardize = Standardize.fit(X)
linear = nn.Linear(2, 1)
result = fit(linear, standardize(X), price, lr=0.1, epochs=300, validation=(standardize(X[:50]), price[:50]))
print(f"loss {result.losses[0]:.4g} -> {result.losses[-1]:.4g} in {result.seconds:.2f} s with {result.engine}")

with tempfile.TemporaryDirectory() as folder:
    path = save_model(
        Path(folder) / "model.pt",
        nn.Sequential(standardize, linear),
        feature_names=["area", "rooms"],
        target_names=["price"],
        metadata={"lr": 0.1, "epochs": 300},
    )
    saved = load_model(path)

with torch.no_grad():
    prediction = saved.model(torch.tensor([[90.0, 3.0]]))
names = ", ".join(saved.feature_names)
print(f"{saved.target_names[0]} at {names} = 90, 3: {prediction.item():.0f} (by the rule: 272000)")
