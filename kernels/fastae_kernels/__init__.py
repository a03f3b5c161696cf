"""Jit functions, their launchers and their plain-PyTorch twins; tensors and tiles, never autograd.

`reference` needs PyTorch alone; every other module imports Triton, so import those only where a kernel is to run.
"""
