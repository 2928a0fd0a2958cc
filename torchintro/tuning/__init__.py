"""The search for hyper-parameters with Optuna, many trials at a time: :func:`torchintro.tune`."""
