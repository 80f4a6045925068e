"""The training engine: torch and torch.distributed, no Ray. It runs under plain python, torchrun or pytest."""
