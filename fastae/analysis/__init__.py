"""What is said about a training step: `explain` (modelled) and `profile` (measured)."""
