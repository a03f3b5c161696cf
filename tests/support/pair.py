"""Two processes of one gloo group, kept for a whole test module: a test hands them a function and gets both results."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZE = 2
WAIT_S = 120  # for a reply; a collective that one process has left is given up before


class Pair:
    """`pair(function, *args)` calls a module-level function on both ranks and returns what they return, in order."""

    def __init__(self, folder: Path) -> None:
        context = get_context("spawn")
        self.ends, self.processes = [], []
        for rank in range(SIZE):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, f"file://{folder / 'store'}", there), daemon=True)
            process.start()
            there.close()
            self.ends.append(here)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for end in self.ends:
            end.send((function, args))
        replies = []
        for end in self.ends:
            assert end.poll(WAIT_S), f"no reply from rank {len(replies)} within {WAIT_S} s"
            replies.append(end.recv())
        failures = [text for text, _ in replies if text]
        assert not failures, "\n".join(failures)
        return [result for _, result in replies]

    def close(self) -> None:
        for end in self.ends:
            end.close()  # the process reads the end of the pipe and leaves
        for process in self.processes:
            process.join(10)
            process.kill()


def _work(rank: int, store: str, end: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=WAIT_S // 2)
    )
    while True:
        try:
            function, args = end.recv()
        except EOFError:
            break
        try:
            reply = "", function(*args)
        except Exception:
            reply = f"rank {rank}\n{traceback.format_exc()}", None
        end.send(reply)
    dist.destroy_process_group()
