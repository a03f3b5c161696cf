"""A `TrainStep` beside training steps as people write them."""

LEVEL = "step"


def test_train_step(turns):
    turns()
