"""What is random in a step: the key of its kernels, the numbers drawn for its twins, and the noise on its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from fastae_kernels.noise import Corruption, Key, kept
from torch import Tensor

from fastae.engine.draws import At, Draws
from fastae.engine.program import Dense, Program, Sample
from fastae.engine.stages import Place
from fastae.nn.backend import ops
from fastae.noise import Noise, Swap

CORRUPTION, OTHER_ROWS, FIRST_STAGE = 0, 1, 2  # streams


class Randomness:
    """Keys, numbers and the gather with noise of one `StaticStep`.

    choices: (backend, why) of every stage. A kernel counts its numbers out from `state`; for a twin they are drawn
    before the step, into memory that the recorded calls read.
    """

    def __init__(self, program: Program, choices: Sequence[tuple[str, str]], device: torch.device) -> None:
        self.program, self.device = program, device
        self._by_kernel = [backend == "triton" for backend, _ in choices]
        self._kernels = all(self._by_kernel)
        self.state = torch.zeros(3, dtype=torch.int64, device=device)
        self.beta = torch.zeros((), device=device)
        self._draws, self._at, self._beta = Draws(device), (0, 0, 0), 0.0
        self._groups = groups_of(program.corrupt, program.in_features, device)
        self._columns = group_count(program.corrupt, program.in_features)

    def provide(self, places: Sequence[Place], rows: int) -> None:
        """Give each stage's place its key, with memory for the numbers of a twin."""
        for number, (stage, place) in enumerate(zip(self.program.stages, places, strict=True)):
            drawn: tuple[Tensor, ...] = ()
            if isinstance(stage, Dense) and stage.dropout:
                assert place.y is not None
                if not self._by_kernel[number]:
                    drawn = (torch.empty_like(place.y),)
            elif isinstance(stage, Sample):
                assert place.y is not None
                wide = torch.promote_types(place.y.dtype, torch.float32)
                self.beta = self.beta.to(wide)
                place.beta = self.beta
                if not self._by_kernel[number]:
                    drawn = (place.y.new_empty(rows, stage.width, dtype=wide),)
            else:
                continue
            place.key = Key(self.state, FIRST_STAGE + number, drawn)

    def begin(self, at: At, places: Sequence[Place]) -> None:
        """Set key and beta of a step and draw its numbers."""
        self._at = at
        part = self.program.variational
        if part is not None and (beta := part.beta_at(at[1])) != self._beta:
            self.beta.fill_(beta)
            self._beta = beta
        if any(self._by_kernel):
            self.state.copy_(torch.tensor(at), non_blocking=True)
        for stage, place in zip(self.program.stages, places, strict=True):
            if place.key is None or not place.key.drawn:
                continue
            (numbers,) = place.key.drawn
            if isinstance(stage, Sample):
                numbers.copy_(self._draws.normals(at, place.key.stream, *numbers.shape))
            elif isinstance(stage, Dense):
                kept(self._draws.bits(at, place.key.stream, *numbers.shape), stage.dropout, numbers)
                numbers.mul_(1 / (1 - stage.dropout))

    def gather(self, x: Tensor, rows: Tensor | None, out: Tensor, clean: Tensor | None) -> None:
        """out = x[rows] with the program's noise, `clean` = x[rows], NaN where it is not to be compared."""
        part = self.program.corrupt
        assert part is not None
        drawn: tuple[Tensor, ...] = ()
        if not self._kernels:
            shape = len(out), self._columns
            if part.name == "gaussian":
                drawn = (self._draws.normals(self._at, CORRUPTION, *shape),)
            else:
                drawn = (self._draws.bits(self._at, CORRUPTION, *shape),)
            if part.name == "swap":
                drawn = (*drawn, self._draws.indices(self._at, OTHER_ROWS, *shape, len(x)))
        corruption = corruption_of(part, Key(self.state, CORRUPTION, drawn), self._groups)
        backend = ops("triton" if self._kernels else "torch")
        backend.gather(x, rows, out, corruption, clean, self.program.share < 1)


def corruption_of(part: Noise, key: Key, groups: Tensor | None = None) -> Corruption:
    """How the ops know a noise."""
    amount = getattr(part, "std", None)
    low, high = getattr(part, "low", -math.inf), getattr(part, "high", math.inf)
    return Corruption(part.name, part.q if amount is None else amount, low, high, key, groups)  # type: ignore[union-attr]


def group_count(part: Noise | None, columns: int) -> int:
    """How many groups there are, a column that is in none counted as one."""
    groups = part.groups if isinstance(part, Swap) else ()
    return columns - sum(map(len, groups)) + len(groups)


def groups_of(part: Noise | None, columns: int, device: torch.device) -> Tensor | None:
    """The group of each column where some are swapped together; the others are groups of one."""
    if not isinstance(part, Swap) or not part.groups:
        return None
    of = {column: number for number, group in enumerate(part.groups) for column in group}
    alone = iter(range(len(part.groups), len(part.groups) + columns))
    return torch.tensor([of[c] if c in of else next(alone) for c in range(columns)], device=device)
