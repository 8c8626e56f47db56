"""The network and its shapes in PyTorch."""
