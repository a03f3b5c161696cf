"""The rules of the house, read from the source and from fresh processes."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from fastae_kernels import reference
from fastae_kernels.jit import linear_act
from fastae_kernels.jit import linear_act_loss as linear_act_mse
from fastae_kernels.jit import losses as mse_loss
from fastae_kernels.jit import stack as stack_score

ROOT = Path(__file__).parent.parent
FASTAE = sorted((ROOT / "fastae").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
BANNED = ("triton", "matplotlib", "rich", "click", "sklearn", "mlxtend")


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imports(path: Path) -> set[str]:
    """Every module a file names in an import, wherever it stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            found.add(node.module or "")
    return {name.split(".")[0] for name in found}


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_source_to_read() -> None:
    assert {"linear_act.py", "losses.py", "__init__.py"} <= {p.name for p in FASTAE}
    assert {"linear_act.py", "losses.py", "reference.py", "tile_ops.py"} <= {p.name for p in KERNELS}


# ---------------------------------------------------------------- imports


def test_import_fastae_is_light() -> None:
    code = f"import sys, fastae; print([m for m in {BANNED!r} if m in sys.modules])"
    assert fresh(code) == "[]"


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


def test_reference_needs_no_triton() -> None:
    assert fresh("import sys, fastae_kernels.reference; print('triton' in sys.modules)") == "False"


@pytest.mark.parametrize("path", KERNELS, ids=ids)
def test_kernels_know_neither_fastae_nor_tests(path: Path) -> None:
    assert not imports(path) & {"fastae", "tests", "bench"}


@pytest.mark.parametrize("path", FASTAE, ids=ids)
def test_fastae_does_not_import_uphill(path: Path) -> None:
    assert not imports(path) & {"tests", "bench", "accuracy", "cases", "conftest", "pytest"}


def test_fastae_kernels_imports_alone() -> None:
    code = "import sys, fastae_kernels.jit.losses, fastae_kernels.jit.stack; print('fastae' in sys.modules)"
    assert fresh(code) == "False"


def test_kernels_is_a_source_root_not_a_package() -> None:
    assert (ROOT / "kernels" / "fastae_kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("package", ["fastae", "kernels/fastae_kernels"])
def test_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()


# ---------------------------------------------------------------- twins


def launchers() -> list[tuple[str, object]]:
    found = []
    for module in (linear_act, mse_loss, linear_act_mse, stack_score):
        for name, value in inspect.getmembers(module, inspect.isfunction):
            if value.__module__ == module.__name__ and not name.startswith("_") and hasattr(reference, name):
                found.append((name, value))
    return found


def test_every_op_has_a_twin() -> None:
    assert {name for name, _ in launchers()} == {
        "act_bwd", "linear_act_fwd", "linear_dgrad_act", "linear_wgrad", "mse",
        "linear_act_mse", "decoder_mse", "stack_score", "stack_encode",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "launcher"), launchers(), ids=[name for name, _ in launchers()])
def test_a_twin_has_its_launchers_signature(name: str, launcher: object) -> None:
    assert inspect.signature(launcher) == inspect.signature(getattr(reference, name))
