"""The report as Markdown: the machine, what stands out, a table for each level, growth, how to read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastae_bench.results import STRONG_BASELINES, Measured, Results
from fastae_bench.spread import Spread, spread
from fastae_bench.variants import FASTAE, MATMUL_ONLY

TITLES = {
    "op": "Ops",
    "step": "Training step",
    "conv": "Training step of the convolutional autoencoder",
    "fit": "Epochs of `fit`",
    "score": "`score`",
    "encode": "`encode`",
    "startup": "Start-up",
}
VARIANT_ORDER = ("idiom", *STRONG_BASELINES)
MOST_BEHIND = 4  # cases of a kind that the head names; the tables have all in bold

READING = """\
A ratio is their time over ours: the median of the rounds' ratios, with their 10 and 90 % quantiles. Above 1 fastae is
faster; **bold** is slower than well-tuned PyTorch. The variants take turns within a process, and what they compute is
compared first: where it differs there is no ratio.

- *idiom*: a DataLoader, `Adam()`, `loss.item()`; `relu(linear(x))`, `((y - x) ** 2).mean()`.
- *tuned*: resident data (bfloat16 in bfloat16), `index_select`, `Adam(fused=True)`, `set_to_none`; activations in place
  where there are no gradients.
- *compiled*: `torch.compile` with its defaults, of tuned's forward pass and loss.
- *products*: the share of our time that the bare matrix products take, each by the faster of PyTorch's libraries.
- *FLOP/s*, *bytes/s*: ours, those of the products and of each tensor moved once, as a share of the best rate of a
  product and of a copy measured on this machine; bytes above 100 % come from the caches.

`linear_act` is the network's first layer, `linear_act_mse` its last, with all gradients; `mse_loss` has one. An epoch
of `fit` has 4,096 rows or three batches, of very wide rows fewer. All at the precision of the row; a step in bfloat16
trains fp32 parameters under autocast.
"""


def markdown(results: Results, plots: Sequence[str]) -> str:
    """The whole report; `plots` are the names of the images beside it."""
    parts = ["# fastae bench", head(results)]
    for level, title in TITLES.items():
        measured = [m for m in results.measured if m.level == level]
        if measured:
            parts.append(f"## {title}\n\n{table(measured, results)}")
            parts += _clocks(measured)
    if results.curves:
        parts.append(f"## Growth\n\n{growth_table(results)}")
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in plots]
    parts.append(f"## How to read it\n\n{READING}")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def head(results: Results) -> str:
    """The machine, and what stands out, the worst row among it."""
    lines = [f"- {name}: {value}" for name, value in results.machine.items() if name not in ("device", "command")]
    lines.append(f"- command: `{results.machine['command']}`, {results.seconds:.0f} s")
    peak = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {precision}" for precision, rate in results.flops_per_s.items())
    lines.append(f"- measured peak: products {peak}; copy {results.bytes_per_s / 1e9:.1f} GB/s")
    return "\n".join(lines) + "\n\n" + summary(results)


def summary(results: Results) -> str:
    """How often fastae is ahead of the best of PyTorch, and where it is behind, the worst of each kind of work."""
    ranked = [(m.against_best, m) for m in results.measured if m.against_best]
    lines = []
    if ranked:
        behind = [m for (ratio, _), m in ranked if ratio < 1]
        (worst, variant), m = min(ranked, key=lambda entry: entry[0])
        lines.append(
            f"Against the better of tuned and compiled PyTorch, fastae is faster in {len(ranked) - len(behind)} of "
            f"{len(ranked)} cases. The worst: **{worst:.2f}** against {variant} in {m.key}."
        )
        if behind:
            lines.append("Slower than PyTorch:\n\n" + "\n".join(_behind(ranked)))
    lines += [f"REFUSED, {key}: {variant} computes something else: {why}." for key, variant, why in results.refused]
    missing = sorted({(variant, why) for m in results.measured for variant, why in m.missing.items()})
    lines += [f"Not measured: {variant}: {why}." for variant, why in missing]
    return "\n\n".join(lines)


def _behind(ranked: Sequence[tuple[tuple[float, str], Measured]]) -> list[str]:
    """A line for each kind of work with a case behind PyTorch."""
    lines = []
    for what in dict.fromkeys(m.what for _, m in ranked):
        cases = sorted(((best, m) for best, m in ranked if m.what == what), key=lambda entry: entry[0])
        behind = [(ratio, variant, m) for (ratio, variant), m in cases if ratio < 1]
        if behind:
            shown = ", ".join(f"{ratio:.2f} ({variant}) at {_place(m)}" for ratio, variant, m in behind[:MOST_BEHIND])
            more = f" and {len(behind) - MOST_BEHIND} more" if len(behind) > MOST_BEHIND else ""
            lines.append(f"- {what}, {len(behind)} of {len(cases)}: {shown}{more}")
    return lines


def _place(m: Measured) -> str:
    return f"{m.label} x {m.batch:,} {m.precision}"


def table(measured: Sequence[Measured], results: Results) -> str:
    """One row for each case of a level."""
    variants = [
        variant for variant in VARIANT_ORDER if any(variant in m.took or variant in m.refused for m in measured)
    ]
    kinds = len({m.what for m in measured}) > 1
    has_rows, has_products = any(m.rows > 1 for m in measured), any(MATMUL_ONLY in m.took for m in measured)
    has_cost = any(m.moved for m in measured)
    header = ["what"] * kinds + [
        "network",
        "rows" if measured[0].level in ("score", "encode") else "batch",
        "precision",
    ]
    header += (
        ["fastae"] + ["rows/s"] * has_rows + variants + ["products"] * has_products + ["FLOP/s", "bytes/s"] * has_cost
    )
    lines = []
    for m in measured:
        cells = [m.what] * kinds + [f"{m.network} {m.label}", f"{m.batch:,}", m.precision, duration(m.ours)]
        cells += [f"{m.rows / m.ours.median:,.0f}"] * has_rows + [ratio_cell(m, variant) for variant in variants]
        cells += [percent(m.products)] * has_products + [
            percent(results.peak_share(m)),
            percent(results.copy_share(m)),
        ] * has_cost
        lines.append(cells)
    return _markdown_table(header, lines)


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---" if name in ("what", "network", "precision", "axis", "variant") else "---:" for name in header]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def duration(seconds: Spread) -> str:
    """In a unit that suits the median: `2.71 ms (2.65-2.93)`."""
    unit, factor = next(((u, f) for u, f in (("s", 1.0), ("ms", 1e3)) if seconds.median * f >= 1), ("µs", 1e6))
    low, median, high = (
        f"{value * factor:.3g}" if value * factor < 1000 else f"{value * factor:.0f}" for value in seconds
    )
    return f"{median} {unit} ({low}-{high})"


def ratio_cell(m: Measured, variant: str) -> str:
    if variant in m.refused:
        return "refused"
    if variant not in m.ratios:
        return "-"
    low, median, high = m.ratios[variant]
    text = f"{median:.2f} ({low:.2f}-{high:.2f})"
    return f"**{text}**" if median < 1 and variant in STRONG_BASELINES else text


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _clocks(measured: Sequence[Measured]) -> list[str]:
    """The clocks beyond the first, which only a GPU has: medians of every variant."""
    rows = [
        [m.key, clock, variant, f"{duration_of(seconds)}"]
        for m in measured
        for clock, variants in list(m.seconds.items())[1:]
        for variant, seconds in variants.items()
    ]
    return [_markdown_table(["what", "clock", "variant", "time"], rows)] if rows else []


def duration_of(seconds: list[float]) -> str:
    return duration(spread(seconds))


def growth_table(results: Results) -> str:
    """Exponents of time and peak memory along every axis."""
    rows = [
        [c.axis, c.what, c.side, f"{c.x[0]:,} to {c.x[-1]:,}", *c.exponents().values(), _ends(c.medians, 1e3, " ms"),
         _ends(c.peak_mib, 1, " MiB")]
        for c in results.curves
    ]  # fmt: skip
    header = ["axis", "what", "variant", "from", "time exponent", "memory exponent", "time", "peak memory"]
    note = (
        "y = c x^exponent, fitted to all points by least squares of the logarithms; ± is the standard error. "
        "Depth counts layers. Peak memory is beyond the data and the initial weights."
    )
    return f"{_markdown_table(header, rows)}\n\n{note}"


def _ends(values: Sequence[float], factor: float, unit: str) -> str:
    return f"{values[0] * factor:.3g} to {values[-1] * factor:.3g}{unit}" if values else "-"


def line(m: Measured) -> str:
    """A case in one line of a terminal."""
    name = m.key if m.what == FASTAE else f"{m.what:<28}{m.label:<16}{m.batch:>6}  {m.precision:<9}"
    ratios = "".join(f"  {variant} {ratio.median:5.2f}" for variant, ratio in m.ratios.items())
    products = "" if m.products is None else f"  products {m.products:4.0%}"
    refused = "".join(f"  {variant} REFUSED ({why})" for variant, why in m.refused.items())
    return f"{name}{duration(m.ours):>26}{ratios}{products}{refused}"
