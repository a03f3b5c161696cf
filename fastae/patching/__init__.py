"""`patch`: the linear layers, activations and losses of an existing model, fused in place."""
