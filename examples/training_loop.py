"""The operator in a training loop of one's own: the last layer and the loss of a network become one criterion.

Before, the loop computed ``loss = F.mse_loss(head(backbone(X)), y)``. The criterion shares the head's parameters, so
the optimizer, the state dict and the predictions are what they were.
"""

import torch
from torch import nn

from torchintro import LinearMSELoss

torch.manual_seed(0)
X = torch.linspace(-3, 3, 512).unsqueeze(-1)
y = torch.sin(2 * X)

backbone = nn.Sequential(nn.Linear(1, 64), nn.Tanh())
head = nn.Linear(64, 1)
criterion = LinearMSELoss.from_linear(head)
optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=0.005)

for epoch in range(1, 1001):
    optimizer.zero_grad()
    loss = criterion(backbone(X), y)
    loss.backward()
    optimizer.step()
    if epoch % 200 == 0:
        print(f"Epoch [{epoch}/1000], Loss: {loss.item():.4f}")

with torch.no_grad():
    prediction = head(backbone(torch.tensor([[0.5]])))
print(f"sin(2 * 0.5) = 0.8415, predicted {prediction.item():.4f}")
