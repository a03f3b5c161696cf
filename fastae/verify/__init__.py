"""Proof without a GPU: kernels as the compiler made them, read, counted and executed on a CPU."""
