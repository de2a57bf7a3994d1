"""The reference tier: every op in PyTorch, on any device."""
