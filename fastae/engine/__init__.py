"""A training step on static memory: its schedule of kernels, recorded calls or a captured graph, and the optimizer."""
