"""Lint rules, each broken and kept; and this library's own sources."""

import subprocess
import sys
from pathlib import Path

import pytest
from fastae_emulator import lint

from fastae.verify import source

HEADER = "import triton\nimport triton.language as tl\nfrom torch import Tensor\n"


@pytest.fixture
def rules(tmp_path: Path) -> object:
    """Function that lints a piece of source: the rules it breaks, with their lines."""

    def read(source: str) -> list[tuple[str, str]]:
        file = tmp_path / "kernels.py"
        file.write_text(HEADER + source)
        return [(p.rule, p.where) for p in lint.lint_kernels([file])]

    return read


def kernel(body: str, parameters: str = "x_ptr, y_ptr, M, N, stride_xm, alpha, BLOCK: tl.constexpr") -> str:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return f"@triton.jit\ndef _k_kernel({parameters}):\n{lines}\n"


CLEAN = """pid = tl.program_id(0)
offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
x = tl.load(x_ptr + offs * stride_xm, mask=offs < M, other=0.0)
tl.store(y_ptr + offs, x * tl.cast(alpha, tl.float32), mask=offs < M)"""


def test_a_clean_kernel(rules) -> None:
    assert rules(kernel(CLEAN)) == []


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        ("other", ", other=0.0", ""),
        ("other", "mask=offs < M, other=0.0", "offs < M, 0.0"),
        ("grid", "program_id(0)", "program_id(1)"),
        ("grid", "program_id(0)", "program_id(axis=2)"),
        ("block-pointer", "tl.load(x_ptr + offs * stride_xm", "tl.load(tl.make_block_ptr(x_ptr)"),
        ("int32", "pid.to(tl.int64)", "pid"),
        ("int32", "offs * stride_xm", "(tl.arange(0, BLOCK) * stride_xm).to(tl.int64)"),
        ("int32", "y_ptr + offs", "y_ptr + (offs + M * N)"),
        ("int32", "y_ptr + offs", "y_ptr + (offs + BLOCK * stride_xm)"),
        ("scalar", "tl.cast(alpha, tl.float32)", "alpha"),
        ("scalar", "tl.cast(alpha, tl.float32)", "(1.0 / alpha)"),
        ("scalar", "x * tl.cast(alpha, tl.float32)", "tl.where(x > 0, x, alpha * x)"),
    ],
)
def test_each_rule_broken(rules, rule: str, old: str, new: str) -> None:
    assert old in CLEAN
    found = rules(kernel(CLEAN.replace(old, new)))
    assert {name for name, _ in found} == {rule}
    assert all(where.startswith("kernels.py:") for _, where in found)


@pytest.mark.parametrize(
    "body",
    [
        "rows = tl.arange(0, BLOCK)\nx = tl.load(x_ptr + rows.to(tl.int64)[:, None] * N)",
        "for r in range(0, M, BLOCK):\n    x = tl.load(x_ptr + tl.full((), r, tl.int64) * stride_xm)",
        "step = tl.full((), BLOCK, tl.int64) * stride_xm\nx_ptr += step\nx = tl.load(x_ptr)",
        "tiles = tl.cdiv(M, BLOCK) * tl.cdiv(N, BLOCK)\ntl.store(y_ptr + tl.program_id(0) // tiles, 0.0)",
        "count = M * N\ntl.store(y_ptr, 1.0 / count)",  # a product, and no part of an address
        "offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\nx = tl.load(x_ptr + offs)",
    ],
)
def test_what_is_allowed(rules, body: str) -> None:
    assert rules(kernel(body)) == []


def test_through_helpers(rules) -> None:
    """The arguments of a kernel's call decide, not the helper alone; the report names both."""
    helper = "@triton.jit\ndef rows(ptr, offs, stride):\n    return tl.load(ptr + offs * stride)\n"
    assert rules(helper + kernel("x = rows(x_ptr, tl.arange(0, BLOCK).to(tl.int64), stride_xm)")) == []
    (found,) = rules(helper + kernel("x = rows(x_ptr, tl.arange(0, BLOCK), stride_xm)"))
    assert found == ("int32", "kernels.py:6")
    pair = "@triton.jit\ndef pair(pid):\n    return pid.to(tl.int64), pid\n"
    for name, wrong in (("a", 0), ("b", 1)):
        body = f"a, b = pair(tl.program_id(0))\nx = tl.load(x_ptr + {name} * stride_xm)"
        assert len(rules(pair + kernel(body))) == wrong


def test_branches_and_loops(rules) -> None:
    """The worst kind of a name counts: from one branch of two, from a later pass of a loop."""
    branch = (
        "offs = tl.arange(0, BLOCK).to(tl.int64)\nif {}:\n    offs = tl.arange(0, BLOCK)\nx = tl.load(x_ptr + offs * N)"
    )
    assert [rule for rule, _ in rules(kernel(branch.format("M > N")))] == ["int32"]
    loop = "offs = tl.full((), 0, tl.int64)\nfor r in range(4):\n    x = tl.load(x_ptr + offs * N)\n    offs = r"
    assert [rule for rule, _ in rules(kernel(loop))] == ["int32"]


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ("_k_kernel[n,](x)", None),
        ("_k_kernel[(n, 1)](x)", None),
        ("_k_kernel[(n, m)](x)", "grid"),
        ("return x.sum().item()", "sync"),
        ("return x.cpu()", "sync"),
        ("torch.cuda.synchronize()", "sync"),
        ("return torch.equal(x, x)", "sync"),
        ("return x.item() if x.device.type == 'cpu' else x", None),
        ("if x.device.type == 'cpu':\n        return x.item()\n    return x.item()", "sync"),
    ],
)
def test_launchers(rules, body: str, rule: str | None) -> None:
    found = rules(f"def launcher(x: Tensor, n: int, m: int):\n    {body}\n")
    assert [name for name, _ in found] == [rule] * (rule is not None)


# ---------------------------------------------------------------- this library


def test_our_kernels() -> None:
    assert list(map(str, lint.lint_kernels(source.kernel_files()))) == []


def test_our_autograd_code() -> None:
    assert {"linear_act.py", "losses.py", "linear_act_loss.py", "library.py"} <= {f.name for f in source.host_files()}
    assert list(map(str, lint.lint_host(source.host_files()))) == []


def test_there_is_something_to_read() -> None:
    """Files with kernels and with helpers are both read."""
    found = {f.node.name for f in lint.functions(source.kernel_files()) if f.is_jit}
    assert {"_linear_act_fwd_kernel", "_loss_kernel", "_stack_score_kernel", "dot_tile", "relu_fwd"} <= found


def test_as_a_command(tmp_path: Path) -> None:
    file = tmp_path / "kernels.py"
    file.write_text(HEADER + kernel(CLEAN.replace(", other=0.0", "")))
    done = subprocess.run(
        [sys.executable, "-m", "fastae_emulator.lint", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == "kernels.py:8, _k_kernel: a masked load without other=: a GPU leaves garbage there [other]\n"
