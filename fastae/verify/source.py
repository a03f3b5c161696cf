"""The rules of kernel source (`fastae_emulator.lint`) held against this library's own files."""

from __future__ import annotations

from pathlib import Path

import fastae_kernels
from fastae_emulator.lint import functions, lint_host, lint_kernels

import fastae
from fastae.verify.findings import Finding, emit, named


def kernel_files() -> list[Path]:
    return sorted(Path(fastae_kernels.__file__).parent.rglob("*.py"))


def host_files() -> list[Path]:
    """The modules of fastae that define autograd functions or library ops."""
    texts = {file: file.read_text() for file in sorted(Path(fastae.__file__).parent.rglob("*.py"))}
    return [file for file, text in texts.items() if "autograd.Function" in text or "torch.library" in text]


def run(only: str | None = None) -> None:
    """Emit a finding for each problem, one for each clean kernel, and one for the code around them."""
    files, around = kernel_files(), host_files()
    problems = lint_kernels(files)
    for p in problems:
        if named(p.function, only):
            emit(Finding("lint", p.function, "", p.where, "", "source", p.rule, "none", False, str(p)))
    spoiled = {p.function for p in problems}
    for f in functions(files):
        name = f.node.name
        if f.is_jit and name.endswith("_kernel") and name not in spoiled and named(name, only):
            emit(Finding("lint", name, "", f.file.name, "", "source", "0 problems", "none", True))
    if only is None:
        waits = "; ".join(map(str, lint_host(around)))
        figure = "waits" if waits else "0 problems"
        emit(
            Finding("lint", "autograd code", "", f"{len(around)} files", "", "source", figure, "none", not waits, waits)
        )
