"""`linear_act` and its backward pass beside `relu(linear(x))`."""

LEVEL = "op"
WHAT = ("linear_act forward", "linear_act forward+backward")


def test_linear_act(turns):
    turns()
