"""`str(fastae.profile(...))`."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastae.analysis.profile import Profile


def table(profile: Profile) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    total, us = profile.profiled_us, {group: us for group, us in profile.us.items() if us > 0}
    made = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    made.add_column("us of a step", "sum", no_wrap=True)
    made.add_column("layer", no_wrap=True)
    made.add_column("all", f"{total:,.0f}", justify="right")
    for group, time in us.items():
        made.add_column(group, f"{time:,.0f}", justify="right")
    for part in profile.parts:
        times = [part.us.get(group, 0.0) for group in us]
        made.add_row(part.name, part.layer, f"{sum(times):,.0f}", *(f"{t:,.0f}" if t >= 0.5 else "" for t in times))
    made.add_section()
    made.add_row("share", "", "100 %", *(f"{time / total:.0%}" for time in us.values()))
    text = StringIO()
    Console(file=text, width=160, color_system=None).print(made)
    rate, bare = (profile.flops / time / 1e3 for time in (us.get("products") or float("inf"), profile.bare_us))
    lines = [
        f"{profile.network}, batch {profile.batch_size}, {profile.dtype}, on {profile.device} with {profile.threads} "
        f"threads; medians of {profile.steps} steps",
        *(line.rstrip() for line in text.getvalue().strip("\n").splitlines()),
        f"without the profiler, whose own cost is in every figure above and most of all in python, a step takes "
        f"{profile.step_us:,.0f} us;",
        f"through autograd, loss(x).backward() and Adam's step, {profile.autograd_us:,.0f} "
        f"({profile.autograd_us / profile.step_us:.2f}x)",
        f"products: {rate:,.0f} GFLOP/s in the step; alone {bare:,.0f} GFLOP/s, {profile.bare_us:,.0f} us, "
        f"{profile.bare_us / profile.step_us:.0%} of the step",
    ]
    if profile.trace:
        lines.append(f"trace: {profile.trace}; open it at ui.perfetto.dev or chrome://tracing")
    return "\n".join(lines)
