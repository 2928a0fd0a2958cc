"""Side-by-side timings of plain PyTorch, ``torch.compile`` and this package: the command ``python -m benchmarks``."""
