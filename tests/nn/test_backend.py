"""Which implementation runs: set_backend, use_backend, FASTAE_BACKEND, and what is said where Triton cannot run."""

import os
import re
import subprocess
import sys

import pytest
import torch
from cases import layer
from fastae_kernels import onednn

import fastae
from fastae.nn import backend as _backend
from fastae.nn import library as _ops

BLOCKER = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] == "triton" else real(name, package)
"""
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
    fastae.linear_act(*args, "elu")
    with fastae.use_backend("triton"):
        assert fastae.get_backend() == "triton"
        fastae.linear_act(*args, "elu")
        with fastae.use_backend("torch"):
            fastae.linear_act(*args, "elu")
        assert fastae.get_backend() == "triton"
        fastae.set_backend("torch")  # inside the block: undone at its end
    assert fastae.get_backend() == "auto"
    fastae.set_backend("triton")
    fastae.linear_act(*args, "elu")
    assert seen == ["torch", "triton", "torch", "triton"]


def test_restored_after_an_exception() -> None:
    fastae.set_backend("torch")
    with pytest.raises(ZeroDivisionError), fastae.use_backend("triton"):
        _ = 1 / 0
    assert fastae.get_backend() == "torch"
    with pytest.raises(ValueError, match="set_backend"), fastae.use_backend("cuda"):
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


@pytest.mark.parametrize("name", ["auto", "torch", "onednn", "triton", None])
def test_environment_variable(name: str | None) -> None:
    assert output("import fastae; print(fastae.get_backend())", FASTAE_BACKEND=name) == (name or "auto")


def test_a_wrong_environment_variable() -> None:
    done = python("import fastae", FASTAE_BACKEND="tritom")
    assert done.returncode == 1
    text = "ValueError: FASTAE_BACKEND must be one of auto, torch, onednn, triton; got 'tritom'; did you mean 'triton'?"
    assert done.stderr.strip().splitlines()[-1] == text


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
        _backend.resolve(torch.empty(1, device="meta"))
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


# ---------------------------------------------------------------- where Triton cannot run


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, so Triton can run")
def test_triton_without_gpu_or_interpreter_says_what_to_do() -> None:
    done = python(f"import fastae, torch; fastae.set_backend('triton'); {CALL}")
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("RuntimeError: backend 'triton' cannot run here: Triton has no active driver")
    assert "set TRITON_INTERPRET=1 before Python starts" in message
    assert message.endswith("or call fastae.set_backend('auto')")


def test_triton_in_the_interpreter_in_a_fresh_process() -> None:
    code = f"import fastae, torch, sys; y = {CALL}; print('triton' in sys.modules, y.tolist()[0][0] > 3.9)"
    assert output(code, FASTAE_BACKEND="triton", TRITON_INTERPRET="1") == "True True"


def test_without_triton_installed() -> None:
    head = BLOCKER + "import fastae, torch\n"
    assert output(head + f"y = {CALL}; print(tuple(y.shape))") == "(2, 4)"
    backward = (
        "x = torch.ones(2, 3, requires_grad=True); fastae.mse_loss(x, x.detach() + 1).backward(); print(x.grad[0, 0])"
    )
    assert output(head + backward, FASTAE_BACKEND="auto").startswith("tensor(-0.3333")
    done = python(head + CALL, FASTAE_BACKEND="triton")
    assert done.returncode == 1
    text = (
        "RuntimeError: backend 'triton' cannot run here: Triton is not installed; pip install triton (Linux); or call"
    )
    assert done.stderr.strip().splitlines()[-1] == text + " fastae.set_backend('auto')"


@pytest.mark.parametrize("name", ["auto", "torch", "onednn"])
def test_a_cpu_never_imports_triton(name: str) -> None:
    code = f"""
import fastae, sys, torch
layer = fastae.LinearAct(3, 4)
fastae.mse_loss(layer(torch.ones(2, 3)), torch.ones(2, 4)).backward()
{CALL}
print([m for m in sys.modules if m.split(".")[0] == "triton"])
"""
    assert output(code, FASTAE_BACKEND=name) == "[]"
