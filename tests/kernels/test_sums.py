"""`sum_together`: many sums in one launch, into rows of another length too; and the training step it serves."""

import pytest
import torch
from accuracy import check
from cases import DTYPES, normal
from fastae_kernels import reference
from fastae_kernels.jit import linear_act_loss as linear_act_mse
from fastae_kernels.jit.linear_act import linear_wgrad
from fastae_kernels.jit.sums import sum_together
from torch import Tensor

import fastae
from fastae.engine import schedule as _schedule

# shapes of src and dst: a number, vectors, matrices; narrower, wider, of fewer rows; past a block; nothing at all
SHAPES = [
    ((5,), ()), ((300,), ()), ((3, 7), (7,)), ((1, 7), (16,)), ((2, 9, 16), (9, 16)), ((2, 16, 16), (9, 11)),
    ((1, 9, 11), (16, 16)), ((1, 70, 30), (72, 32)), ((3, 40, 30), (33, 30)), ((0, 5), (5,)), ((2, 5, 3), (5, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("src", "dst"), [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16)], ids=str)
def test_sums(src: torch.dtype, dst: torch.dtype, poisoned: None) -> None:
    srcs = [normal(*shape, dtype=src, seed=n) for n, (shape, _) in enumerate(SHAPES)]
    srcs.append(normal(1, 11, 9, dtype=src).transpose(1, 2))
    outs, twins = ([torch.zeros(shape, dtype=dst) for shape in [*(d for _, d in SHAPES), (16, 16)]] for _ in range(2))
    sum_together(list(zip(srcs, outs, strict=True)))
    reference.sum_together(list(zip(srcs, twins, strict=True)))
    for given, out, twin in zip(srcs, outs, twins, strict=True):
        truth = torch.zeros(out.shape, dtype=torch.float64)
        reference.sum_together([(given.double(), truth)])
        check(out, twin, truth)


def test_what_is_filled_up_becomes_zero_and_rows_beyond_stay() -> None:
    dst = torch.full((4, 5), 7.0)
    sum_together([(torch.ones(2, 3, 3), dst)])
    assert dst.tolist() == [[2.0, 2.0, 2.0, 0.0, 0.0]] * 3 + [[7.0] * 5]


@pytest.mark.parametrize("backend_name", ["torch", "triton"])
@pytest.mark.parametrize("activation", ["sigmoid", "gelu", "relu"])
def test_columns_that_do_not_count(activation: str, backend_name: str) -> None:
    """Filled up to more columns, with weights of 0 and any target there, loss and gradients are those of the others."""
    implementation = reference if backend_name == "torch" else linear_act_mse
    x, w, b, t = normal(9, 12).double(), normal(7, 12).double(), normal(7).double(), normal(9, 7, seed=3).double()
    wide_w, wide_b, wide_t = w.new_zeros(16, 12), b.new_zeros(16), t.new_full((9, 16), 5.0)
    wide_w[:7], wide_b[:7], wide_t[:, :7] = w, b, t
    for reduction in ("mean", "sum", "none"):
        loss, dp, _ = reference.linear_act_mse(x, w, b, t, activation, reduction, None, True)
        found, wide_dp, _ = implementation.linear_act_mse(
            x, wide_w, wide_b, wide_t, activation, reduction, None, True, features=7
        )
        torch.testing.assert_close(found, loss)
        torch.testing.assert_close(wide_dp[:, :7], dp)
        assert not wide_dp[:, 7:].any()
        _, dp, dx = reference.decoder_mse(x, w, b, t, activation, reduction, x, "relu")
        found, wide_dp, wide_dx = implementation.decoder_mse(
            x, wide_w, wide_b, wide_t, activation, reduction, x, "relu", features=7
        )
        torch.testing.assert_close(found, loss)
        torch.testing.assert_close(wide_dx, dx)


def test_weight_gradients_that_wait() -> None:
    """Nothing is there before the sum; then it is, without the rows and columns that only fill up."""
    dp, x = normal(1100, 16), normal(1100, 24, seed=1)
    dp[:, 9:], pending = 0, []
    dw, db = torch.full((9, 21), torch.nan), torch.full((9,), torch.nan)
    linear_wgrad(dp, x, True, None, (dw, db), pending)
    assert dw.isnan().all()
    assert len(pending) == 2
    sum_together(pending)
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
        assert step._layers.plan.features == 13, "these widths are filled up"
        assert all(w.stride(0) % 4 == 0 or w.stride(1) % 4 == 0 for w in step._layers.weights)
    return losses, [p.grad for p in ae.parameters()]


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"output_activation": "sigmoid", "activation": "softplus"}])
def test_filled_up_rows_train_as_rows_do(options: dict[str, object]) -> None:
    mine, theirs = (train(backend, torch.float64, **options) for backend in ("triton", "torch"))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_one_launch_sums_what_a_step_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    op = _schedule.op

    def counting(pairs: list[tuple[Tensor, Tensor]]) -> None:
        made.append(len(pairs))
        sum_together(pairs)

    monkeypatch.setattr(
        _schedule, "op", lambda backend, name: counting if name == "sum_together" else op(backend, name)
    )
    train("triton", torch.float32)
    assert made[::2] == [8, 8, 8], "the copies of the parameters, once for each step"
    assert len(made[1::2]) == 3, "and once what it leaves"
