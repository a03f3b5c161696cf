"""How the command line reads widths and devices."""

from __future__ import annotations

import torch


def numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} must be whole numbers with commas between, e.g. 784,256,128; got {text!r}"
        ) from None


def device_named(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be one that works here; got {name!r} ({str(error).splitlines()[0]})") from None
