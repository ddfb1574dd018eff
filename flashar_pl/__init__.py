"""FlashAR in PyTorch Lightning: see docs/method.md for the method and README.md for use."""

__version__ = "0.1.0"
