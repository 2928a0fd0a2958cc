"""The PyTorch loop of any introduction, written out: the oracle of the tests of training."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812


def plain_loop(model, X, y, optimizer, *, epochs, batch_size=None, shuffle=True, seed=None, validation=None, lr=None):
    """Train, with the optimizer's learning rate or with one an epoch; return the losses and the validation losses."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    losses, validation_losses = [], []
    for epoch in range(epochs):
        if lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr[epoch]
        order = torch.arange(len(X), device=X.device)
        if batch_size is not None and batch_size < len(X) and shuffle:
            order = torch.randperm(len(X), generator=generator).to(X.device)
        mean = 0.0
        for rows in order.split(batch_size or len(X)):

            def closure(rows=rows):
                optimizer.zero_grad()
                loss = F.mse_loss(model(X[rows]), y[rows])
                loss.backward()
                return loss

            mean += optimizer.step(closure).item() * (len(rows) / len(X))
        losses.append(mean)
        if validation is not None:
            with torch.no_grad():
                validation_losses.append(F.mse_loss(model(validation[0]), validation[1]).item())
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(validation_losses, dtype=torch.float64)
