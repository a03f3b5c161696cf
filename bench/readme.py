"""`python bench/readme.py`: puts the head of `bench/results` and the rows most asked for into the README."""

from pathlib import Path

from fastae_bench.report import head, table
from fastae_bench.results import Results, read_results

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- from bench/results: python bench/readme.py -->", "<!-- end -->"


def figures(results: Results) -> str:
    """Head, the training step of MNIST's and the tabular network, `score` of MNIST's."""
    levels = (("Training step", "step", (32, 256, 1024)), ("`score`", "score", (4096,)))
    parts = [head(results)]
    for title, level, batches in levels:
        rows = [m for m in results.measured if m.level == level and m.batch in batches]
        rows = [m for m in rows if m.network in ("tabular", "mnist")]
        parts.append(f"{title}, the time of one call and theirs over it:\n\n{table(rows, results)}")
    return "\n\n".join(part.strip() for part in parts)


def with_figures(readme: str, results: Results) -> str:
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{figures(results)}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_figures(readme.read_text(), read_results(ROOT / "bench/results/bench.json")))
