"""Recurrent cells that users write in PyTorch, turned into fused kernels."""
