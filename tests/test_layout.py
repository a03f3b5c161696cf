"""The rules of the house, read from the source and from fresh processes: one table says who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    "fastae": ROOT / "fastae",
    "fastae_kernels": ROOT / "kernels" / "fastae_kernels",
    "fastae_emulator": ROOT / "kernels" / "fastae_emulator",
    "fastae_bench": ROOT / "bench" / "fastae_bench",
}
LIGHT = ("triton", "matplotlib", "rich", "click", "sklearn", "mlxtend")

# Who may import whom. A package imports itself freely, files in `fastae/` are packages of one file.
KERNEL_TABLES = {"fastae_kernels"}  # ops, elementwise and the implementations that need no Triton
MAY_IMPORT = {
    "fastae_kernels": set(),
    "fastae_kernels.jit": {"fastae_kernels"},
    "fastae_emulator": set(),
    "fastae.text_table": set(),
    "fastae.parts": set(),
    "fastae.likelihoods": {"fastae.parts"},
    "fastae.noise": {"fastae.parts"},
    "fastae.bottlenecks": {"fastae.parts"},
    "fastae.aliases": {"fastae.data", "fastae.models", "fastae.nn", "fastae.patching", "fastae.train"},
    "fastae.nn": {"fastae.likelihoods"},
    "fastae.engine": {"fastae.nn", "fastae.noise", "fastae.bottlenecks"},
    "fastae.data": {"fastae.nn"},
    "fastae.patching": {"fastae.nn"},
    "fastae.train": {"fastae.engine", "fastae.data", "fastae.nn"},
    "fastae.models": {
        "fastae.train", "fastae.engine", "fastae.data", "fastae.nn", "fastae.likelihoods", "fastae.noise",
        "fastae.bottlenecks", "fastae.parts", "fastae.text_table",
    },
    "fastae.analysis": {"fastae.models", "fastae.engine", "fastae.data", "fastae.nn", "fastae.text_table"},
    "fastae.verify": {
        "fastae.analysis", "fastae.models", "fastae.engine", "fastae.data", "fastae.nn", "fastae.noise",
        "fastae.bottlenecks", "fastae", "fastae_emulator", "fastae_kernels.jit",
    },
    "fastae": {
        "fastae.aliases", "fastae.analysis", "fastae.data", "fastae.engine", "fastae.likelihoods", "fastae.models",
        "fastae.nn", "fastae.noise", "fastae.bottlenecks", "fastae.patching", "fastae.train",
    },
    "fastae.cli": {
        "fastae", "fastae.analysis", "fastae.data", "fastae.engine", "fastae.models", "fastae.nn", "fastae.patching",
        "fastae.train",
    },
    "fastae.__main__": {"fastae.cli"},
    "fastae_bench": {
        "fastae", "fastae.analysis", "fastae.cli", "fastae.data", "fastae.engine", "fastae.models", "fastae.nn",
        "fastae.train",
    },
}  # fmt: skip
# Imported inside a function, or named as a string: a CPU never imports Triton, `fastae score` neither verify nor bench,
# a program that loads a model and scores rows nothing that trains and saves
DOORS = {
    ("fastae.nn.backend", "fastae_kernels.jit"),
    ("fastae.models.base", "fastae.models"),
    ("fastae.models.base", "fastae.train"),
    ("fastae.cli.verify", "fastae.verify"),
    ("fastae.cli.main", "fastae_bench"),
}
# Tables of names whose modules are imported on first use: downhill as all others
LAZY = {"fastae", "fastae.aliases", "fastae.cli.main"}


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of the four packages."""
    for name, root in SOURCES.items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join((name, *(part for part in parts if part != "__init__"))), path


MODULES = dict(modules())


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether inside a function) of every import, annotations under TYPE_CHECKING and strings included."""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module), id(node) in inside
        elif isinstance(node, ast.Constant) and node.value in MODULES and "." in node.value:
            yield node.value, True  # a dotted name of ours: what import_module is given


def package_of(module: str) -> str:
    """The row of the table that a module belongs to."""
    parts = module.split(".")
    return next(name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in MAY_IMPORT)


def ours(module: str) -> bool:
    return module.split(".")[0] in SOURCES


ARROWS = [
    (name, target, inside)
    for name, path in MODULES.items()
    for target, inside in imported(path)
    if ours(target) and target != name
]


# ---------------------------------------------------------------- imports


def test_there_is_source_to_read() -> None:
    assert len(MODULES) > 150
    assert len(ARROWS) > 500
    assert {"fastae.nn.linear_act", "fastae_kernels.jit.losses", "fastae_emulator.ptx.machine"} <= set(MODULES)


def test_no_arrow_uphill() -> None:
    """Every import between packages is in the table, wherever it stands; the doors alone open inside a function."""
    wrong = []
    for name, target, inside in ARROWS:
        here, there = package_of(name), package_of(target)
        if here == there or there in MAY_IMPORT[here]:
            continue
        if (there == "fastae_kernels" and here.startswith("fastae.")) or (
            there == "fastae_kernels" and here == "fastae_bench"
        ):
            continue  # its tables may be read from anywhere
        if inside and (name, there) in DOORS:
            continue
        wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_every_door_is_used() -> None:
    used = {(name, package_of(target)) for name, target, inside in ARROWS if inside}
    assert used >= DOORS


def test_no_circle_of_packages() -> None:
    """The table itself has none: taking away what imports nothing that is left ends with nothing."""
    left = {name: {there for there in may if there != name} for name, may in MAY_IMPORT.items()}
    while leaves := [name for name, may in left.items() if not may & left.keys()]:
        for name in leaves:
            del left[name]
    assert left == {}


def test_no_circle_of_modules() -> None:
    """Nor has any package inside, imports in functions and under TYPE_CHECKING included."""
    left = {name: set[str]() for name in MODULES}
    for name, target, _ in ARROWS:
        while target not in MODULES:
            target = target.rpartition(".")[0]
        left[name].add(target)
    while leaves := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in leaves:
            del left[name]
    assert left == {}, "each of these imports another of these"


def test_our_own_imports_stand_at_the_top() -> None:
    inside = {(name, package_of(target)) for name, target, inside in ARROWS if inside and name not in LAZY}
    assert inside <= DOORS


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith(("fastae_kernels.jit", "fastae_emulator"))])
def test_kernels_know_neither_fastae_nor_tests(name: str) -> None:
    heads = {target.split(".")[0] for target, _ in imported(MODULES[name])}
    assert not heads & {"fastae", "fastae_bench", "tests", "pytest"}
    assert not name.startswith("fastae_emulator") or "fastae_kernels" not in heads


def test_sub_packages_name_nothing() -> None:
    """So that no function can hide a module: `fastae.verify` alone gives its public names, on first use."""
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name not in ("fastae", "fastae.verify", "fastae_emulator.ptx"):
            if "emulator.ptx" in name:
                continue
            statements = ast.parse(path.read_text()).body
            assert all(isinstance(s, ast.Expr) for s in statements), name


# ---------------------------------------------------------------- fresh processes


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_fastae_is_light() -> None:
    heavy = (*LIGHT, "fastae_emulator", "fastae_bench", "fastae.verify", "fastae.cli", "fastae.train", "numpy.typing")
    assert fresh(f"import sys, fastae; print([m for m in {heavy!r} if m in sys.modules])") == "[]"


def test_import_fastae_touches_no_device() -> None:
    """Were CUDA looked at, these would be called; and no tensor is made on the way."""
    code = """
import torch
def fail(*_, **__):
    raise AssertionError("a device was touched at import")
for name in ("is_available", "device_count", "current_device", "init", "_lazy_init", "get_device_properties"):
    setattr(torch.cuda, name, fail)
import fastae
print(torch.cuda.is_initialized())
"""
    assert fresh(code) == "False"


def test_the_twins_need_no_triton() -> None:
    code = "import sys, fastae_kernels.reference, fastae_kernels.onednn, fastae_kernels.splits; "
    assert fresh(code + "print('triton' in sys.modules)") == "False"


def test_fastae_kernels_imports_alone() -> None:
    assert fresh("import sys, fastae_kernels.jit.backend; print('fastae' in sys.modules)") == "False"


# ---------------------------------------------------------------- packages


def test_source_roots_are_no_packages() -> None:
    for root in ("kernels", "bench"):
        assert not (ROOT / root / "__init__.py").exists()


@pytest.mark.parametrize("package", SOURCES)
def test_typed(package: str) -> None:
    assert (SOURCES[package] / "py.typed").exists()


def test_every_implementation_has_every_op() -> None:
    """mypy holds the signatures; here no method is the protocol's own, which returns nothing."""
    from fastae_kernels.jit.backend import Jit
    from fastae_kernels.onednn import OneDNN
    from fastae_kernels.ops import Ops
    from fastae_kernels.reference import Reference

    names = [name for name in vars(Ops) if not name.startswith("_")]
    assert len(names) == 15
    for implementation in (Reference, OneDNN, Jit):
        for name in names:
            assert callable(getattr(implementation, name)), f"{implementation.__name__}.{name}"
