"""The budgets of compiled kernels. What compiles runs in children: the interpreter of the other tests excludes it."""

import json
from pathlib import Path

import pytest
from children import child
from fastae_emulator.accesses import accesses
from fastae_emulator.driver import TARGETS

from fastae.verify import budgets
from fastae.verify.models import VERIFY_PRECISIONS

ROOT = Path(__file__).parents[2]


@pytest.mark.thorough
def test_the_quick_part_holds_on_two_makers_gpus() -> None:
    lines = child("-m", "fastae.verify.compilation", "--quick", "--target", "sm_90,gfx942").splitlines()
    findings = [found for found in map(json.loads, lines) if "next" not in found]
    assert {found["part"] for found in findings} == {"compile"}
    assert {found["target"] for found in findings} == {"sm_90", "gfx942"}
    kernels = {found["op"] for found in findings}
    assert {"_linear_act_fwd_kernel", "_decoder_loss_kernel", "_linear_wgrad_kernel", "_stack_score_kernel"} <= kernels
    assert [found for found in findings if not found["ok"]] == []
    decoder = next(f for f in findings if f["op"] == "_decoder_loss_kernel" and f["target"] == "sm_90")
    assert "HGMMA" in decoder["figure"]
    assert " 0 spills" in decoder["figure"]
    assert "16] B, loads" in decoder["figure"]  # the copies


FAULTY = """
import triton
import triton.language as tl
from fastae_kernels.jit.tile_ops import operand

@triton.jit
def product(x_ptr, y_ptr, M, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = operand(tl.load(x_ptr + i[:, None] * SIZE + i[None, :], mask=i[:, None] < M, other=0.0))
    acc = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for r in range(M):
        w = operand(tl.load(x_ptr + r * SIZE + i[:, None] * SIZE + i[None, :], mask=i[:, None] < M, other=0.0))
        acc = tl.dot(x, w, acc)
    tl.store(y_ptr + 2 * (i[:, None] * SIZE + i[None, :]), acc)
"""

BROKEN = """
import os, sys, torch
sys.path.insert(0, os.getcwd())
import faulty
from fastae.verify.compilation import Compiled, finding, problems
from fastae_emulator.driver import on_target
from fastae_emulator.launches import Recorder

def budgets_of(size, warps, stages):
    with on_target("sm_80", recorder := Recorder()):
        x = torch.empty(size, size).bfloat16()
        faulty.product[(1,)](x, torch.empty(2 * size, size), size, SIZE=size, num_warps=warps, num_stages=stages)
    found = Compiled(recorder.launches[0], "sm_80", "bfloat16", "a model", ["a step"])
    print(finding(found, set()).ok, *sorted({budget for budget, _ in problems(found)}), sep=", ")

budgets_of(64, 4, 1)
budgets_of(128, 1, 2)
"""


@pytest.mark.thorough
def test_what_breaks_a_budget_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    one_stage, one_warp = child("-c", BROKEN).splitlines()
    assert one_stage == "False, asynchronous copies, wide stores"
    assert one_warp.startswith("False, ")
    assert "spills" in one_warp


PTX = """
.file 1 "{folder}" "kernel.py"
.loc 1 1 5
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r9;
$L__BB0_2:
.loc 1 2 5
	@%p1 ld.global.v4.b32 {{ %r1, %r2, %r3, %r4 }}, [ %rd1 + 0 ];
	ld.global.L1::evict_first.b16 {{ %rs1 }}, [ %rd1 + 0 ];
	@%p2 bra $L__BB0_2;
.loc 1 3 5
	st.global.v2.b64 [ %rd3 + 0 ], {{ %rd1, %rd2 }};
"""
GCN = """
.file 1 "{folder}" "kernel.py"
.LBB0_1:
.loc 1 1 5
	buffer_load_dwordx4 v[0:3], v1, s[0:3], 0 offen
	s_cbranch_scc1 .LBB0_1
.loc 1 3 5
	global_store_short v0, v1, s[0:1]
"""


def test_accesses_know_their_line_loop_and_width(tmp_path: Path) -> None:
    lines = ["a = operand(tl.load(a_ptrs, mask=m))", "t = tl.load(t_ptr + i)", "tl.store(y_ptr + i, y)"]
    (tmp_path / "kernel.py").write_text("\n".join(lines))
    found = accesses(PTX.format(folder=tmp_path))
    assert [(a.kind, a.width, a.looped, a.pointer, a.operand, a.where) for a in found] == [
        ("copy", 16, False, "a_ptrs", True, "kernel.py:1"),
        ("load", 16, True, "t_ptr", False, "kernel.py:2"),
        ("load", 2, True, "t_ptr", False, "kernel.py:2"),
        ("store", 16, False, "y_ptr", False, "kernel.py:3"),
    ]
    found = accesses(GCN.format(folder=tmp_path))
    assert [(a.kind, a.width, a.looped, a.pointer) for a in found] == [
        ("load", 16, True, "a_ptrs"),
        ("store", 2, False, "y_ptr"),
    ]


def test_a_kernel_compiled_in_another_checkout_has_the_lines_of_this_one(tmp_path: Path) -> None:
    here = ROOT / "kernels" / "fastae_kernels" / "jit"
    lines = (here / "losses.py").read_text().splitlines()
    line = next(n for n, text in enumerate(lines, 1) if "tl.store(dinput_ptr" in text)
    store = f".loc 1 {line} 5\n\tst.global.b32 [ %rd3 + 0 ], %r1;"
    (found,) = accesses(f'.file 1 "{tmp_path}/gone/losses.py"\n{store}', [here])
    assert (found.pointer, found.where) == ("dinput_ptr", f"losses.py:{line}")
    with pytest.raises(FileNotFoundError, match=r"gone/no\.py, the source of a compiled kernel, is gone; remove"):
        accesses(f'.file 1 "{tmp_path}/gone/no.py"\n.loc 1 1 5\n\tst.global.b32 [ %rd3 + 0 ], %r1;')


@pytest.mark.parametrize(
    ("target", "registers", "shared_bytes", "warps", "columns", "resident"),
    [
        ("sm_80", 32, 0, 4, 0, 64),
        ("sm_80", 33, 0, 4, 0, 48),
        ("sm_80", 128, 0, 8, 0, 16),
        ("sm_80", 255, 0, 8, 0, 8),
        ("sm_80", 64, 100 << 10, 8, 0, 8),
        ("sm_90", 64, 112 << 10, 8, 0, 16),
        ("sm_90", 16, 0, 1, 0, 32),
        ("sm_100", 64, 0, 8, 256, 16),
        ("gfx942", 128, 0, 4, 0, 16),
        ("gfx942", 512, 0, 4, 0, 4),
        ("gfx942", 64, 40 << 10, 4, 0, 4),
    ],
)
def test_resident_warps(
    target: str, registers: int, shared_bytes: int, warps: int, columns: int, resident: int
) -> None:
    assert budgets.resident_warps(target, registers, shared_bytes, warps, columns) == resident


def test_every_exception_says_where_and_why() -> None:
    assert len(set(budgets.EXEMPT)) == len(budgets.EXEMPT)
    for exempt in budgets.EXEMPT:
        assert len(exempt.reason.split()) > 5
        assert exempt.targets, f"{exempt.kernel}: an exception is for some GPUs"
        assert set(exempt.targets) <= set(TARGETS)
        assert set(exempt.precisions) <= set(VERIFY_PRECISIONS)
