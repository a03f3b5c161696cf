"""Which implementation runs: set_backend, use_backend, FASTAE_BACKEND, and what is said where Triton cannot run."""

import importlib.util
import os
import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from cases import layer, results_of
from fastae_kernels import onednn
from fastae_kernels.elementwise import MSE
from fastae_kernels.jit.backend import TRITON
from fastae_kernels.onednn import ONEDNN
from fastae_kernels.ops import Criterion, Layer
from fastae_kernels.reference import TORCH

import fastae
from fastae.nn import backend as _backend
from fastae.nn import library as _ops

CALL = "fastae.linear_act(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4), 'gelu')"


def python(code: str, **env: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTAE_BACKEND")}
    environment |= {k: v for k, v in env.items() if v is not None}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def output(code: str, **env: str | None) -> str:
    done = python(code, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def _leave_as_it_was() -> object:
    before = fastae.get_backend()
    yield
    fastae.set_backend(before)


def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    op = _ops.linear_act_fwd
    monkeypatch.setattr(_ops, "linear_act_fwd", lambda *a: (seen.append(a[-1]), op(*a))[1])
    return seen


# ---------------------------------------------------------------- choosing


def test_set_use_and_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, args = ran(monkeypatch), layer("elu", 2, 3, 4, torch.float32)
    fastae.set_backend("auto")
    fastae.linear_act(*args, "elu")  # PyTorch's own ops
    with fastae.use_backend("triton"):
        assert fastae.get_backend() == "triton"
        fastae.linear_act(*args, "elu")
        with fastae.use_backend("onednn"):
            fastae.linear_act(*args, "elu")
        assert fastae.get_backend() == "triton"
        fastae.set_backend("torch")  # inside the block: undone at its end
    assert fastae.get_backend() == "auto"
    fastae.set_backend("triton")
    fastae.linear_act(*args, "elu")
    assert seen == ["triton", "onednn", "triton"]


def test_restored_after_an_exception() -> None:
    fastae.set_backend("torch")
    with pytest.raises(ZeroDivisionError), fastae.use_backend("triton"):
        _ = 1 / 0
    assert fastae.get_backend() == "torch"
    with pytest.raises(ValueError, match="use_backend"), fastae.use_backend("cuda"):
        pytest.fail("the block of a wrong name must not run")
    assert fastae.get_backend() == "torch"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tritn", "; did you mean 'triton'?"),
        ("Torch", "; did you mean 'torch'?"),
        ("zzz", ""),
        (None, "; did you mean 'onednn'?"),
    ],
)
def test_a_wrong_name(name: str, hint: str) -> None:
    text = f"set_backend: name must be one of auto, torch, onednn, triton; got {name!r}{hint}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        fastae.set_backend(name)


def imported(monkeypatch: pytest.MonkeyPatch, value: str | None) -> ModuleType:
    """The module as a process with that environment variable has it."""
    monkeypatch.delenv("FASTAE_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTAE_BACKEND", value)
    spec = importlib.util.spec_from_file_location("another_backend", _backend.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["auto", "torch", "onednn", "triton", None])
def test_environment_variable(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert imported(monkeypatch, name).get_backend() == (name or "auto")


def test_a_wrong_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "FASTAE_BACKEND must be one of auto, torch, onednn, triton; got 'tritom'; did you mean 'triton'?"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        imported(monkeypatch, "tritom").get_backend()


def test_auto_on_a_gpu_goes_by_dtype_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: a tensor that says it lies on one is enough, since the choice looks at nothing else."""

    class Claims:
        device = torch.device("cuda")

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    monkeypatch.setattr(_backend, "_why_not_triton", lambda x: None)
    fastae.set_backend("auto")
    for dtype in (torch.float16, torch.bfloat16):
        assert _backend.resolve(Claims(dtype), 2048) == "triton"
        assert _backend.resolve(Claims(dtype), 2049) == "torch"
        assert _backend.decide(Claims(dtype), 2049, 0, loss=True) == ("triton", _backend.LOSS_PAYS)
    for dtype in (torch.float32, torch.float64):
        assert _backend.resolve(Claims(dtype), 16) == "torch"
        assert _backend.resolve(Claims(dtype), 16, loss=True) == "torch"
    monkeypatch.setattr(_backend, "_why_not_triton", lambda x: "some reason")
    assert _backend.resolve(Claims(torch.float16), 16) == "torch"
    fastae.set_backend("triton")
    with pytest.raises(
        RuntimeError, match=r"^backend 'triton' cannot run here: some reason; or call fastae\.set_backend"
    ):
        _backend.resolve(Claims(torch.float16), 16)


def test_onednn_is_for_cpu_tensors_and_builds_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fastae.set_backend("onednn")
    with pytest.raises(
        RuntimeError, match=r"^backend 'onednn' cannot run here: oneDNN runs on CPU tensors, this one is on"
    ):
        _backend.resolve(_backend.DeviceSpec(torch.float32, torch.device("cuda")))
    monkeypatch.setattr(onednn, "available", lambda: False)
    with pytest.raises(
        RuntimeError, match=r"no oneDNN \(torch.backends.mkldnn\); or call fastae.set_backend\('auto'\)"
    ):
        _backend.resolve(torch.empty(1))


def test_auto_on_a_cpu_goes_by_dtype_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    fastae.set_backend("auto")
    monkeypatch.setattr(onednn, "_fp32_pays", lambda: True)
    monkeypatch.setattr(onednn, "_has_bf16", lambda: True)
    monkeypatch.setattr(onednn, "_full_width", lambda: True)

    def chosen(dtype: torch.dtype, multiply_adds: int) -> str:
        return _backend.resolve(torch.empty(1, dtype=dtype), 16, multiply_adds)

    assert [chosen(torch.float32, n) for n in (0, (1 << 23) - 1, 1 << 23)] == ["torch", "torch", "onednn"]
    monkeypatch.setattr(onednn, "_full_width", lambda: False)
    assert [chosen(torch.float32, n) for n in (1 << 23, 1 << 24)] == ["torch", "onednn"]
    assert [chosen(torch.bfloat16, n) for n in (0, 1)] == ["torch", "onednn"]
    assert {chosen(dtype, 1 << 30) for dtype in (torch.float16, torch.float64)} == {"torch"}
    monkeypatch.setattr(onednn, "available", lambda: False)
    assert {chosen(dtype, 1 << 30) for dtype in (torch.float32, torch.bfloat16)} == {"torch"}


@pytest.mark.parametrize(
    ("vendor", "capability", "pays"),
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False)],
)
def test_where_onednn_multiplies_fp32(
    monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, pays: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(onednn, "_cpuinfo", lambda: f"vendor_id : {vendor}")
    assert onednn._fp32_pays.__wrapped__() == pays


@pytest.mark.parametrize(("flags", "full"), [("avx512_vnni avx512_bf16", False), ("avx512_vnni avx_vnni", True)])
def test_where_onednn_makes_fp32_weight_gradients(monkeypatch: pytest.MonkeyPatch, flags: str, full: bool) -> None:
    monkeypatch.setattr(onednn, "_cpuinfo", lambda: f"vendor_id : AuthenticAMD\nflags : {flags}")
    assert onednn._full_width.__wrapped__() == full


def test_auto_decides_each_op_by_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code has the backend "auto": each call goes by in_features and by the multiply-adds of its batch."""
    M, N, K = 2, 3, 5
    x, w, b = layer("relu", M, N, K, torch.float32)
    dp, asked = torch.ones(M, N), []

    def resolve(x: torch.Tensor, width: int, multiply_adds: int, loss: bool) -> str:
        asked.append((x.shape, width, multiply_adds, loss))
        return "torch"

    monkeypatch.setattr(_backend, "resolve", resolve)
    auto = _backend.ops("auto")
    for op, args, product in (
        ("linear_act_fwd", (x, w, b, "relu"), (K, M * N * K, False)),
        ("linear_dgrad_act", (dp, w, None, "identity"), (K, M * N * K, False)),
        ("linear_wgrad", (dp, x, True), (K, M * N * K, False)),
        ("linear_act_loss", (x, Layer(w, b, "relu"), dp, Criterion()), (K, M * N * K, True)),
        ("act_bwd", (dp, dp, "relu"), (0, 0, False)),
        ("loss", (dp, dp, MSE, "mean"), (0, 0, False)),
    ):
        found, wanted = (getattr(ops, op)(*args) for ops in (auto, TORCH))
        for mine, theirs in zip(results_of(found), results_of(wanted), strict=True):
            assert mine is theirs is None or torch.equal(mine, theirs)
        assert asked.pop() == (args[0].shape, *product)
    assert not asked


def test_the_implementations_by_name() -> None:
    assert [_backend.ops(name) for name in ("torch", "onednn", "triton")] == [TORCH, ONEDNN, TRITON]


# ---------------------------------------------------------------- where Triton cannot run


def test_triton_in_the_interpreter_in_a_fresh_process() -> None:
    code = f"import fastae, torch, sys; y = {CALL}; print('triton' in sys.modules, y.tolist()[0][0] > 3.9)"
    assert output(code, FASTAE_BACKEND="triton", TRITON_INTERPRET="1") == "True True"


def test_a_cpu_never_imports_triton_nor_needs_it() -> None:
    """All works by the twins; without a GPU, or without Triton installed, that backend alone says what to do."""
    code = f"""
import fastae, importlib.util, sys, torch
assert fastae.get_backend() == "onednn", "what FASTAE_BACKEND says"
for name in ("onednn", "auto", "torch"):
    fastae.set_backend(name)
    layer = fastae.LinearAct(3, 4)
    fastae.mse_loss(layer(torch.ones(2, 3)), torch.ones(2, 4)).backward()
    fastae.linear_act_mse(torch.ones(2, 3), layer.weight, layer.bias, torch.ones(2, 4)).backward()
    {CALL}
print([m for m in sys.modules if m.split(".")[0] == "triton"])
fastae.set_backend("triton")
try:
    print({CALL}.shape)
except RuntimeError as error:
    print(error)
real = importlib.util.find_spec
fastae.nn.backend.find_spec = lambda name, *package: None if name == "triton" else real(name, *package)
fastae.set_backend("auto")
print(tuple({CALL}.shape))
fastae.set_backend("triton")
{CALL}
"""
    done = python(code, FASTAE_BACKEND="onednn")
    assert done.returncode == 1
    imported, message, shape = done.stdout.splitlines()
    assert (imported, shape) == ("[]", "(2, 4)")
    if not torch.cuda.is_available():
        assert message.startswith("backend 'triton' cannot run here: Triton has no active driver")
        assert "set TRITON_INTERPRET=1 before Python starts" in message
        assert message.endswith("or call fastae.set_backend('auto')")
    text = (
        "RuntimeError: backend 'triton' cannot run here: Triton is not installed; pip install triton (Linux); or call"
    )
    assert done.stderr.strip().splitlines()[-1] == text + " fastae.set_backend('auto')"
