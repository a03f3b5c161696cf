# ruff: noqa: E501 - the code of child processes is kept whole
"""Driver, launches and resources, on the library's kernels compiled for GPUs that are not there.

The interpreter of the other tests cannot be in the same process, so each test is a child that makes several checks.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def child(code: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_INTERPRET")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support")])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


NUMBERS = """
import sys, torch
from accuracy import check_all
from cases import layer, normal, results_of, saved, wide
from fastae_kernels.elementwise import LossKind
from fastae_kernels.jit.backend import TRITON
from fastae_kernels.ops import Criterion, Layer
from fastae_kernels.reference import TORCH
from fastae_emulator.driver import on_target
from fastae_emulator.launches import Executor

M, N, K = 70, 64, 128
def numbers(dtype):
    return *layer("gelu", M, N, K, dtype), normal(M, N, dtype=dtype, seed=5), normal(M, N, dtype=dtype, seed=6)

for target in sys.argv[1:]:
    executor = Executor()
    def three(op, *arguments):
        with on_target(target, executor):
            got = getattr(TRITON, op)(*arguments)
        check_all(*map(results_of, (got, getattr(TORCH, op)(*arguments), getattr(TORCH, op)(*map(wide, arguments)))))

    x, w, b, dy, t = numbers(torch.bfloat16)
    three("linear_act_fwd", x, w, b, "gelu", True)
    if target == "sm_80":
        three("act_bwd", dy[:1].expand(dy.shape), saved("gelu", M, N, torch.bfloat16), "gelu", True)
        three("linear_wgrad", dy, x, True)
    else:  # rows and columns that do not count, their number in memory
        reduction = {"sm_90": "mean", "sm_100": "sum"}[target]
        criterion = Criterion(LossKind("huber", 0.3), reduction, normal(M, seed=7).abs(), N - 3, torch.tensor(M - 9))
        three("linear_act_loss", x, Layer(w, b, "gelu"), t, criterion, True)
    x, w, b, dy, t = numbers(torch.float32)
    if target == "sm_90":
        three("linear_dgrad_act", dy, w, saved("gelu", M, K, torch.float32), "gelu")
    elif target == "sm_100":
        for kind in (LossKind("mse"), LossKind("mae"), LossKind("huber", 0.3)):
            three("loss", dy, t, kind, "mean", True)
    text = "".join(launch.kernel.text("ptx") for launch in executor.launches)
    used = [name for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "cp.async") if name in text]
    print(target, len(executor.launches), *used)

# Once dp, which the loop also sums, got two stages where wgmma with one group pending needs three: the copy for the
# next stage overwrote bytes that the product still read.
torch.set_float32_matmul_precision("high")
for dtype in (torch.bfloat16, torch.float32):
    dp, x = normal(256, 128, dtype=dtype), normal(256, 64, dtype=dtype, seed=1)
    with on_target("sm_90", Executor()):
        got = TRITON.linear_wgrad(dp, x, True)
    dw, db = TORCH.linear_wgrad(dp, x, True)
    tf32 = [(t.float().view(torch.int32) & -8192).view(torch.float32) for t in (dp, x)]
    same = dw if dtype == torch.bfloat16 else tf32[0].t() @ tf32[1], db
    check_all(got, same, TORCH.linear_wgrad(dp.double(), x.double(), True))
"""


def test_every_op_as_compiled() -> None:
    """Compiled kernels hold to the three-way rule, and use the tensor cores of their target; also a bias gradient beside
    wgmma. Each op on one target; `fastae verify --execution` has each on all."""
    wanted = {"sm_80": (4, "mma.sync"), "sm_90": (3, "wgmma.mma_async"), "sm_100": (8, "tcgen05.mma")}
    for line in child(NUMBERS, *wanted).splitlines():
        target, launches, *instructions = line.split()
        number, used = wanted.pop(target)
        assert int(launches) == number
        assert {used, "cp.async"} <= set(instructions)
    assert not wanted


RECORD = """
import os, sys
import fastae_emulator.ptx
print([name for name in ("torch", "triton", "fastae", "fastae_kernels") if name in sys.modules])
sys.modules["triton"] = None
try:
    import fastae_emulator.driver
except ImportError as error:
    print(error)
del sys.modules["triton"]
import torch
from fastae_kernels.jit import linear_act
from fastae_emulator.driver import TARGETS, on_target
from fastae_emulator.launches import Executor, Recorder, execute
import triton

torch.manual_seed(0)
x, w, b = (torch.randn(*s).bfloat16() for s in ((64, 128), (128, 128), (128,)))
seen = {}
for target in TARGETS:
    recorder = Recorder()
    with on_target(target, recorder):
        y, _ = linear_act.linear_act_fwd(x, w, b, "relu")
        y, _ = linear_act.linear_act_fwd(x[:0], w, b, "relu")
    (launch,) = recorder.launches
    seen[target] = launch
    assert launch.name == "_linear_act_fwd_kernel"
    assert set(launch.tensors) == {"x_ptr", "w_ptr", "b_ptr", "y_ptr"}, launch.tensors
    assert launch.tensors["x_ptr"] is x
    assert launch.constants["BLOCK_R"] in (32, 64), launch.constants
    assert [a.value for a in launch.arguments if a.name == "M"] == [64]
    assert launch.num_warps in (4, 8) and launch.shared_bytes > 1024
    r = launch.kernel.resources
    assert r is launch.kernel.resources
    assert 16 <= r.registers <= 512 and not r.spills and r.local_bytes == 0, (target, r)
    assert r.shared_bytes == launch.shared_bytes
    assert any(width == 16 for width in r.load_widths), (target, r)
    print(target, *r.tensor_core)
assert triton.runtime.driver._active is None

x.requires_grad_(True)
executor = Executor(count=True, sample=lambda launch: [0])
with on_target("sm_80", executor):
    y, _ = linear_act.linear_act_fwd(x, w, b, "relu")
(counters,) = executor.counters
assert counters.blocks == 1 and counters.blocks_in_grid == 1, counters
traffic = {name.split()[0]: t for name, t in counters.tensors.items()}
assert traffic["x_ptr"].bytes_read == 64 * 128 * 2 and traffic["y_ptr"].bytes_written == 64 * 128 * 2, traffic
assert traffic["w_ptr"].bytes_read == 128 * 128 * 2 and traffic["b_ptr"].bytes_read == 256, traffic
assert counters.tensor_core_flops == 2 * 64 * 128 * 128, counters
assert counters.sector_use == 1.0 and counters.load_widths[16] > 0, counters
# Both round a sum of 128 products in fp32 once, but add in another order: neighbours in bf16 at most.
torch.testing.assert_close(y, torch.relu(torch.nn.functional.linear(x, w, b)), rtol=2**-7, atol=1e-3)
for wrong in (lambda: execute(seen["gfx942"]), lambda: on_target("sm_70", None).__enter__()):
    try:
        wrong()
    except ValueError as error:
        print(error)
os.environ["TRITON_INTERPRET"] = "1"
try:
    on_target("sm_90", None).__enter__()
except RuntimeError as error:
    print(error)
print("fastae.verify" in sys.modules)
import fastae
print("fastae.verify" in sys.modules)
"""


def test_a_launch_is_recorded_for_every_target() -> None:
    """And what the driver needs: Triton, which the machine that executes PTX does without, and no interpreter."""
    machine, missing, *lines = child(RECORD).splitlines()
    assert machine == "[]"
    assert missing.startswith("fastae_emulator.driver needs Triton")
    names = {line.split()[0]: line.split()[1:] for line in lines[:4]}
    assert any(name.startswith("HMMA.16816.F32.BF16") for name in names["sm_80"])
    assert any(name.startswith("HGMMA.64x") for name in names["sm_90"])
    assert any(name.startswith("UTCHMMA") for name in names["sm_100"])
    assert any(name.startswith("v_mfma_f32_") and "bf16" in name for name in names["gfx942"])
    assert lines[4] == "_linear_act_fwd_kernel: gfx942 has no PTX; only kernels for NVIDIA GPUs can be executed"
    assert lines[5] == "target must be one of sm_80, sm_90, sm_100, gfx942; got 'sm_70'"
    assert lines[6].startswith("on_target: TRITON_INTERPRET is set, nothing would be compiled")
    assert lines[7:] == ["False"] * 2, "import fastae brings what only `fastae verify` needs"


FAULTS = """
import os, torch, triton, triton.language as tl
from fastae_emulator.driver import on_target
from fastae_emulator.launches import Executor
from fastae_emulator.ptx import PtxError

path = os.environ["KERNELS"]
import sys; sys.path.insert(0, path)
import faulty

def attempt(run):
    try:
        with on_target("sm_80", Executor()):
            run()
    except PtxError as error:
        print(str(error).split(";")[0])
    else:
        print("fine")

x, y = torch.arange(64.0), torch.zeros(64)
attempt(lambda: faulty.double[(1,)](x, y, 64, BLOCK=64))
assert torch.equal(y, 2 * x)
attempt(lambda: faulty.double[(1,)](x, y, 65, BLOCK=128))
attempt(lambda: faulty.double[(1,)](x.view(8, 8)[:, :4], y, 32, BLOCK=32))
attempt(lambda: faulty.double[(1,)](x, y[:31], 32, BLOCK=32))
attempt(lambda: faulty.double[(1,)](x[:0], y, 1, BLOCK=32))
attempt(lambda: faulty.double[(2,)](x[16:48], y, 32, BLOCK=32))
"""
FAULTY = """
import triton
import triton.language as tl

@triton.jit
def double(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    tl.store(y_ptr + offs, 2 * x, mask=mask)
"""


def test_faults_name_kernel_line_and_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("KERNELS", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert child(FAULTS).splitlines() == [
        "fine",
        "double, faulty.py:9: reads 4 bytes at byte 256 of x_ptr (argument 0), which has 256",
        "double, faulty.py:9: reads 4 bytes between the elements: at byte 16 of x_ptr (argument 0)",
        "double, faulty.py:10: writes 4 bytes between the elements: at byte 124 of y_ptr (argument 1)",
        "double, faulty.py:9: reads 4 bytes between the elements: at byte 0 of x_ptr (argument 0)",
        "fine",
    ]
