"""What computes a training run, and which of them suits a problem.

``fused``
    The whole loop in one operator, ``torchintro::linear_mse_fit``: sgd, adam and adamw, float32 and float64.
``statistics``
    For full batches: one pass over the rows for their second moments, then ``torchintro::linear_statistics_fit``, whose
    epochs cost ``in_features ** 2`` however many rows there are.
``autograd``
    The PyTorch loop around :func:`torchintro.linear_mse_loss`: every optimizer of ``torch.optim``, every dtype.
``reference``
    The same loop in plain PyTorch.
"""
