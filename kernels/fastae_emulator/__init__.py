"""Emulator of compiled Triton kernels on a CPU: executes and checks PTX, reads resources, poisons memory.

Independent of fastae: use it on kernels of your own."""
