"""The PyTorch side: everything that makes a model smaller."""
