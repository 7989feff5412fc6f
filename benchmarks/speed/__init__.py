"""Speed against what else PyTorch offers: ``python -m benchmarks.speed --help``."""
