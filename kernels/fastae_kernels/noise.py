"""Random numbers of a step and what is done with them: corruption of rows, as torch functions, and their keys.

A kernel counts its random numbers out by Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3") from seed, step, row, column and stream, so that a backward pass makes the same ones again and nothing is stored.
Here is the same in torch, for tests. A step on a CPU, where that costs more than its products, hands over numbers from
torch's generator instead (`Key.drawn`): the same law, other bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STREAMS = 256  # of a step: one for each use of random numbers
_WORD = 0xFFFFFFFF
_ROUND = (0xD2511F53, 0xCD9E8D57)
_RAISE = (0x9E3779B9, 0xBB67AE85)


class Key(NamedTuple):
    """The random numbers of one use in a step.

    state: [3] int64 on the device: the seed, the step, and where these rows begin in the batch of all processes.
    stream: which use, below `STREAMS`. drawn: what was drawn instead, for the twins: see `bits` and `normals`.
    """

    state: Tensor
    stream: int
    drawn: tuple[Tensor, ...] = ()


class Corruption(NamedTuple):
    """Noise on rows that are gathered: a row of `CORRUPTIONS`, its numbers and its key.

    groups: [features] int64, the group of each column, where columns are swapped together.
    """

    kind: str
    amount: float
    low: float
    high: float
    key: Key
    groups: Tensor | None = None


class Dropout(NamedTuple):
    """0 in place of a share of a layer's outputs, the others divided by 1 - share.

    `key.drawn` is what outputs are multiplied with, 0 or 1 / (1 - share), in their dtype.
    """

    share: float
    key: Key


# ---------------------------------------------------------------- Philox


def philox(counter: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Four words of each counter, four words that broadcast; all in int64. The seed's two words are the key."""
    words, keys = list(counter), [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(10):
        (high_0, low_0), (high_2, low_2) = (_product(a, w) for a, w in zip(_ROUND, (words[0], words[2]), strict=True))
        words = [high_2 ^ words[1] ^ keys[0], low_2, high_0 ^ words[3] ^ keys[1], low_0]
        keys = [(k + r) & _WORD for k, r in zip(keys, _RAISE, strict=True)]
    return words


def words_of(state: Tensor, stream: int, rows: int, columns: int) -> list[Tensor]:
    """Four words [rows, columns] of the counters (column, row of the batch of all processes, step, stream)."""
    seed, step, first = (int(n) for n in state)
    counter = [
        torch.arange(columns),
        (torch.arange(first, first + rows) & _WORD).unsqueeze(1),
        torch.tensor(step & _WORD),
        torch.tensor(((step >> 32) * STREAMS + stream) & _WORD),
    ]
    return [w.expand(rows, columns).to(state.device) for w in philox(counter, seed)]


def _product(a: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a times a word; int64 keeps all 64 bits, as a number below 0 where the highest is set."""
    whole = word * a
    return (whole >> 32) & _WORD, whole & _WORD


def _four(state: Tensor, stream: int, rows: int, columns: int) -> Tensor:
    """A word for each column: those of a counter belong to four columns beside each other."""
    words = torch.stack(words_of(state, stream, rows, -(-columns // 4)), -1)
    return words.flatten(1)[:, :columns]


def uniforms(key: Key, rows: int, columns: int) -> Tensor:
    """[rows, columns] in [0, 1), multiples of 2^-24: fp32 holds them as they are."""
    return _unit(_four(key.state, key.stream, rows, columns))


def _unit(words: Tensor) -> Tensor:
    return (words >> 8).float() * 2.0**-24


def bits(key: Key, rows: int, columns: int) -> Tensor:
    """What `below` compares: [rows, columns] that were drawn, int16 of all bits random, or uniform ones."""
    return key.drawn[0] if key.drawn else uniforms(key, rows, columns)


def below(bits: Tensor, share: float) -> Tensor:
    """Where a uniform number is below `share`, as a mask; of int16 to 2^-16."""
    return bits < round(share * 2**16) - 2**15 if bits.dtype == torch.int16 else bits < share


def normals(key: Key, rows: int, columns: int) -> Tensor:
    """[rows, columns] of the standard normal law in fp32, by Box and Muller's transform of two words each."""
    if key.drawn:
        return key.drawn[0]
    words = _four(key.state, key.stream, rows, -(-columns // 4) * 4).view(rows, 2 * -(-columns // 4), 2)
    radius = (((words[..., 0] >> 8) + 1).float() * 2.0**-24).log().mul_(-2).sqrt_()
    angle = 2 * math.pi * (_unit(words[..., 1]) - 0.5)
    pair = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
    return pair.flatten(1)[:, :columns]


# ---------------------------------------------------------------- corruption


def kept(bits: Tensor, share: float, out: Tensor) -> Tensor:
    """`out` is 0 where a uniform number is below `share`, else 1."""
    return torch.ge(bits, round(share * 2**16) - 2**15 if bits.dtype == torch.int16 else share, out=out)


def _mask(x: Tensor, c: Corruption, out: Tensor) -> None:
    kept(bits(c.key, *x.shape), c.amount, out).mul_(x)


def _drop(x: Tensor, c: Corruption, out: Tensor) -> None:
    _mask(x, c, out)
    out.mul_(1 / (1 - c.amount))


def _salt_pepper(x: Tensor, c: Corruption, out: Tensor) -> None:
    u = bits(c.key, *x.shape)
    out.copy_(x).masked_fill_(below(u, c.amount / 2), c.low).masked_fill_(~below(u, 1 - c.amount / 2), c.high)


def _gaussian(x: Tensor, c: Corruption, out: Tensor) -> None:
    noisy = torch.add(x, normals(c.key, *x.shape).to(torch.promote_types(x.dtype, torch.float32)), alpha=c.amount)
    out.copy_(noisy if c.low == -math.inf and c.high == math.inf else noisy.clamp_(c.low, c.high))


#: name -> x with that noise, in `out`; `jit/gather.py` has a function of the same name for each
CORRUPTIONS: dict[str, Callable[[Tensor, Corruption, Tensor], None]] = {
    "mask": _mask,
    "drop": _drop,
    "salt_pepper": _salt_pepper,
    "gaussian": _gaussian,
}


def _swap(source: Tensor, x: Tensor, c: Corruption, out: Tensor) -> None:
    """Values of other rows of `source` in the place of some; columns of a group come from the same row."""
    rows, columns = x.shape
    groups = columns if c.groups is None else int(c.groups.max()) + 1
    if c.key.drawn:
        chosen, others = below(c.key.drawn[0], c.amount), c.key.drawn[1]
    else:
        words = words_of(c.key.state, c.key.stream, rows, groups)
        chosen, others = _unit(words[0]) < c.amount, (words[1] * len(source)) >> 32
    if c.groups is not None:
        chosen, others = chosen[:, c.groups], others[:, c.groups]
    out.copy_(torch.where(chosen, source.gather(0, others), x))


def corrupt(source: Tensor, x: Tensor, c: Corruption, out: Tensor) -> None:
    """out = x, which are rows of `source`, with the noise."""
    if c.kind == "swap":
        _swap(source, x, c, out)
    elif x.dtype == out.dtype:
        CORRUPTIONS[c.kind](x, c, out)
    else:
        wide = torch.empty_like(x)
        CORRUPTIONS[c.kind](x, c, wide)
        out.copy_(wide)


def hide(clean: Tensor, c: Corruption) -> None:
    """Put NaN where `mask` has left a value: what is not to be compared."""
    clean.masked_fill_(~below(bits(c.key, *clean.shape), c.amount), math.nan)


# ---------------------------------------------------------------- dropout


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """x, written over by what `dropout` leaves of it: outputs of a layer or the gradient by them."""
    if dropout is None:
        return x
    if dropout.key.drawn:
        return x.mul_(dropout.key.drawn[0])
    return x.mul_(kept(uniforms(dropout.key, *x.shape), dropout.share, torch.empty_like(x))).mul_(
        1 / (1 - dropout.share)
    )
