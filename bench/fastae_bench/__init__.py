"""fastae beside the ways of writing the same in PyTorch: the command `fastae bench`, and `pytest bench`.

A case (`cases.py`) is one piece of work at one size and precision, a variant (`variants.py`) one way of doing it.
`rounds.py` lets the variants take turns, `spread.py` makes figures of their times, `report.py`, `plots.py` and
`compare.py` show them.
"""
