"""Compiled Triton kernels on a CPU: their PTX executed and checked, their resources read, their memory poisoned.

Knows nothing of fastae: use it on kernels of your own."""
