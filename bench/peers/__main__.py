"""`make bench-peers`: fastae beside the libraries people train autoencoders with, in bench/results/peers.{md,json}."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fastae_bench.machine import describe

from peers.problem import PROBLEMS, PeerProblem
from peers.report import Result, markdown
from peers.variants import VARIANTS

HERE = Path(__file__).parent
PAUSE_S = 0.3  # threads of the variant that has just run spin on for up to 0.2 s before they sleep


class Child:
    """A library's process."""

    def __init__(self, name: str, problem: PeerProblem) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": "tensorflow"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peers.child", name, json.dumps(asdict(problem))], cwd=HERE.parent,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1,
            env={**os.environ, **quiet},
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.name} stopped: {(self.log.read().strip().splitlines() or ['no output'])[-1]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has stopped: `answer` says why
            self.process.stdin.write(json.dumps(command) + "\n")
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()
        self.process.stdout.close()  # type: ignore[union-attr]
        self.log.close()


def compare(problem: PeerProblem, names: list[str], rounds: int) -> list[Result]:
    """Every library in turn, round by round, after a short round each that is not counted."""
    children: list[Child] = []
    try:
        children = [Child(name, problem) for name in names]
        results = []
        for child in children:
            ready = child.answer()
            results.append(Result(child.name, problem.name, ready["versions"], ready["baseline_mib"], []))
        for number in range(-1, rounds):
            for child, result in zip(children, results, strict=True):
                time.sleep(PAUSE_S)
                found = child.ask(seed=max(number, 0), epochs=problem.epochs if number >= 0 else 1)
                if number >= 0:
                    result.rounds.append(found)
            print(f"{problem.name}: round {number + 1} of {rounds}", file=sys.stderr)
        return results
    finally:
        for child in children:
            child.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", default=",".join(PROBLEMS), help="of these, with commas between")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of these; fastae is always there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    options = parser.parse_args()
    chosen, names = _of(options.problems, PROBLEMS, parser), _of(options.variants, VARIANTS, parser)
    names = ["fastae", *(name for name in names if name != "fastae")]
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "peers.json"
    older = json.loads(file.read_text()) if file.exists() else {}
    words = ["python -m peers", *sys.argv[1:]] if len(sys.argv) > 1 else ["make bench-peers"]
    here = describe(torch.device("cpu"))
    about = {name: here[name] for name in ("machine", "commit")}
    about |= {"rounds": options.rounds, "command": " ".join(words)}
    problems = {name: entry for name, entry in older.get("problems", {}).items() if name in PROBLEMS}
    for name in chosen:
        problem = PROBLEMS[name]
        variants = [variant for variant in names if problem.precision in VARIANTS[variant].precisions]
        load = round(os.getloadavg()[0], 1)
        results = compare(problem, variants, options.rounds)
        problems[name] = {
            **about,
            "load": load,
            "problem": asdict(problem),
            "results": [asdict(result) for result in results],
        }
        file.write_text(json.dumps({"problems": problems}, indent=1) + "\n")
        (options.out / "peers.md").write_text(markdown({"problems": problems}))
    print((options.out / "peers.md").read_text())


def _of(text: str, known: Any, parser: argparse.ArgumentParser) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            parser.error(f"{name!r} is none of {', '.join(known)}")
    return names


if __name__ == "__main__":
    main()
