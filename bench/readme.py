"""`python bench/readme.py`: write the figures of `bench/results` into README.md and docs/benchmarks.md."""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from fastae_bench.report import duration, duration_of, head, ratio_cell, table
from fastae_bench.results import Measured, Results, read_results
from fastae_bench.sizes import NETWORKS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))  # for peers, when this file is not run as a script

from peers.problem import PeerProblem  # noqa: E402
from peers.report import Result, ratio, refused, refused_score  # noqa: E402
from peers.variants import VARIANTS  # noqa: E402

BEGIN, END = "<!-- from bench/results: python bench/readme.py -->", "<!-- end -->"
NETWORK, PRECISION = "mnist", "float32"
WIDTHS = "-".join(map(str, NETWORKS[NETWORK][0]))
# level, what, batch (None: the only one) -> what the row of the README is called
FOUR = {
    ("step", "training step", 256): "training step, batch {batch:,}",
    ("fit", "fit", None): "epoch of `fit`, {rows:,} rows",
    ("score", "score", None): "`score`, {rows:,} rows",
    ("startup", "load", None): "load a model in a new process, `import fastae` included",
}


def four(results: Results) -> str:
    """One row each for step, fit, score and load, beside tuned PyTorch."""
    lines = []
    for (level, what, batch), label in FOUR.items():
        m = next(m for m in results.measured if _is(m, level, what) and batch in (None, m.batch))
        tuned = duration_of(m.took["tuned"]) if "tuned" in m.took else "-"
        cells = label.format(batch=m.batch, rows=m.rows), duration(m.ours), tuned, ratio_cell(m, "tuned")
        lines.append(f"| {' | '.join(cells)} |")
    header = f"| {WIDTHS}, {PRECISION} | fastae | tuned PyTorch | ratio |\n|---|---:|---:|---:|"
    ranked = [best for m in results.measured if (best := m.against_best)]
    count = f"{sum(ratio >= 1 for ratio, _ in ranked)} of {len(ranked)}"
    return "\n".join([
        header, *lines, "",
        f"Measured on {results.machine['machine']}, at commit {results.machine['commit']}.",
        "Median and 10 to 90 % quantiles. The ratio is PyTorch's time over fastae's, **bold** where fastae is slower.",
        f"Over all cases, fastae is faster than the better of tuned and compiled PyTorch in {count}.",
    ])  # fmt: skip


def _is(m: Measured, level: str, what: str) -> bool:
    return (m.level, m.what, m.network, m.precision) == (level, what, NETWORK, PRECISION)


def figures(results: Results) -> str:
    """Head, the training step of MNIST's and the tabular network, `score` of MNIST's."""
    levels = (("Training step", "step", (32, 256, 1024)), ("`score`", "score", (4096,)))
    parts = [head(results)]
    for title, level, batches in levels:
        rows = [m for m in results.measured if m.level == level and m.batch in batches]
        rows = [m for m in rows if m.network in ("tabular", NETWORK)]
        parts.append(f"{title}, the time of one call and theirs over it:\n\n{table(rows, results)}")
    return "\n\n".join(part.strip() for part in parts)


def peers(entries: dict[str, Any]) -> str:
    """Rows/s of fastae, and how many times those of each other library they are."""
    problems = entries["problems"].values()
    names = [name for name in VARIANTS if any(r["side"] == name for entry in problems for r in entry["results"])]
    others = names[1:]
    lines = [
        f"| rows/s, and how many times theirs | {' | '.join(names)} |",
        "|---|" + "---:|" * len(names),
    ]
    for entry in problems:
        problem = PeerProblem(**{**entry["problem"], "features": tuple(entry["problem"]["features"])})
        found = {r["side"]: Result(**r) for r in entry["results"]}
        ours = found[names[0]]
        for kind in ("training", "scoring"):
            rates = getattr(ours, kind)
            cells = [f"{statistics.median(rates):,.0f}"]
            for name in others:
                theirs = found.get(name)
                cells.append("-" if theirs is None else _times(ours, theirs, kind))
            label = f"{'-'.join(map(str, problem.widths))}, batch {problem.batch}, {problem.precision}, {kind}"
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(ours: Result, theirs: Result, kind: str) -> str:
    """The median ratio of rows/s, bold where fastae is slower; none where the two compute different things."""
    if refused(ours, theirs) or (kind == "scoring" and (refused_score(theirs) or refused_score(ours))):
        return "no ratio"
    median = ratio(getattr(ours, kind), getattr(theirs, kind))[1]
    return f"**{median:.2f}**" if median < 1 else f"{median:.2f}"


def filled(page: str, *parts: str) -> str:
    """The page with what stands between its marks replaced by `parts`, in that order."""
    assert page.count(BEGIN) == len(parts)
    left = iter(parts)
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{next(left)}\n{END}", page, flags=re.DOTALL)


def pages() -> dict[Path, str]:
    """Each page with the figures of `bench/results`."""
    results = read_results(ROOT / "bench/results/bench.json")
    compared = json.loads((ROOT / "bench/results/peers.json").read_text())
    parts = {"README.md": (four(results),), "docs/benchmarks.md": (figures(results), peers(compared))}
    return {ROOT / name: filled((ROOT / name).read_text(), *made) for name, made in parts.items()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
