"""Every case of `fastae bench`, timed beside the same work in PyTorch; `pytest bench -k mse_loss` runs some of them."""


def test_case(turns):
    turns()
