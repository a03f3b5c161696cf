"""`sum_partials`: many sums in one launch, into rows of another length too; and the training step it serves."""

import pytest
import torch
from accuracy import check
from cases import DTYPES, normal, short
from fastae_kernels.jit.backend import Jit
from fastae_kernels.jit.linear_act import linear_wgrad
from fastae_kernels.jit.sums import sum_partials
from fastae_kernels.reference import TORCH
from torch import Tensor

import fastae

# shapes of src and dst: a number, vectors, matrices; narrower, wider, of fewer rows; past a block; nothing at all
SHAPES = [
    ((5,), ()), ((300,), ()), ((3, 7), (7,)), ((1, 7), (16,)), ((2, 9, 16), (9, 16)), ((2, 16, 16), (9, 11)),
    ((1, 9, 11), (16, 16)), ((1, 70, 30), (72, 32)), ((3, 40, 30), (33, 30)), ((0, 5), (5,)), ((2, 5, 3), (5, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("src", "dst"), [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16)], ids=short)
def test_sums(src: torch.dtype, dst: torch.dtype, poisoned: None) -> None:
    srcs = [normal(*shape, dtype=src, seed=n) for n, (shape, _) in enumerate(SHAPES)]
    srcs.append(normal(1, 11, 9, dtype=src).transpose(1, 2))
    outs, twins = ([torch.zeros(shape, dtype=dst) for shape in [*(d for _, d in SHAPES), (16, 16)]] for _ in range(2))
    sum_partials(list(zip(srcs, outs, strict=True)))
    TORCH.sum_partials(list(zip(srcs, twins, strict=True)))
    for given, out, twin in zip(srcs, outs, twins, strict=True):
        truth = torch.zeros(out.shape, dtype=torch.float64)
        TORCH.sum_partials([(given.double(), truth)])
        check(out, twin, truth)


def test_what_is_filled_up_becomes_zero_and_rows_beyond_stay() -> None:
    dst = torch.full((4, 5), 7.0)
    sum_partials([(torch.ones(2, 3, 3), dst)])
    assert dst.tolist() == [[2.0, 2.0, 2.0, 0.0, 0.0]] * 3 + [[7.0] * 5]


def test_weight_gradients_that_wait() -> None:
    """Nothing is there before the sum; then it is, without the rows and columns that only fill up."""
    dp, x = normal(1100, 16), normal(1100, 24, seed=1)
    dp[:, 9:], pending = 0, []
    dw, db = torch.full((9, 21), torch.nan), torch.full((9,), torch.nan)
    linear_wgrad(dp, x, True, None, (dw, db), pending)
    assert dw.isnan().all()
    assert len(pending) == 2
    sum_partials(pending)
    whole_dw, whole_db = linear_wgrad(dp, x, True)
    assert torch.equal(dw, whole_dw[:9, :21])
    assert torch.equal(db, whole_db[:9])


# ---------------------------------------------------------------- in a training step


def train(backend: str, dtype: torch.dtype, **options: object) -> tuple[list[Tensor], list[Tensor]]:
    """Losses of three steps, the second on fewer rows, and the gradients of the last."""
    torch.manual_seed(0)
    ae = fastae.DenseAutoencoder([13, 7, 3], **options).to(dtype)
    x = torch.rand(24, 13, generator=torch.Generator().manual_seed(1)).to(dtype)
    with fastae.use_backend(backend):
        step = fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), lr=0.1), 24)
        losses = [step(x).clone(), step(x[:5], target=1 - x[:5]).clone(), step(x).clone()]
    if backend == "triton":
        assert step.static.parameters.padded, "these widths are filled up"
        assert all(w.stride(0) % 4 == 0 or w.stride(1) % 4 == 0 for w in step.static.parameters.weights)
    return losses, [p.grad for p in ae.parameters()]


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"output_activation": "sigmoid", "activation": "softplus"}])
def test_filled_up_rows_train_as_rows_do(options: dict[str, object]) -> None:
    mine, theirs = (train(backend, torch.float64, **options) for backend in ("triton", "torch"))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_one_launch_sums_what_a_step_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counting(pairs: list[tuple[Tensor, Tensor]]) -> None:
        made.append(len(pairs))
        sum_partials(pairs)

    monkeypatch.setattr(Jit, "sum_partials", staticmethod(counting))
    train("triton", torch.float32)
    assert made[::2] == [8, 8, 8], "the copies of the parameters, once for each step"
    assert len(made[1::2]) == 3, "and once what it leaves"
