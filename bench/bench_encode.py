"""`encode` beside the plain encoder."""

LEVEL = "encode"


def test_encode(turns):
    turns()
