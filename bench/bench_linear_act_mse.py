"""The last layer and the loss in one beside `F.mse_loss(F.linear(h))`."""

LEVEL = "op"
WHAT = ("linear_act_mse",)


def test_linear_act_mse(turns):
    turns()
