"""Several processes that train one model: who this one is, its share of the rows, and means over all of them."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The processes of torch.distributed's default group, or this one alone where none is initialised."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group, or None for a process alone."""
        return dist.group.WORLD if self.size > 1 else None

    def share(self, rows: Tensor) -> Tensor:
        """This rank's part of `rows`, which are the same on every rank; sizes differ by one at most, down to none."""
        return rows if self.size == 1 else rows.tensor_split(self.size)[self.rank]

    def first(self, rows: int) -> int:
        """Where this rank's part of so many rows begins."""
        return self.rank * (rows // self.size) + min(self.rank, rows % self.size)

    def sum(self, t: Tensor) -> Tensor:
        """t summed over the ranks, in place; every rank gets the same bits."""
        if self.size > 1:
            dist.all_reduce(t)
        return t

    def on_rank_0(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 alone and return its result on every rank; an exception is raised on each."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function()
            except Exception as error:  # the others wait for it: without it they would hang
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy rank 0's values into the tensors of every rank."""
        for t in tensors:
            dist.broadcast(t, 0)

    def check_alike(self, function: str, settings: dict[str, Any]) -> None:
        """ValueError on every rank if one has another value of a setting than rank 0 has."""
        first, *others = self.gather(settings)
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other[name] != value:
                    raise ValueError(
                        f"{function}: {name} must be the same on every rank, which takes its own share of the rows; "
                        f"got {value!r} on rank 0, {other[name]!r} on rank {rank}"
                    )

    def gather(self, value: T) -> list[T]:
        """Gather the value of each rank, in their order, on every rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


@contextmanager
def launched() -> Iterator[None]:
    """A process group around the work, if `torchrun` started this process as one of several; it ends with the work."""
    if not (dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1):
        yield
        return
    if os.environ["GROUP_WORLD_SIZE"] == "1" and os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":
        # In torch 2.13 processes that are started again get the store of those before them, and would look for each
        # other at addresses that are gone (pytorch#135712). The count is each machine's own, so not for several.
        from torch.distributed.rendezvous import rendezvous

        shared, rank, size = next(rendezvous("env://"))
        store = dist.PrefixStore(f"restart{restarts()}", shared)  # type: ignore[attr-defined]
        dist.init_process_group(store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group()
    yield
    dist.destroy_process_group()  # not after an error: the other ranks may be waiting in a collective
    # gloo's threads free their last tensors when they come to it; one that does while Python shuts down aborts the
    # process (1 of 10 runs on two busy cores, torch 2.13, Python 3.11). All is written by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def restarts() -> int:
    """How often `torchrun` has started its processes again after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def own_device(name: str) -> str:
    """The device for "auto" or "cuda": under `torchrun` each process of a machine takes another GPU."""
    if name not in ("auto", "cuda") or Ranks().size == 1 or not torch.cuda.is_available():
        return name
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return f"cuda:{os.environ['LOCAL_RANK']}"


def digest(x: Tensor) -> str:
    """Shape and a few letters that differ where a value of x [rows, features] differs: 1 s for 1 GB."""
    found = hashlib.blake2b(digest_size=4)
    for rows in x.detach().split(max(1, (1 << 24) // max(1, x[:1].nbytes))):
        found.update(memoryview(rows.cpu().contiguous().view(torch.uint8).numpy()))
    return f"{list(x.shape)} {found.hexdigest()}"
