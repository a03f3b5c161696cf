"""How rows are split for a weight gradient: from the shape alone, each row once."""

import pytest
from fastae_kernels import splits
from fastae_kernels.jit import launch, tiles
from fastae_kernels.splits import SPLIT_PROGRAMS, SPLIT_ROWS, split_rows


@pytest.mark.parametrize("M", [0, 1, 127, 128, 511, 512, 513, 1024, 1025, 5000, 65536, 10**6 + 1, 2**31 + 5])
def test_split_rows_cover_each_row_once(M: int) -> None:
    for N, K in ((1, 1), (30, 64), (784, 256), (256, 784), (20000, 512), (3, 0), (0, 3)):
        number, rows = split_rows(M, N, K)
        assert number >= 1
        assert rows % 128 == 0, "a split is whole reduction steps"
        assert number * rows >= M, "rows left over"
        assert number == 1 or (number - 1) * rows < M, "a split with no rows"
        assert number <= SPLIT_PROGRAMS


def test_a_split_has_at_least_split_rows() -> None:
    for M in (513, 1025, 1300, 5000):
        number, rows = split_rows(M, 30, 64)
        assert number == 1 or rows >= SPLIT_ROWS, f"{M} rows: {number} splits of {rows}"


def test_splits_do_not_depend_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a split must follow from the shape alone")

    before = split_rows(5000, 30, 64)
    for module, name in ((tiles, "choose"), (tiles, "family"), (launch, "family"), (launch, "interpreted")):
        monkeypatch.setattr(module, name, fail)
    assert split_rows(5000, 30, 64) == before
    assert not hasattr(splits, "triton")
