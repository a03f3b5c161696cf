"""Epochs of `fit` beside loops that people write."""

LEVEL = "fit"


def test_training(turns):
    turns()
