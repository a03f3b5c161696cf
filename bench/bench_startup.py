"""Import, first step and load in fresh processes."""

LEVEL = "startup"


def test_startup(turns):
    turns()
