"""`fastae verify`: starts its parts in processes of their own, collects what they find, says whether all of it holds.

One process cannot hold both the interpreter and a compiler: Triton decides at import, by TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from fastae_emulator import resources
from fastae_emulator.driver import TARGETS
from rich.console import Console

from fastae.analysis.machine import processor
from fastae.data.writers import check_writable, write_atomically
from fastae.verify.findings import VERIFY_PARTS, Finding, Outcome, announced, parse
from fastae.verify.report import print_report
from fastae.verify.workers import one_of

MODULES = {"compile": "compilation", "execute": "execution"}  # of other parts the part's own name
BY_TARGET = ("compile", "execute", "traffic", "statistics")  # parts with a process for each target
# the longest first; what traffic executes, compile has compiled
ORDER = ("execute", "compile", "numerics", "traffic", "statistics")
AT_ONCE = 2  # processes: each has one thread, and the parts are made for two cores


@dataclass(frozen=True)
class VerifyOptions:
    """Options of the command line."""

    parts: tuple[str, ...] = VERIFY_PARTS
    quick: bool = False
    seed: int = 0
    targets: tuple[str, ...] = ()  # all, if empty
    only: str | None = None
    device: str = "cpu"


def check_options(options: VerifyOptions) -> None:
    """Raises, in one line that says what to do, where a part could not even start."""
    if find_spec("triton") is None:
        raise ImportError("fastae verify needs Triton, which is not installed; pip install triton (Linux)")
    if "compile" in options.parts:
        for name in ("nvdisasm", "cuobjdump"):
            resources.tool(name)
    for target in options.targets:
        if target not in targets_of("compile"):
            known = ", ".join(targets_of("compile"))
            raise ValueError(f"--target must be one of {known}, or several with commas between; got {target!r}")
    for part in options.parts:
        if part != "numerics" and options.targets and not set(options.targets) & set(targets_of(part)):
            known = ", ".join(targets_of(part))
            raise ValueError(f"--{part} knows the targets {known}; got {', '.join(options.targets)}")
    if options.device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"--device {options.device} needs a GPU and a PyTorch built for it: "
                             "torch.cuda.is_available() is false; leave it out to run without one")  # fmt: skip


def targets_of(part: str) -> list[str]:
    """The machine that executes code knows that of NVIDIA's GPUs."""
    return [name for name in TARGETS if part == "compile" or name.startswith("sm_")]


def verify(options: VerifyOptions, json_file: Path | None, show_all: bool) -> int:
    """Run the parts and print what they found; 0 if every finding holds and every part finished, else 1."""
    check_options(options)
    if json_file is not None:
        check_writable(json_file, force=True, option="--json")
    started = time.monotonic()
    with Console(stderr=True).status(f"{', '.join(options.parts)}: running; seed {options.seed}"):
        outcomes = run_parts(options)
    seconds = time.monotonic() - started
    ok = all(outcome.ok for outcome in outcomes)
    print_report(outcomes, options.seed, seconds, ok, show_all)
    if json_file is not None:
        write_atomically({json_file: (json.dumps(_document(options, outcomes, seconds, ok), indent=1) + "\n").encode()})
    return 0 if ok else 1


def run_parts(options: VerifyOptions) -> list[Outcome]:
    """Every part in child processes, two at a time; sanitizers too on a GPU that has them."""
    running: list[subprocess.Popen[str]] = []
    jobs = []
    for part in sorted(options.parts, key=ORDER.index):
        chosen = [t for t in targets_of(part) if t in options.targets or not options.targets]
        chosen = one_of(chosen) if part in ("traffic", "statistics") and options.quick else chosen
        for targets in [(t,) for t in chosen] if part in BY_TARGET else [options.targets]:
            jobs.append(partial(run_child, part, replace(options, targets=targets), running))
    if options.device != "cpu" and "numerics" in options.parts and shutil.which("compute-sanitizer"):
        jobs += [partial(sanitize, tool, options, running) for tool in ("memcheck", "racecheck")]
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        return sorted(
            _by_part(list(pool.map(lambda job: job(), jobs))), key=lambda one: VERIFY_PARTS.index(one.part.split()[0])
        )
    finally:  # of an interrupt: what waits is not started, what runs is stopped
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.kill()


def _by_part(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The children of one part as one; its seconds are those of all of them."""
    found: dict[str, Outcome] = {}
    for one in outcomes:
        whole = found.setdefault(one.part, Outcome(one.part))
        whole.findings += one.findings
        whole.seconds += one.seconds
        whole.problem = "; ".join(filter(None, (whole.problem, one.problem)))
    return list(found.values())


def environment(part: str, device: str = "cpu") -> dict[str, str]:
    """The child's: interpreted or compiled, one thread."""
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    own |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return own | ({"TRITON_INTERPRET": "1"} if part == "numerics" and device == "cpu" else {})


def _arguments(part: str, options: VerifyOptions) -> list[str]:
    found = [sys.executable, "-m", f"fastae.verify.{MODULES.get(part, part)}", "--seed", str(options.seed)]
    found += ["--quick"] * options.quick
    found += ["--only", options.only] if options.only else []
    if part == "numerics":
        return found + (["--device", options.device] if options.device != "cpu" else [])
    return found + (["--target", ",".join(options.targets)] if options.targets else [])


def run_child(part: str, options: VerifyOptions, running: list[subprocess.Popen[str]]) -> Outcome:
    """One child, from its start to its end."""
    outcome, following, started = Outcome(part), ("", ""), time.monotonic()
    start = partial(subprocess.Popen, _arguments(part, options), stdout=subprocess.PIPE, text=True)
    with tempfile.TemporaryFile("w+") as errors, start(stderr=errors, env=environment(part, options.device)) as process:
        running.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            finding = parse(line)
            if finding is not None:
                outcome.findings.append(finding)
            following = announced(line) or following
        code = process.wait()
        running.remove(process)
        if code:
            _crashed(outcome, code, following, _last_line(errors))
    if not outcome.findings and not outcome.problem:
        about = [f"about {options.only!r}"] * bool(options.only) + [f"for {', '.join(options.targets)}"] * bool(
            options.targets
        )
        outcome.problem = " ".join((f"{part} reported nothing", *about))
    outcome.seconds = time.monotonic() - started
    return outcome


def _crashed(outcome: Outcome, code: int, following: tuple[str, str], last: str) -> None:
    """A part that died names itself, and the kernel it was busy with as far as it had said."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    op, what = following
    doing = f" while checking {op} ({what})" if op else ""
    outcome.problem = f"{outcome.part} {how}{doing}" + (f": {last}" if last else "")
    if op:
        finding = Finding(outcome.part, op, "", what, "", "", how, "finishes", False, outcome.problem)
        outcome.findings.append(finding)


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def sanitize(tool: str, options: VerifyOptions, running: list[subprocess.Popen[str]]) -> Outcome:
    """NVIDIA's compute-sanitizer over the quick numerics, without PyTorch's cache of blocks that hides overruns."""
    started = time.monotonic()
    arguments = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    arguments += _arguments(
        "numerics", VerifyOptions(("numerics",), True, options.seed, (), options.only, options.device)
    )
    own = environment("numerics", options.device) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = partial(subprocess.Popen, arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with start(env=own) as process:
        running.append(process)
        output, _ = process.communicate()
        running.remove(process)
    reports = [line for line in output.splitlines() if line.startswith("=========") and len(line.split()) > 1]
    summary = reports[-1].strip("= ") if reports else f"exit code {process.returncode}"
    detail = "; ".join(line.strip("= ") for line in reports[:6]) if process.returncode else ""
    finding = Finding("numerics", tool, "", "quick grid", "", options.device, summary, "0 errors",
                      process.returncode == 0, detail)  # fmt: skip
    return Outcome(f"numerics under {tool}", [finding], time.monotonic() - started)


def _document(options: VerifyOptions, outcomes: Sequence[Outcome], seconds: float, ok: bool) -> dict[str, Any]:
    parts = {
        o.part: {"findings": len(o.findings), "failed": o.failed, "seconds": round(o.seconds, 1), "problem": o.problem}
        for o in outcomes
    }
    return {
        "ok": ok,
        "command": shlex.join(["fastae", *sys.argv[1:]]),
        "seed": options.seed,
        "options": asdict(options),
        "machine": machine(),
        "versions": {name: _version(name) for name in ("fastae", "torch", "triton", "numpy")}
        | {"python": platform.python_version()},
        "seconds": round(seconds, 1),
        "parts": parts,
        "findings": [asdict(f) for o in outcomes for f in o.findings],
    }


def machine() -> str:
    """The machine line: processor, cores, system."""
    return f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
