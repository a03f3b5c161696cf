"""Plots of the report: ratios as bars beside the line at 1.0, growth, the roofline."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from fastae.train.plots import new_figure
from fastae_bench.results import Curve, Measured, Results
from fastae_bench.spread import Spread

COLOURS = {"fastae": "#1b6ca8", "idiom": "#b8b8b8", "tuned": "#e07b39", "compiled": "#6a994e"}
OTHER_COLOUR = "#8e6bbf"
BAR_INCHES = 0.13


def draw(results: Results) -> dict[str, bytes]:
    """Name -> PNG. Raises ImportError without matplotlib."""
    plots = {}
    for level in dict.fromkeys(m.level for m in results.measured):
        measured = [m for m in results.measured if m.level == level and m.ratios]
        if measured:
            plots[f"ratios-{level}.png"] = _png(_ratio_bars(measured, results))
    if any(m.flops and m.moved for m in results.measured):
        plots["roofline.png"] = _png(_roofline(results))
    if results.curves:
        plots["growth.png"] = _png(_growth(results.curves))
    return plots


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    return file.getvalue()


def _ratio_bars(measured: Sequence[Measured], results: Results) -> Any:
    """A panel for each precision; in it a group of bars for each case, the first case on top."""
    variants = [s for s in ("idiom", "tuned", "compiled") if any(s in m.ratios for m in measured)]
    variants += [s for s in dict.fromkeys(s for m in measured for s in m.ratios) if s not in variants]
    kinds = len({m.what for m in measured}) > 1
    names = list(dict.fromkeys(_name(m, kinds) for m in measured))
    precisions = list(dict.fromkeys(m.precision for m in measured))
    step = len(variants) + 1.2
    figure = new_figure(2.6 + 4.4 * len(precisions), 1.5 + BAR_INCHES * step * len(names))
    panels = figure.subplots(1, len(precisions), squeeze=False, sharey=True)[0]
    for axes, precision in zip(panels, precisions, strict=True):
        here = {names.index(_name(m, kinds)): m.ratios for m in measured if m.precision == precision}
        for i, variant in enumerate(variants):
            shown = {row * step + i: ratios[variant] for row, ratios in here.items() if variant in ratios}
            _bars(axes, shown, COLOURS.get(variant, OTHER_COLOUR), f"{variant}'s time / fastae's")
        most = max(r.high for ratios in here.values() for r in ratios.values())
        axes.set_xlim(0, max(1.25, most * 1.12))
        axes.axvline(1.0, color="black", linewidth=1.2, zorder=3)
        axes.set_title(precision, fontsize=9)
        axes.set_xlabel("above 1: fastae is faster", fontsize=8)
        axes.tick_params(labelsize=7.5)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    panels[0].set_yticks([row * step + (len(variants) - 1) / 2 for row in range(len(names))], names)
    panels[0].set_ylim(step * len(names) - 1.2, -1.2)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncol=len(variants), fontsize=8)
    figure.suptitle(f"{_title(measured[0])}: {results.machine['machine'].split(', ')[0]}, "
                    f"{results.machine['versions'].split(', ')[2]}", fontsize=9)  # fmt: skip
    return figure


def _bars(axes: Any, shown: Mapping[float, Spread], colour: str, label: str) -> None:
    """Whiskers are the 10 and 90 % quantiles."""
    whiskers = [[r.median - r.low for r in shown.values()], [r.high - r.median for r in shown.values()]]
    axes.barh(list(shown), [r.median for r in shown.values()], height=0.9, color=colour, label=label, xerr=whiskers,
              error_kw={"elinewidth": 0.8, "ecolor": "#303030"})  # fmt: skip
    for place, ratio in shown.items():
        axes.annotate(f"{ratio.median:.2f}", (ratio.high, place), xytext=(3, 0), textcoords="offset points",
                      va="center", fontsize=6.5, zorder=4,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.8})  # fmt: skip


def _name(m: Measured, with_what: bool) -> str:
    return f"{m.what + '  ' if with_what else ''}{m.label} x {m.batch:,}"


def _title(m: Measured) -> str:
    titles = {
        "op": "ops",
        "conv": "one convolutional step",
        "fit": "one epoch of fit",
        "step": "one training step",
        "startup": "start-up",
    }
    return titles.get(m.level, m.level)


def _roofline(results: Results) -> Any:
    """Rates of fastae and of the best PyTorch variant over FLOPs per byte, below the measured peaks."""
    figure = new_figure(8.0, 5.0)
    axes = figure.subplots()
    shown = [m for m in results.measured if m.flops and m.moved]
    intensity = {m.key: m.flops / m.moved for m in shown if m.flops and m.moved}
    low, high = min(intensity.values()) / 2, max(intensity.values()) * 2
    styles = {"float32": ("-", "o"), "bfloat16": ("--", "^")}
    for precision, peak in results.flops_per_s.items():
        line, _ = styles[precision]
        knee = peak / results.bytes_per_s
        x = [low, *([knee] if low < knee < high else []), high]
        y = [min(peak, value * results.bytes_per_s) / 1e9 for value in x]
        axes.plot(x, y, line, color="black", linewidth=1.2, label=f"measured peak, {precision}")
    for precision, (_, marker) in styles.items():
        cases = [m for m in shown if m.precision == precision]
        for variant in ("tuned", "fastae"):
            have = [m for m in cases if variant in m.took and m.flops]
            rates = [m.flops / m.variant_seconds(variant) / 1e9 for m in have if m.flops]
            if rates:
                axes.scatter([intensity[m.key] for m in have], rates, s=26, marker=marker, color=COLOURS[variant],
                             alpha=0.75, linewidths=0, label=f"{variant}, {precision}")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte (a model: each tensor moved once)",
             ylabel="GFLOP/s, measured")  # fmt: skip
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="lower right")
    axes.set_title(
        f"roofline; copy {results.bytes_per_s / 1e9:.1f} GB/s; points above it keep to the caches", fontsize=9
    )
    return figure


def _growth(curves: Sequence[Curve]) -> Any:
    """Time above, peak memory below; one column for each axis."""
    kinds = list(dict.fromkeys(c.axis for c in curves))
    figure = new_figure(3.3 * len(kinds), 6.2)
    from matplotlib.ticker import LogLocator

    panels = figure.subplots(2, len(kinds), squeeze=False)
    for column, axis in enumerate(kinds):
        for curve in (c for c in curves if c.axis == axis):
            exponents, colour = curve.exponents(), COLOURS[curve.side]
            milliseconds = [s * 1e3 for s in curve.medians]
            figures = ("time", milliseconds, "time, ms"), ("peak memory", curve.peak_mib, "peak memory, MiB")
            for row, (name, values, label) in enumerate(figures):
                panel = panels[row][column]
                if values:
                    exponent = exponents[name].split(" ")[0]
                    panel.plot(curve.x, values, "o-", color=colour, markersize=4, label=f"{curve.side}: x^{exponent}")
                panel.set(xscale="log", yscale="log", xlabel=axis)
                if column == 0:
                    panel.set_ylabel(label)
        panels[0][column].set_title(curve.what, fontsize=8)
        for row in range(2):
            panel = panels[row][column]
            points = next(c.x for c in curves if c.axis == axis)
            panel.set_xticks(points, [f"{x:,}" for x in points], fontsize=7, rotation=30)
            panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
            low, high = panel.get_ylim()
            if high < 4 * low:  # a level line reads as one, between two ticks at least
                panel.set_ylim(low / 2, high * 2)
            panel.grid(alpha=0.3)
            if panel.lines:
                panel.legend(fontsize=7.5)
    return figure
