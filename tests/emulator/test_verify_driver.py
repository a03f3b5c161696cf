# ruff: noqa: E501 - the code of child processes is kept whole
"""The library's kernels as compiled for GPUs that are not there. The interpreter of the other tests cannot be in the same
process, so each test is a child of its own that makes several checks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def child(code: str, *arguments: str, fails: bool = False) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_INTERPRET")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support")])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


NUMBERS = """
import sys, torch
from accuracy import check, check_all
from cases import layer, normal, saved
from fastae_kernels import reference
from fastae_kernels.jit import linear_act
from fastae_kernels.jit import losses as mse_loss
from fastae_emulator.driver import Executor, on_target

target, *names = sys.argv[1:]
executor = Executor()
def three(ours, theirs, *arguments):
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    with on_target(target, executor):
        got = ours(*arguments)
    check_all(got, theirs(*arguments), theirs(*wide))

for name in names:
    dtype = getattr(torch, name)
    for activation, (M, N, K) in (("relu", (37, 33, 45)), ("gelu", (70, 64, 128))):
        x, w, b = layer(activation, M, N, K, dtype)
        three(linear_act.linear_act_fwd, reference.linear_act_fwd, x, w, b, activation, True)
        s = saved(activation, M, N, dtype)
        dy = normal(M, N, dtype=dtype, seed=5)
        three(linear_act.act_bwd, reference.act_bwd, dy, s, activation, True)
        three(linear_act.act_bwd, reference.act_bwd, dy[:1].expand(dy.shape), s, activation, True)
        below = saved(activation, M, K, dtype)
        three(lambda *a: (linear_act.linear_dgrad_act(*a),), lambda *a: (reference.linear_dgrad_act(*a),), dy, w, below, activation)
        three(linear_act.linear_wgrad, reference.linear_wgrad, dy, x, True)
        three(mse_loss.mse, reference.mse, dy, normal(M, N, dtype=dtype, seed=6), "mean", True)
text = "".join(launch.kernel.text("ptx") for launch in executor.launches)
print(len(executor.launches), *[name for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "cp.async") if name in text])
"""


@pytest.mark.parametrize(
    ("target", "used"), [("sm_80", "mma.sync"), ("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma")]
)
def test_every_op_as_compiled(target: str, used: str) -> None:
    """The three-way rule of `accuracy.py`, for what the compiler made of the kernels."""
    launches, *instructions = child(NUMBERS, target, "bfloat16", "float32").split()
    assert int(launches) >= 2 * 2 * 6
    assert {used, "cp.async"} <= set(instructions)


BIAS_GRADIENT = """
import torch
from accuracy import check_all
from fastae_kernels import reference
from fastae_kernels.jit import linear_act
from fastae_emulator.driver import Executor, on_target

def tf32(t):
    return (t.view(torch.int32) & -8192).view(torch.float32)

for dtype in (torch.bfloat16, torch.float32):
    torch.manual_seed(0)
    dp, x = torch.randn(256, 128).to(dtype), torch.randn(256, 64).to(dtype)
    torch.set_float32_matmul_precision("high")
    with on_target("sm_90", Executor()):
        got = linear_act.linear_wgrad(dp, x, True)
    dw, db = reference.linear_wgrad(dp, x, True)
    same = (dw if dtype == torch.bfloat16 else tf32(dp).t() @ tf32(x), db)
    check_all(got, same, reference.linear_wgrad(dp.double(), x.double(), True))
"""


def test_bias_gradient_beside_wgmma() -> None:
    """dp, which the loop also sums, once got two stages where wgmma with one group pending needs three: the copy for the
    next stage overwrote what the product still read."""
    child(BIAS_GRADIENT)


RECORD = """
import torch
from fastae_kernels.jit import linear_act
from fastae_emulator.driver import Executor, Recorder, execute, on_target, TARGETS
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
    assert launch.arguments[5].name == "M" and launch.arguments[5].value == 64
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
"""


def test_a_launch_is_recorded_for_every_target() -> None:
    lines = child(RECORD).splitlines()
    names = {line.split()[0]: line.split()[1:] for line in lines[:4]}
    assert any(name.startswith("HMMA.16816.F32.BF16") for name in names["sm_80"])
    assert any(name.startswith("HGMMA.64x") for name in names["sm_90"])
    assert any(name.startswith("UTCHMMA") for name in names["sm_100"])
    assert any(name.startswith("v_mfma_f32_") and "bf16" in name for name in names["gfx942"])
    assert lines[4] == "_linear_act_fwd_kernel: gfx942 has no PTX; only kernels for NVIDIA GPUs can be executed"
    assert lines[5] == "target must be one of sm_80, sm_90, sm_100, gfx942; got 'sm_70'"


FAULTS = """
import os, torch, triton, triton.language as tl
from fastae_emulator.driver import Executor, on_target
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


def test_the_interpreter_is_refused() -> None:
    code = """
import os
os.environ["TRITON_INTERPRET"] = "1"
from fastae_emulator.driver import Recorder, on_target
with on_target("sm_90", Recorder()):
    pass
"""
    assert "RuntimeError: on_target: TRITON_INTERPRET is set, nothing would be compiled" in child(code, fails=True)


def test_without_triton_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['triton'] = None; import fastae_emulator.driver"
    assert "fastae_emulator.driver needs Triton" in child(code, fails=True)


def test_the_machine_needs_neither_torch_nor_triton() -> None:
    code = """
import sys
class Fastae:
    __path__ = [sys.argv[1]]
package = type(sys)("fastae"); package.__path__ = [sys.argv[1]]; sys.modules["fastae"] = package
import fastae_emulator.ptx
print([name for name in ("torch", "triton") if name in sys.modules])
"""
    assert child(code, str(ROOT / "fastae")).strip() == "[]"


def test_import_fastae_leaves_verify_alone() -> None:
    assert child("import sys, fastae; print('fastae.verify' in sys.modules)").strip() == "False"
