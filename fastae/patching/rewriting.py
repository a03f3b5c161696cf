"""A module's forward with its linear layers and their activations in one, written from its recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fastae.patching.fused_modules import Rewritten
from fastae.patching.recognise import of_node
from fastae.patching.tracing import Recording, trace


@dataclass
class Rewrite:
    """Result of rewriting a forward: the rewritten forwards (in training and not, where it asks), the pairs (layer,
    activation, where that stands), and why other layers are in none.
    """

    forwards: list[Rewritten] = field(default_factory=list)
    pairs: list[tuple[nn.Module, str, str]] = field(default_factory=list)
    why: dict[nn.Module, str] = field(default_factory=dict)


def rewrite(module: nn.Module, unsupported_reason: Callable[[nn.Module], str | None]) -> Rewrite:
    """Raises `NotTraceable`. `unsupported_reason`: the reason for which a layer can be in no pair at all, or None."""
    found = Rewrite()
    recording = trace(module)
    _add(module, recording, unsupported_reason, found)
    if any(attribute == "training" for _, attribute in recording.reads.values):
        with _other_mode(module):
            _add(module, trace(module), unsupported_reason, found)
    return found


@contextmanager
def _other_mode(module: nn.Module) -> Iterator[None]:
    other = not module.training
    before = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in before:
            m.__dict__["training"] = other
        yield
    finally:
        for m, mode in before:
            m.__dict__["training"] = mode


def _add(
    module: nn.Module, recording: Recording, unsupported_reason: Callable[[nn.Module], str | None], found: Rewrite
) -> None:
    graph = recording.graph
    pairs = []
    for node in list(graph.nodes):
        if node.op != "call_module" or not isinstance(linear := module.get_submodule(str(node.target)), nn.Linear):
            continue
        after = next(iter(node.users), None)
        why = unsupported_reason(linear) or _why_no_pair(module, node)
        if why is not None:
            found.why[linear] = why
            continue
        assert after is not None
        name = of_node(after, node, module.get_submodule)
        assert name is not None
        activation = str(after.target) if after.op == "call_module" else None
        found.pairs.append((linear, name, activation or f"{_spelled(after)} in {type(module).__name__}.forward"))
        pairs.append((str(node.target), activation, name))
        node.kwargs = {"activation": name}
        after.replace_all_uses_with(node)
        graph.erase_node(after)
    if pairs:
        found.forwards.append(_rewritten(recording, tuple(pairs)))


def _why_no_pair(module: nn.Module, node: fx.Node) -> str | None:
    here = f"{type(module).__name__}.forward"
    if len(node.users) != 1 or len(node.args) != 1 or node.kwargs:
        return f"its result is used {len(node.users)} times in {here}"
    after = next(iter(node.users))
    name = of_node(after, node, module.get_submodule)
    if name is None:
        return (
            f"its result is what {here} returns" if after.op == "output" else f"{_spelled(after)} follows it in {here}"
        )
    return None


def _spelled(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _rewritten(recording: Recording, pairs: tuple[tuple[str, str | None, str], ...]) -> Rewritten:
    graph, reads = recording.graph, recording.reads
    for node in graph.nodes:
        node.type = None  # annotations would be names to import
    code = graph.python_code("self")
    values = tuple((reads.paths[m], attribute, value) for (m, attribute), value in reads.values.items())
    containers = tuple((reads.paths[m], tuple(m._modules)) for m in reads.containers)
    names: dict[str, Any] = {name: value for name, value in code.globals.items() if name in code.src}
    arguments = recording.arguments, recording.defaults, recording.positions
    return Rewritten(code.src, *arguments, values, containers, pairs, names)
