"""Search a learning rate with Optuna in a study on disk, and go on with the study later."""

import tempfile
from pathlib import Path

from torchintro import evaluate, fit, initial_linear, split, synthetic, tune

train, test = split(synthetic(200, seed=0), 0.2, seed=0)

with tempfile.TemporaryDirectory() as folder:
    settings = {
        "epochs": 50,
        "lr": (1e-4, 10.0),
        "validation": 0.25,
        "seed": 0,
        "storage": f"sqlite:///{Path(folder) / 'study.db'}",
        "study_name": "synthetic",
    }
    tune(train.X, train.y, n_trials=8, **settings)
    # Another day, another process: the study holds 8 finished trials, so this runs the 12 that are missing.
    study = tune(train.X, train.y, n_trials=20, **settings)

for trial in sorted(study.trials, key=lambda trial: trial.params["lr"]):
    note = f"diverged in epoch {trial.user_attrs['diverged_epoch']}" if "diverged" in trial.user_attrs else ""
    print(f"lr {trial.params['lr']:.5f}   validation loss {trial.value:.5f}   {note}")

lr = study.best_params["lr"]
model = initial_linear(1, 1, seed=0)
fit(model, train.X, train.y, lr=lr, epochs=50)
print(f"best lr {lr:.4f}: y = {model.weight.item():.3f} x + {model.bias.item():.3f} (made with y = 3 x)")
print(f"held-out mean squared error {evaluate(model, test.X, test.y)['mse']:.4f} (noise alone: 0.01)")
