"""bf16 products on CPUs with AMX, where oneDNN reads past the end of a first operand's rows; here on any CPU."""

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import layer, normal
from fastae_kernels import operands
from fastae_kernels.elementwise import LossKind
from fastae_kernels.onednn import ONEDNN
from fastae_kernels.ops import Below, Criterion, Layer, Ops
from fastae_kernels.reference import TORCH
from torch import Tensor

import fastae


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(operands, "amx", lambda: True)
    return


def padded(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows with NaN between them."""
    around = torch.full((rows, columns + 2), float("nan"), dtype=dtype)
    return around[:, :columns].copy_(normal(rows, columns, dtype=dtype))


# ---------------------------------------------------------------- the rule: which operand is copied


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("terms", [1, 3, 31, 33, 34, 35, 38, 42, 63, 101, 149, 250, 254, 255])
def test_a_view_that_onednn_reads_past_is_copied(terms: int) -> None:
    """33, 34, 35, 38, 42 and on to 254, and odd numbers: where it was seen, and a little beyond."""
    a = padded(35, terms)
    copy = operands.first_operand(a)
    assert copy is not a
    assert copy.is_contiguous()
    assert torch.equal(copy, a)
    again = operands.first_operand(padded(terms, 35).mT.contiguous().mT[:, 1:-1])  # the same seen transposed
    assert again.is_contiguous() or again.mT.is_contiguous()


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize(
    "a",
    [padded(35, 36), padded(35, 256), padded(35, 785), normal(35, 33, dtype=torch.bfloat16),
     normal(33, 35, dtype=torch.bfloat16).mT, padded(35, 33, torch.float32), padded(35, 33, torch.float16)],
    ids=["multiple of 4", "256 terms", "785 terms", "contiguous", "transposed", "fp32", "fp16"],
)  # fmt: skip
def test_what_onednn_reads_right_is_not_copied(a: Tensor) -> None:
    assert operands.first_operand(a) is a


@pytest.mark.parametrize(
    ("isa", "uses"),
    [(None, True), ("ALL", True), ("DEFAULT", True), ("AVX512_CORE_AMX", True), ("avx10_1_512_amx_fp16", True),
     ("AVX2", False), ("AVX512_CORE", False), ("AVX512_CORE_BF16", False), ("AVX10_1_512", False), ("SSE41", False)],
)  # fmt: skip
def test_amx_can_be_forbidden(isa: str | None, uses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
        if isa is not None and name.startswith("ONEDNN"):
            monkeypatch.setenv(name, isa)
    assert operands.amx.__wrapped__() is uses
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert operands.amx.__wrapped__() is False


# ---------------------------------------------------------------- every product of the twins keeps the rule


def past_the_end(a: Tensor) -> bool:
    """Whether oneDNN with AMX would read past the rows of this first operand of a bf16 product."""
    dense = a.is_contiguous() or a.mT.is_contiguous()
    return a.dtype == torch.bfloat16 and a.shape[-1] % 4 != 0 and a.shape[-1] < 255 and not dense


@pytest.fixture
def firsts(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The first operand of every product that ATen or oneDNN is asked for."""
    seen: list[Tensor] = []

    def watch(owner: object, name: str, place: int) -> None:
        function: Callable[..., Tensor] = getattr(owner, name)

        def call(*args: Tensor, **options: object) -> Tensor:
            seen.append(args[place])
            return function(*args, **options)

        monkeypatch.setattr(owner, name, call)

    watch(torch, "mm", 0)
    watch(torch, "addmm", 1)
    watch(torch.nn.functional, "linear", 0)

    class Pointwise:
        def __init__(self, op: object) -> None:
            self.op = op

        def __call__(self, x: Tensor, *args: object) -> Tensor:
            seen.append(x)
            return self.op(x, *args)

        def binary(self, x: Tensor, *args: object) -> Tensor:
            seen.append(x)
            return self.op.binary(x, *args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Pointwise(torch.ops.mkldnn._linear_pointwise))
    return seen


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("twin", [TORCH, ONEDNN], ids=["torch", "onednn"])
def test_no_twin_hands_over_rows_that_are_read_past(twin: Ops, firsts: list[Tensor]) -> None:
    M, N, K = 35, 37, 33
    x, dp = padded(M, K), padded(N, M).mT  # dp.t() is the first operand of a weight gradient
    _, w, b = layer("relu", M, N, K, torch.bfloat16)
    target = normal(M, N, dtype=torch.bfloat16)
    results = [
        *twin.linear_act_fwd(x, w, b, "relu", True), *twin.linear_act_fwd(x, w, None, "gelu", True),
        twin.linear_dgrad_act(padded(M, N), w, None, "identity"), *twin.linear_wgrad(dp, x, True),
        *twin.linear_wgrad(dp, x, True, 0.5), twin.stack_encode(x, [w], [b], ["relu"]),
    ]  # fmt: skip
    for kind in (LossKind("mse"), LossKind("huber", 0.5)):
        for activation in ("identity", "relu"):
            layer_of = Layer(w, b, activation)
            results += twin.linear_act_loss(x, layer_of, target, Criterion(kind), True)
            results += twin.decoder_loss(x, layer_of, target, Criterion(kind), Below(x, "relu"))
    assert len(firsts) >= 8
    assert not any(map(past_the_end, firsts))
    assert all(t.isfinite().all() for t in results)


@pytest.mark.usefixtures("amx")
def test_the_layer_hands_over_none_either(firsts: list[Tensor]) -> None:
    for activation in ("relu", "elu"):
        layer = fastae.LinearAct(33, 37, activation=activation, dtype=torch.bfloat16)
        layer(padded(35, 33)).sum().backward()
    assert len(firsts) >= 2
    assert not any(map(past_the_end, firsts))


# ---------------------------------------------------------------- one row's NaN is its own


def leaky(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as AMX makes them: a row of NaN or inf reaches the row before it, but in whole blocks."""
    mm, addmm, op = torch.mm, torch.addmm, torch.ops.mkldnn._linear_pointwise

    def spoil(y: Tensor, a: Tensor) -> Tensor:
        if a.dtype == torch.bfloat16 and a.shape[-1] % operands.BLOCK:
            odd = (~a.isfinite()).any(1)
            y[:-1][odd[1:]] = float("nan")
        return y

    class Pointwise:
        def __call__(self, x: Tensor, *args: object) -> Tensor:
            return spoil(op(x, *args), x)

        def binary(self, x: Tensor, *args: object) -> Tensor:
            return spoil(op.binary(x, *args), x)

    monkeypatch.setattr(torch, "mm", lambda a, b, **options: spoil(mm(a, b, **options), a))
    monkeypatch.setattr(torch, "addmm", lambda c, a, b, **options: spoil(addmm(c, a, b, **options), a))
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Pointwise())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("backend", "rows"), [("torch", 70), ("onednn", 70), ("onednn", 5000)])
def test_a_row_does_not_change_the_score_or_the_code_of_another(
    backend: str, rows: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN takes 5,000 rows in blocks, with a last weight that it has packed."""
    torch.manual_seed(0)
    ae = fastae.DenseAutoencoder([785, 200, 20], dtype=torch.bfloat16)
    x = normal(rows, 785, dtype=torch.bfloat16)
    clean = x.clone()
    x[40, 3] = value
    others = torch.arange(rows) != 40
    leaky(monkeypatch)
    with fastae.use_backend(backend), torch.no_grad():
        assert ae.score(x)[39].isnan(), "without the mend the row before is lost"
        monkeypatch.setattr(operands, "amx", lambda: True)
        score, code = ae.score(x), ae.encode(x)
        assert score[others].isfinite().all()
        assert code[others].isfinite().all()
        torch.testing.assert_close(score[others], ae.score(clean)[others], rtol=2e-2, atol=0)
        assert torch.equal(ae.score(clean), ae.score(clean))
