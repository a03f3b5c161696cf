"""Result of `profile`, and its table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastae.text_table import lines as text_lines

GROUPS = ("products", "convolutions", "activations", "loss", "bias sums", "copies", "optimizer", "gather", "python")


@dataclass(frozen=True)
class Part:
    """An op of the schedule, or what stands around it: microseconds of a step by group."""

    name: str
    layer: str
    us: dict[str, float]


@dataclass(frozen=True)
class Profile:
    """Result of `profile`, medians over the steps; `str()` is a table. The groups of `us` add up to `profiled_us`."""

    network: str
    batch_size: int
    dtype: str
    device: str
    threads: int
    steps: int
    parts: tuple[Part, ...]
    step_us: float  # without the profiler
    autograd_us: float  # loss(x).backward(), optimizer.step() on the same rows, without the profiler
    flops: int  # of a step's products
    bare_us: float  # those products alone, by the fastest library at hand
    trace: str | None

    @property
    def us(self) -> dict[str, float]:
        """Microseconds of a step by group."""
        return {group: sum(part.us.get(group, 0.0) for part in self.parts) for group in GROUPS}

    @property
    def profiled_us(self) -> float:
        """Of a step under the profiler, which costs one or two microseconds for each op and each range."""
        return sum(self.us.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "us": self.us, "profiled_us": self.profiled_us}

    def __str__(self) -> str:
        return table(self)


def table(profile: Profile) -> str:
    from rich import box
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
    rate, bare = (profile.flops / time / 1e3 for time in (us.get("products") or float("inf"), profile.bare_us))
    lines = [
        f"{profile.network}, batch {profile.batch_size}, {profile.dtype}, on {profile.device} with {profile.threads} "
        f"thread{'' if profile.threads == 1 else 's'}; medians of {profile.steps} steps",
        *text_lines(made, 160),
        f"without the profiler, whose own cost is in every figure above and most of all in python, a step takes "
        f"{profile.step_us:,.0f} us;",
        f"through autograd, loss(x).backward() and Adam's step, {profile.autograd_us:,.0f} "
        f"({profile.autograd_us / profile.step_us:.2f}x)",
        f"products: {rate:,.0f} GFLOP/s in the step; alone {bare:,.0f} GFLOP/s, {profile.bare_us:,.0f} us, "
        f"{profile.bare_us / profile.step_us:.0%} of the step",
    ]
    if profile.step_us > 1.5 * profile.profiled_us or profile.bare_us > 1.2 * profile.step_us:
        lines.append(
            "These figures contradict each other (a step takes longer than its parts under the profiler, or less than "
            "its products alone): the machine was busy. Measure again."
        )
    if profile.trace:
        lines.append(f"trace: {profile.trace}; open it at ui.perfetto.dev or chrome://tracing")
    return "\n".join(lines)
