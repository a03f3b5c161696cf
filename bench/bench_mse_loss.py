"""`mse_loss` and its gradient beside `F.mse_loss`."""

LEVEL = "op"
WHAT = ("mse_loss",)


def test_mse_loss(turns):
    turns()
