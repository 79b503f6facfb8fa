"""fastkd beside eager PyTorch, torch.compile, other packages and the memory roof."""
