"""Analysis of a training step: `explain` (modelled) and `profile` (measured)."""
