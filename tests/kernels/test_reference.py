"""What only the twins have: rows gathered into memory of another dtype or width."""

import pytest
import torch
from cases import DTYPES, normal, short, strided, transposed
from fastae_kernels.jit.backend import TRITON
from fastae_kernels.onednn import ONEDNN
from fastae_kernels.ops import Ops
from fastae_kernels.reference import TORCH


@pytest.mark.parametrize("ops", [TORCH, ONEDNN, TRITON], ids=["torch", "onednn", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_gather(dtype: torch.dtype, ops: Ops) -> None:
    """All rows, some in any order, one of them again and again, none; into what is wider than they are, too."""
    source = normal(9, 5, dtype=torch.float64)
    for rows in (None, torch.arange(8, -1, -1), torch.tensor([3, 3, 0, 8, 3]), torch.zeros(0, dtype=torch.int64)):
        wanted = source if rows is None else source[rows]
        for given in (source, source.float(), source.to(dtype), strided(source), transposed(source.to(dtype))):
            memory = torch.full((len(wanted), 8), 7.0, dtype=dtype)
            out = memory[:, :5]
            ops.gather(given, rows, out)
            assert torch.equal(out, wanted.to(given.dtype).to(dtype))
            assert (memory[:, 5:] == 7).all()


def test_gather_rejects_a_row_that_is_not_there() -> None:
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(IndexError):
            TORCH.gather(normal(4, 3), torch.tensor([0, 4]), torch.empty(2, 3, dtype=dtype))
