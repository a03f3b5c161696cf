"""Arrays of any length through a model: chunked, converted, bounded in memory, and the text of every error."""

import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastae.data.arrays
from fastae import DenseAutoencoder

CALLS = ["__call__", "encode", "decode", "score"]


def model(**options: Any) -> DenseAutoencoder:
    torch.manual_seed(0)
    return DenseAutoencoder([12, 8, 3], **options)


def data(rows: int = 50, features: int = 12) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, features)).astype(np.float32)


def record_chunks(ae: DenseAutoencoder, monkeypatch: pytest.MonkeyPatch, rows: int) -> list[int]:
    """Let a chunk be `rows` rows; returns the list that each call of the model's layers adds its row count to."""
    sizes: list[int] = []
    monkeypatch.setattr(fastae.data.arrays, "CHUNK_VALUES", rows * 12 + 11)
    for stack in (ae.encoder, ae.decoder):
        stack.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 50])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["array", "memmap", "tensor"])
def test_any_length_is_worked_through_in_chunks(
    call: str, kind: str, rows: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ae, x = model(), data(rows, 3 if call == "decode" else 12)
    with torch.no_grad():
        wanted = getattr(ae, call)(torch.from_numpy(x)).numpy()
    sizes = record_chunks(ae, monkeypatch, 16)
    given: Any = x
    if kind == "memmap":
        np.save(tmp_path / "x.npy", x)
        given = np.load(tmp_path / "x.npy", mmap_mode="r")
    with torch.no_grad():
        got = getattr(ae, call)(torch.from_numpy(x) if kind == "tensor" else given)
    assert isinstance(got, torch.Tensor if kind == "tensor" else np.ndarray)
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-5, atol=1e-6)
    chunks = [16] * (rows // 16) + [rows % 16] * (rows % 16 > 0)
    assert sizes == (chunks if call in ("encode", "decode") else [size for size in chunks for _ in range(2)])


def test_a_tensor_with_gradients_is_not_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    ae = model()
    sizes = record_chunks(ae, monkeypatch, 16)
    assert ae(torch.from_numpy(data(50))).requires_grad
    assert sizes == [50, 50]


def test_a_chunk_is_one_row_when_a_row_is_wider_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    ae = model()
    sizes = record_chunks(ae, monkeypatch, 0)
    assert ae.encode(data(3)).shape == (3, 3)
    assert sizes == [1, 1, 1]


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_a_memory_map_is_never_read_as_a_whole(dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ae, rows = model(), 100_000
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", dtype, (rows, 12))[:] = 1
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    sizes = record_chunks(ae, monkeypatch, 5000)
    ae.encode(x[:1])  # one-time allocations
    tracemalloc.start()  # NumPy reports its buffers to it
    try:
        ae.score(x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(sizes) == 5000
    assert peak < x.nbytes / 4


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8"])
def test_arrays_of_other_float_types_are_converted(dtype: str) -> None:
    x = data(20).astype(dtype)
    for width, result in ((torch.float32, np.float32), (torch.float64, np.float64), (torch.bfloat16, np.float32)):
        ae = model(dtype=width)
        y = ae(x)
        assert y.dtype == result
        with torch.no_grad():
            wanted = ae(torch.from_numpy(x.astype(result)).to(width))
        np.testing.assert_array_equal(y, wanted.to(torch.float64).numpy())


def test_strided_and_read_only_arrays() -> None:
    ae, x = model(), data(40, 24)
    x.flags.writeable = False
    for view in (x[::-2, ::2], x.T[:12].T, np.broadcast_to(x[:1, :12], (5, 12))):
        np.testing.assert_array_equal(ae(view), ae(view.copy()))


def test_empty_arrays() -> None:
    ae = model()
    shapes = [ae(data(0)).shape, ae.encode(data(0)).shape, ae.decode(data(0, 3)).shape, ae.score(data(0)).shape]
    assert shapes == [(0, 12), (0, 3), (0, 12), (0,)]


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (np.zeros((4, 12), int), TypeError, "x must be floating point; got int64, convert it: x.astype('float32')"),
        (np.zeros((4, 12), object), TypeError, "x must be floating point; got object, convert it: x.astype('float32')"),
        (np.zeros((4, 12), bool), TypeError, "x must be floating point; got bool, convert it: x.astype('float32')"),
        (np.zeros((4, 12), complex), TypeError, "x must be floating point; got complex128"),
        ([[0.0] * 12], TypeError, "x must be a numpy array or a torch.Tensor; got list"),
        (np.zeros((4, 11), "f4"), ValueError, "x must be [rows, 12]; got [4, 11]"),
        (np.zeros((0, 11), "f4"), ValueError, "x must be [rows, 12]; got [0, 11]"),
        (np.zeros(12, "f4"), ValueError, "x must be [rows, 12]; got [12]"),
        (np.zeros((2, 3, 12), "f4"), ValueError, "x must be [rows, 12]; got [2, 3, 12]"),
        (torch.zeros(4, 11), ValueError, "x must be [..., 12]; got [4, 11]"),
        (torch.tensor(1.0), ValueError, "x must be [..., 12]; got []"),
    ],
)
@pytest.mark.parametrize("call", ["__call__", "encode", "score"])
def test_data_that_does_not_fit(call: str, x: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape('DenseAutoencoder: ' + text)}$"):
        getattr(model(), call)(x)


def test_a_code_that_does_not_fit_is_called_z() -> None:
    for z, text in ((np.zeros((4, 12), "f4"), "[rows, 3]"), (torch.zeros(4, 12), "[..., 3]")):
        with pytest.raises(ValueError, match=f"^DenseAutoencoder: z must be {re.escape(text)}; got "):
            model().decode(z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_tensor_is_looked_through_without_a_copy(dtype: torch.dtype) -> None:
    """NaN or inf anywhere is found; what is made on the way is two numbers, not another tensor of x's size."""
    made: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = func(*args, **(kwargs or {}))
            made.extend(r.numel() for r in tree_leaves(results) if torch.is_tensor(r))
            return results

    x = torch.from_numpy(data(300)).to(dtype)
    with Sizes():
        fastae.data.arrays.check_all_finite(x, "x")
    assert max(made) == 1
    for value in (np.nan, np.inf, -np.inf):
        for place in ((0, 0), (299, 11), (150, 5)):
            bad = x.clone()
            bad[place] = value
            with pytest.raises(ValueError, match=rf"1 (NaN|inf), the first at row {place[0]}, column {place[1]} "):
                fastae.data.arrays.check_all_finite(bad, "x")
