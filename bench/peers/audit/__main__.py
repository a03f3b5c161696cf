"""`make audit`: the same models in several libraries against closed forms; docs/wrong-by-default.md."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[2]
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": "tensorflow"}
QUIET |= {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}  # of TensorFlow; torch reads OMP_NUM_THREADS


def main() -> None:
    os.environ.update(QUIET)
    # It imports Triton. After TensorFlow that ends the process (torch 2.13.0, triton 3.7.1, tensorflow-cpu 2.21.0).
    import torch._dynamo
    from fastae_bench.machine import describe

    from peers.audit.page import TITLES, entry_of, page

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(TITLES), help="sections, with commas between; the others stay")
    parser.add_argument("--results", type=Path, default=BENCH / "results" / "audit.json")
    parser.add_argument("--page", type=Path, default=BENCH.parent / "docs" / "wrong-by-default.md")
    parser.add_argument("--page-alone", action="store_true", help="write the page from the results that are there")
    options = parser.parse_args()
    names = [] if options.page_alone else options.only.split(",")
    for name in names:
        if name not in TITLES:
            parser.error(f"{name!r} is none of {', '.join(TITLES)}")
    results: dict[str, Any] = {"sections": {}}
    if options.results.exists():
        results = json.loads(options.results.read_text())
    here = describe(torch.device("cpu"))
    libraries = ("keras", "tensorflow-cpu", "pyod", "pythae", "recbole", "scikit-learn", "scipy")
    about = {
        "machine": here["machine"], "commit": here["commit"],
        "versions": ", ".join([here["versions"], *(f"{name} {version(name)}" for name in libraries)]),
        "command": " ".join(["python -m peers.audit", *sys.argv[1:]]) if sys.argv[1:] else "make audit",
    }  # fmt: skip
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        started = time.perf_counter()
        section = importlib.import_module(f"peers.audit.{name}").audit()
        seconds = round(time.perf_counter() - started, 1)
        results["sections"][name] = {**about, "seconds": seconds, **entry_of(section)}
        options.results.write_text(json.dumps(results, indent=1) + "\n")
    options.page.write_text(page(results))
    print(options.page.read_text())


if __name__ == "__main__":
    main()
