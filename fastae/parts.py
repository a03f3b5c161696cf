"""Parts of a model: frozen dataclasses of numbers, names and tuples, and how config.json and a command line spell them.

"mask:0.3" is `Mask(0.3)`, "gaussian:0.4,low=0,high=1" is `Gaussian(0.4, low=0.0, high=1.0)`. Options without a name
come first, in the order of the fields; groups of columns are spelled "3+4+5/7+8".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def spelled(part: Any) -> str:
    """The part in one word: "huber", "mask:q=0.3"."""
    kind = type(part)
    options = [
        f"{name}={_written(getattr(part, name))}"
        for name in kind.__match_args__
        if getattr(part, name) != getattr(kind, name, None)
    ]
    return part.name if not options else f"{part.name}:{','.join(options)}"


def parsed(text: str, parts: Mapping[str, Any], what: str) -> Any:
    """The part of `parts` that `spelled` spells. Raises ValueError, which begins with `what`, for another name or
    option, one that is missing, or a value that the part refuses."""
    name, _, rest = text.partition(":")
    if name not in parts:
        import difflib  # of no use to a program that makes no mistake

        close = difflib.get_close_matches(name, parts, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{what} must be one of {', '.join(parts)}; got {text!r}{hint}")
    known = parts[name].__match_args__  # of the options: `fields` of a class is nothing for torch.compile
    options: dict[str, Any] = {}
    for place, option in enumerate(rest.split(",") if rest else ()):
        key, named, value = option.partition("=")
        if not named:
            key, value = known[place] if place < len(known) and len(options) == place else "", key
        if key not in known or key in options:
            raise ValueError(f"{what}: {name} has {', '.join(known) or 'no options'}; got {option!r}")
        options[key] = _read(value)
    try:
        return parts[name](**options)
    except TypeError:
        missing = ", ".join(k for k in known if k not in options and not hasattr(parts[name], k))
        raise ValueError(f"{what}: {name} needs {missing}; got {text!r}") from None
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def part_of(given: Any, parts: Mapping[str, Any], what: str, module: str) -> Any:
    """The part that a text or a part stands for; TypeError for anything else."""
    if isinstance(given, str):
        return parsed(given, parts, what)
    if not isinstance(given, tuple(parts.values())):
        raise TypeError(f"{what} must be a part of fastae.{module} or its name; got {given!r}")
    return given


def number(owner: str, name: str, value: object, low: float, high: float = math.inf, below: bool = False) -> float:
    """`value` as a float in [low, high], or [low, high) if it must stay `below`; ValueError otherwise.

    It has to be finite, but where `low` is -inf."""
    made = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not (low <= made <= high) or (below and made == high) or (math.isinf(made) and low > -math.inf):
        span = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        span += f", {high:g} excluded" if below and high < math.inf else ""
        raise ValueError(f"{owner}: {name} must be a number {span}; got {value!r}")
    return made


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join("+".join(map(str, group)) if isinstance(group, Iterable) else str(group) for group in value)
    return str(value)


def _read(text: str) -> Any:
    """A number, groups of whole numbers, or the text as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    try:
        return tuple(tuple(int(n) for n in group.split("+")) for group in text.split("/"))
    except ValueError:
        return text
