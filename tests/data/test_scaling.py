"""Scaler: exact ends, sound statistics, bounded reads, hostile inputs and the text of every error."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastae.data.scaling import KINDS, Scaler


def data(rows: int = 1000, features: int = 7, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).normal(3, 5, (rows, features)).astype(dtype)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u1", "i8", "?"])
@pytest.mark.parametrize("kind", KINDS)
def test_fields_and_results_are_float32(kind: str, dtype: str) -> None:
    x = data(dtype=np.float64).clip(0, 100).astype(dtype)
    scaler = Scaler.fit(x, kind)
    z = scaler.transform(x)
    for array, shape in [(scaler.offset, (7,)), (scaler.scale, (7,)), (z, x.shape), (scaler.transform(x[0]), (7,))]:
        assert (type(array), array.dtype, array.shape) == (np.ndarray, np.float32, shape)
    wanted = (x.astype(np.float64) - scaler.offset) / scaler.scale
    np.testing.assert_allclose(z, wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(scaler.inverse_transform(z), x.astype(np.float32), rtol=1e-6, atol=1e-5)


def test_none_keeps_every_bit_and_copies_nothing() -> None:
    x = np.array([[-0.0, np.nan, np.inf, 1e-45]], np.float32)
    scaler = Scaler.fit(x, "none")
    assert (scaler.offset.tolist(), scaler.scale.tolist()) == ([0] * 4, [1] * 4)
    assert np.shares_memory(scaler.transform(x), x)
    assert np.shares_memory(scaler.inverse_transform(x), x)
    assert scaler.transform(x).tobytes() == x.tobytes()


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1, 1e30])
def test_unit_reaches_both_ends_exactly(factor: float) -> None:
    x = (data(5000, 50, np.float64) * factor).astype(np.float32)
    z = Scaler.fit(x, "unit").transform(x)
    np.testing.assert_array_equal(z.min(0), 0)
    np.testing.assert_array_equal(z.max(0), 1)


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1, 1e30])
def test_standard_has_mean_0_and_population_std_1(factor: float) -> None:
    x = (data(5000, 50, np.float64) * factor).astype(np.float32)
    scaler = Scaler.fit(x, "standard", chunk_rows=321)
    z = scaler.transform(x).astype(np.float64)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(z.std(0), 1, rtol=1e-6)
    np.testing.assert_allclose(scaler.scale, x.astype(np.float64).std(0), rtol=1e-7)


def test_standard_is_sound_far_from_zero() -> None:
    x = (1e9 + np.random.default_rng(0).normal(size=(10_000, 3))).astype(np.float64)
    scaler = Scaler.fit(x, "standard", chunk_rows=100)
    np.testing.assert_allclose(scaler.scale, x.std(0), rtol=1e-6)  # E[x^2] - E[x]^2 has no right digit here
    np.testing.assert_array_equal(scaler.offset, x.mean(0).astype(np.float32))


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e9 + 7, 1e-40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["unit", "standard"])
def test_constant_features_have_scale_1(kind: str, dtype: type, value: float) -> None:
    x = np.full((1003, 2), value, dtype)
    x[:, 1] = np.arange(1003)
    scaler = Scaler.fit(x, kind, chunk_rows=100)
    assert scaler.offset[0] == np.float32(value)
    assert scaler.scale[0] == 1
    assert scaler.scale[1] > 100
    assert abs(scaler.transform(x)[:, 0]).max() <= np.spacing(np.float32(abs(value)))


@pytest.mark.parametrize("kind", ["unit", "standard"])
def test_a_spread_that_float32_cannot_hold_counts_as_constant(kind: str) -> None:
    assert Scaler.fit(np.array([[0.0], [1e-60]]), kind).scale.tolist() == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_one_row(kind: str) -> None:
    x = np.array([[3.0, -2.0]], np.float32)
    scaler = Scaler.fit(x, kind)
    assert scaler.scale.tolist() == [1, 1]
    assert scaler.transform(x).tolist() == (x if kind == "none" else x * 0).tolist()
    assert scaler.transform(x[:0]).shape == (0, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_views_and_memory_maps_agree(kind: str, tmp_path: Path) -> None:
    x = data(257, 5)
    np.save(tmp_path / "x.npy", x)
    whole = Scaler.fit(x, kind)
    views = [x, np.asfortranarray(x), np.repeat(x, 2, 0)[::2], np.load(tmp_path / "x.npy", mmap_mode="r")]
    for view in views:
        for chunk_rows in (1, 2, 100, 256, 257, 10_000):
            part = Scaler.fit(view, kind, chunk_rows)
            np.testing.assert_allclose(part.offset, whole.offset, rtol=1e-7)
            np.testing.assert_allclose(part.scale, whole.scale, rtol=1e-7)
        np.testing.assert_array_equal(whole.transform(view), whole.transform(x))
    rows = [whole.transform(row) for row in x]
    np.testing.assert_array_equal(rows, whole.transform(x))
    expanded = Scaler.fit(np.broadcast_to(x[0], (9, 5)), kind)
    assert expanded.scale.tolist() == [1] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_fit_reads_in_chunks(kind: str) -> None:
    class Watched(np.ndarray):
        reads: list[int] = []  # noqa: RUF012

        def __getitem__(self, index: Any) -> Any:
            got = super().__getitem__(index)
            self.reads.append(got.shape[0] if got.ndim == 2 else 1)
            return np.asarray(got)

    Scaler.fit(data(100).view(Watched), kind, chunk_rows=30)
    assert max(Watched.reads, default=0) <= 30
    assert sum(Watched.reads) <= 101


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_left_alone(kind: str) -> None:
    x = data()
    before = x.copy()
    scaler = Scaler.fit(x, kind)
    scaler.inverse_transform(scaler.transform(x))
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("kind", ["unit", "standard"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_what_is_not_finite_is_refused(kind: str, bad: float) -> None:
    x = data(dtype=np.float64)
    x[500, 3] = bad
    message = r"^Scaler: x must be finite, with ranges that fit float32, to be scaled; column 3 is not$"
    for rows in (x, x[500:]):
        with pytest.raises(ValueError, match=message):
            Scaler.fit(rows, kind, chunk_rows=64)


def test_nan_and_inf_pass_through_transform() -> None:
    scaler = Scaler.fit(data(features=3), "standard")
    assert str(scaler.transform(np.array([np.nan, np.inf, -np.inf], np.float32))) == "[ nan  inf -inf]"


@pytest.mark.parametrize("kind", ["standrad", "Unit", "minmax", "", None])
def test_unknown_kind(kind: Any) -> None:
    near = {"standrad": "standard", "Unit": "unit", None: "none"}.get(kind)
    nearest = f"; did you mean {near!r}?" if near else ""
    message = f"^{re.escape(f'Scaler: kind must be one of none, unit, standard; got {kind!r}{nearest}')}$"
    with pytest.raises(ValueError, match=message):
        Scaler.fit(data(), kind)
    with pytest.raises(ValueError, match=message):
        Scaler(kind, np.zeros(1, np.float32), np.ones(1, np.float32))


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (3, 0), (2, 3, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_fit_refuses_shapes(kind: str, shape: tuple[int, ...]) -> None:
    message = f"Scaler: x must be [rows, features] with at least one of each; got shape {shape}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Scaler.fit(np.zeros(shape), kind)


@pytest.mark.parametrize("kind", ["unit", "standard"])
def test_fit_refuses_chunk_rows(kind: str) -> None:
    with pytest.raises(ValueError, match=r"^chunk_rows must be at least 1; got 0$"):
        Scaler.fit(data(), kind, chunk_rows=0)


@pytest.mark.parametrize("shape", [(), (6,), (5, 8), (7, 1), (0, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_feature_count(kind: str, shape: tuple[int, ...]) -> None:
    scaler = Scaler.fit(data(), kind)
    for method, name in [(scaler.transform, "x"), (scaler.inverse_transform, "z")]:
        message = f"Scaler: {name} must be [..., 7], as the scaler was fitted; got shape {shape}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            method(np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", ["c8", "O", "U3"])
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_dtype(kind: str, dtype: str) -> None:
    bad, scaler = np.zeros((2, 7), dtype), Scaler.fit(data(), kind)
    for method, name in [
        (lambda x: Scaler.fit(x, kind), "x"),
        (scaler.transform, "x"),
        (scaler.inverse_transform, "z"),
    ]:
        with pytest.raises(TypeError, match=rf"^Scaler: {name} must hold booleans.*; got {bad.dtype}$"):
            method(bad)


def test_fields_must_match() -> None:
    for offset, scale in [((3,), (4,)), ((), ()), ((2, 2), (2, 2))]:
        message = f"Scaler: offset and scale must both be [features]; got shapes {offset} and {scale}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            Scaler("unit", np.zeros(offset, np.float32), np.ones(scale, np.float32))


def test_frozen_and_hashable() -> None:
    assert len({Scaler.fit(data(), "unit"), Scaler.fit(data(), "unit")}) == 2
    with pytest.raises(AttributeError, match=r"^cannot assign to field 'kind'$"):
        Scaler.fit(data(), "unit").kind = "none"  # type: ignore[misc]
