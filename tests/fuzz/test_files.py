"""Any bytes in any file that is read: what it holds, or one line of an error that a caller expects; nothing else."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastae
from fastae.data.readers import read_array

TEXTS = [b"nan", b"1e400", b"-1", b"99999999999", b"null", b"true", b"[]", b"{}", b'""', b"\xff", b"\0", b"\n"]
EXPECTED = (ValueError, TypeError, OSError, FloatingPointError)


@cache
def valid(kind: str) -> bytes:
    """A file of that kind as it should be."""
    rows = np.random.default_rng(0).integers(0, 9, (12, 9)).astype(np.float32)
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"x{kind}"
        if kind == ".npy":
            np.save(path, rows)
        elif kind == ".npz":
            np.savez(path, a=rows)
        elif kind == ".csv":
            np.savetxt(path, rows, delimiter=",", header="a,b,c,d,e,f,g,h,i", comments="")
        elif kind in (".idx", ".gz"):
            data = struct.pack(">BBBBIII", 0, 0, 8, 3, 12, 3, 3) + rows.astype(np.uint8).tobytes()
            path.write_bytes(gzip.compress(data, mtime=0) if kind == ".gz" else data)
        else:
            torch.manual_seed(0)
            ae = fastae.DenseAutoencoder([9, 4])
            ae.scaler = fastae.Scaler.fit(rows, "standard")
            if kind == "model":
                ae.save(folder)
                return (Path(folder) / "model.safetensors").read_bytes()
            ae.fit(rows, epochs=1, callbacks=[fastae.Checkpoint(folder)], progress=False)
            return (Path(folder) / "checkpoint.safetensors").read_bytes()
        return path.read_bytes()


@st.composite
def damaged(draw: Any, kind: str) -> bytes:
    """The valid file after some damage, or any bytes at all."""
    data = bytearray(valid(kind))
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(data), draw(st.sampled_from([16, 200, 10**6]))) - 1)))
        how = draw(st.sampled_from(["set", "cut", "insert", "delete", "repeat", "number"]))
        if not data:
            break
        if how == "set":
            data[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del data[at:]
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif how == "delete":
            del data[at : at + draw(st.integers(1, 9))]
        elif how == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 99))]
        else:
            data[at : at + 1] = draw(st.sampled_from(TEXTS))
    return bytes(data)


def attempt(read: Callable[[], Any]) -> Any:
    """What was read, or None where an expected error of one line was raised."""
    try:
        return read()
    except EXPECTED as error:
        text = str(error)
    assert text
    assert "\n" not in text, text
    return None


@given(st.data())
def test_arrays(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([".npy", ".npz", ".csv", ".idx", ".gz"]))
    content = data.draw(damaged(kind))
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"x{kind}"
        path.write_bytes(content)
        x = attempt(lambda: read_array(path))
        if x is not None:
            assert x.ndim == 2
            assert x.size > 0
            assert x.dtype.kind == "f"
            float(np.nansum(np.asarray(x)))


@given(st.data())
def test_models(data: st.DataObject) -> None:
    content = data.draw(damaged("model"))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(content)
        ae = attempt(lambda: fastae.load(folder))
        if ae is not None:
            assert all(p.isfinite().all() for p in ae.parameters())
            assert ae.score(np.ones((2, ae.features[0]))).shape == (2,)
            ae.save(Path(folder) / "again")
            fastae.load(Path(folder) / "again")
        assert path.read_bytes() == content


@given(st.data())
def test_checkpoints(data: st.DataObject) -> None:
    content = data.draw(damaged("checkpoint"))
    rows = np.random.default_rng(0).integers(0, 9, (12, 9)).astype(np.float32)
    with TemporaryDirectory() as folder:
        (Path(folder) / "checkpoint.safetensors").write_bytes(content)
        torch.manual_seed(0)
        ae = fastae.DenseAutoencoder([9, 4])
        ae.scaler = fastae.Scaler.fit(rows, "standard")
        checkpoint = fastae.Checkpoint(folder, resume=True)
        attempt(lambda: ae.fit(rows, epochs=2, callbacks=[checkpoint], progress=False))
