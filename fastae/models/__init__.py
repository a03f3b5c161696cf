"""The autoencoders, and how they are saved and loaded."""
