"""`score` beside `((m(x) - x) ** 2).mean(1)`."""

LEVEL = "score"


def test_score(turns):
    turns()
