"""Rows gathered with noise: the kernel's numbers against the twin's, Philox against its authors', and each law."""

import math

import pytest
import torch
from cases import normal, uniform
from fastae_kernels.jit.backend import TRITON
from fastae_kernels.noise import CORRUPTIONS, Corruption, Key, normals, philox, uniforms
from fastae_kernels.reference import TORCH
from torch import Tensor

STATE = torch.tensor([1234567890123, 5, 0])
BOUNDS = {"salt_pepper": (-0.5, 2.0), "gaussian": (-1.0, 1.5)}
INF = math.inf


def corruption(kind: str, amount: float = 0.3, state: Tensor = STATE, groups: Tensor | None = None) -> Corruption:
    low, high = BOUNDS.get(kind, (-INF, INF))
    return Corruption(kind, amount, low, high, Key(state, 7), groups)


def test_philox_gives_the_words_of_random123() -> None:
    """Known answers of Philox4x32-10: kat_vectors of Random123 (D. E. Shaw Research): counter, key, words."""
    for counter, key, wanted in (
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0_A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):  # fmt: skip
        assert [int(w) for w in philox([torch.tensor(c) for c in counter], key)] == wanted


@pytest.mark.parametrize("kind", [*CORRUPTIONS, "swap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_kernel_does_what_the_twin_does(kind: str, dtype: torch.dtype) -> None:
    for (M, N), first in (((37, 70), 0), ((1, 1), 3), ((5, 130), 2**31), ((70, 3), 0)):
        state = torch.tensor([2**62 + 12345, 2**33 + 7, first])
        source = normal(100, N + 2, dtype=dtype)[:, 1:-1]
        rows = torch.randint(100, (M,), generator=torch.Generator().manual_seed(0))
        made = []
        for ops in (TORCH, TRITON):
            out, clean = (torch.full((M, N + 5), 7.0, dtype=dtype) for _ in range(2))
            ops.gather(source, rows, out[:, :N], corruption(kind, state=state), clean[:, :N])
            assert torch.equal(clean[:, :N], source[rows])
            assert bool((out[:, N:] == 7).all())
            made.append(out[:, :N])
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6} if kind == "gaussian" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(*made, **tolerance)
        assert kind == "drop" or (M, N) == (1, 1) or not torch.equal(made[0], source[rows])


def test_columns_of_a_group_are_swapped_together() -> None:
    groups = torch.tensor([0, 1, 1, 2, 0])
    source = torch.arange(1000.0)[:, None] * 10 + torch.arange(5.0)
    out = [torch.empty(1000, 5) for _ in range(2)]
    for ops, memory in zip((TORCH, TRITON), out, strict=True):
        ops.gather(source, None, memory, corruption("swap", 0.4, groups=groups))
    assert torch.equal(*out)
    assert torch.equal(out[0] % 10, torch.arange(5.0).expand(1000, 5))  # each from its own column
    of = (out[0] // 10).long()
    assert torch.equal(of[:, 0], of[:, 4])
    assert torch.equal(of[:, 1], of[:, 2])
    assert not torch.equal(of[:, 0], of[:, 1])


def test_hidden_values_are_those_that_the_mask_has_left() -> None:
    source = uniform(40, 30, low=1, high=2)
    for ops in (TORCH, TRITON):
        out, clean = torch.empty(40, 30), torch.empty(40, 30)
        ops.gather(source, None, out, corruption("mask"), clean, True)
        assert torch.equal(clean.isnan(), out != 0)
        assert torch.equal(clean[out == 0], source[out == 0])


def test_rows_of_a_batch_in_parts_get_the_noise_of_the_whole() -> None:
    source = normal(64, 20)
    for kind in (*CORRUPTIONS, "swap"):
        whole, part = torch.empty(64, 20), torch.empty(24, 20)
        TORCH.gather(source, None, whole, corruption(kind))
        TORCH.gather(source, torch.arange(40, 64), part, corruption(kind, state=STATE + torch.tensor([0, 0, 40])))
        assert torch.equal(part, whole[40:])


# ---------------------------------------------------------------- laws, of a million draws


def test_uniform_and_normal_numbers_have_their_laws() -> None:
    """Moments within five standard errors, and the largest distance of the distribution (Kolmogorov and Smirnov)."""
    n = 1 << 20
    u = uniforms(Key(STATE, 0), 1024, 1024).double().flatten().sort().values
    z = normals(Key(STATE, 1), 1024, 1024).double().flatten().sort().values
    places = (torch.arange(n).double() + 0.5) / n
    assert float((u - places).abs().max()) < 1.63 / n**0.5  # the 1 % point
    assert float((torch.special.ndtr(z) - places).abs().max()) < 1.63 / n**0.5
    assert abs(float(z.mean())) < 5 / n**0.5
    assert abs(float(z.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((z**4).mean()) - 3) < 5 * (96 / n) ** 0.5


def test_neighbours_steps_streams_and_seeds_are_independent() -> None:
    base = uniforms(Key(STATE, 0), 1000, 1000).double() - 0.5
    others = [uniforms(Key(STATE, 1), 1000, 1000)]
    others += [uniforms(Key(STATE + torch.tensor(change), 0), 1000, 1000) for change in ([1, 0, 0], [0, 1, 0])]
    pairs = [(base, other.double() - 0.5) for other in others]
    pairs += [(base[1:], base[:-1]), (base[:, 1:], base[:, :-1]), (base[:, 4:], base[:, :-4])]
    for a, b in pairs:
        correlation = float((a * b).mean() * 12)
        assert abs(correlation) < 5 / a.numel() ** 0.5


@pytest.mark.parametrize("kind", [*CORRUPTIONS, "swap"])
@pytest.mark.parametrize("drawn", [False, True], ids=["philox", "drawn"])
def test_each_noise_has_its_law(kind: str, drawn: bool) -> None:
    n, q = 1 << 20, 0.3
    source = torch.full((1024, 1024), 0.25)
    generator, key = torch.Generator().manual_seed(1), Key(STATE, 7)
    if drawn:
        numbers = torch.empty(1024, 256, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        given = [numbers.view(torch.int16).view(1024, 1024)]
        given = [torch.randn(1024, 1024, generator=generator)] if kind == "gaussian" else given
        others = torch.randint(1024, (1024, 1024), generator=generator)
        key = key._replace(drawn=(*given, *([others] if kind == "swap" else [])))
    out = torch.empty(1024, 1024)
    if kind == "swap":
        source = torch.arange(1024.0).unsqueeze(1).expand(1024, 1024)
    c = Corruption(kind, q, *((-INF, INF) if kind == "gaussian" else BOUNDS.get(kind, (-INF, INF))), key)
    TORCH.gather(source, None, out, c)
    error = 5 * (q * (1 - q) / n) ** 0.5 + 2.0**-16

    def share(where: Tensor) -> float:
        return float(where.double().mean())

    if kind == "gaussian":
        noise = (out - 0.25).double() / q
        assert abs(float(noise.mean())) < 5 / n**0.5
        assert abs(float(noise.std()) - 1) < 5 / (2 * n) ** 0.5
    elif kind == "salt_pepper":
        assert abs(share(out == -0.5) - q / 2) < error
        assert abs(share(out == 2.0) - q / 2) < error
        assert abs(share(out == 0.25) - (1 - q)) < error
    elif kind == "swap":
        moved = out != source
        assert abs(share(moved) - q * 1023 / 1024) < error
        assert abs(float(out[moved].mean()) - 511.5) < 5 * 1024 / (12 * q * n) ** 0.5
    else:
        value = 0.25 if kind == "mask" else 0.25 / (1 - q)
        assert abs(share(out == 0) - q) < error
        torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], value))
