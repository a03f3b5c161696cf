"""How the rows of a weight gradient are split: from the shape alone, so it needs no Triton to be known."""

from __future__ import annotations

# `linear_wgrad` splits the rows until it has about this many programs: one for each SM of an A100 or H100.
# A constant rather than the SM count at hand, so that the same shapes give the same bits on every device.
SPLIT_PROGRAMS = 128
SPLIT_ROWS = 512  # a split has at least this many rows; fewer cost more in partials than they fill


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def split_rows(M: int, N: int, K: int) -> tuple[int, int]:
    """(splits, rows in each) of a weight gradient: from the shape alone, counted in tiles of 64 x 64.

    At most eight: beyond that a dw of fp32 partials moves more bytes than most batches.
    """
    output_tiles = _cdiv(N, 64) * _cdiv(K, 64)
    splits = max(1, min(8, SPLIT_PROGRAMS // max(output_tiles, 1), M // SPLIT_ROWS))
    rows = _cdiv(_cdiv(max(M, 1), splits), 128) * 128  # whole reduction steps of every tile
    return _cdiv(max(M, 1), rows), rows
