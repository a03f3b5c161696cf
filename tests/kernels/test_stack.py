"""A whole stack in one kernel: scores and codes against the twin and fp64; activations, losses, dtypes, odd shapes."""

import itertools
from collections.abc import Callable

import pytest
import torch
from accuracy import FLOOR, check
from cases import (
    ALL_KINDS,
    DTYPES,
    EAGER,
    KINDS,
    TURNS,
    VIEWS,
    eager_loss,
    flat,
    loss_of,
    normal,
    short,
    suited,
    three_ways,
    uniform,
    wide,
    width_of,
)
from fastae_kernels.elementwise import MSE, LossKind
from fastae_kernels.jit import launch
from fastae_kernels.jit import stack as kernels
from fastae_kernels.onednn import ONEDNN
from fastae_kernels.reference import TORCH
from torch import Tensor
from torch.nn.functional import linear

pytestmark = pytest.mark.usefixtures("poisoned")

Stack = tuple[Tensor, list[Tensor], list[Tensor | None], list[str]]


def stack(M: int, dims: tuple[int, ...], dtype: torch.dtype, activations: list[str] | str = "tanh") -> Stack:
    """Rows and layers with p of order one; for logit p lies in (0.05, 0.95)."""
    pairs = list(itertools.pairwise(dims))
    names = [activations] * len(pairs) if isinstance(activations, str) else activations
    weights, biases = [], []
    for i, ((K, N), name) in enumerate(zip(pairs, names, strict=True)):
        unit = name == "logit"
        w = (
            uniform(N, K, low=0.05, high=0.1, dtype=torch.float64, seed=i)
            if unit
            else normal(N, K, dtype=torch.float64, seed=i)
        )
        weights.append((w / (K if unit else K**0.5 / 1.5)).to(dtype))
        biases.append(torch.full((N,), 0.5, dtype=dtype) if unit else normal(N, dtype=dtype, seed=20 + i))
    return normal(M, dims[0], dtype=dtype, seed=9), weights, biases, names


def both(args: Stack) -> None:
    """Hidden rows are rounded to the dtype of x between the layers, so its floor is that of a score too."""
    for name in ("stack_score", "stack_encode"):
        three_ways(name, *args, floor=FLOOR[args[0].dtype])


# ---------------------------------------------------------------- accuracy


@pytest.mark.parametrize(("activation", "dtype"), TURNS[::3], ids=short)  # each dtype once
def test_activations(activation: str, dtype: torch.dtype) -> None:
    """Once as a hidden layer's, once as the last one's."""
    for activations in ([activation, "identity"], ["identity", activation]):
        both(stack(17, (33, 17, 33), dtype, activations))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", ALL_KINDS, ids=short)
def test_each_loss(kind: LossKind, dtype: torch.dtype) -> None:
    """The mean of each row by closed forms in fp64, and as a user writes it; a stack of one layer and of more."""
    for dims in ((33, 33), (37, 20, 5, 37)):
        x, *layers = stack(35, dims, dtype, ["gelu", "relu", "sigmoid"][1 - len(dims) :])
        x, weights, biases, names = args = (suited(kind, x), *layers)
        h, rounded = x.double(), x
        for w, b, name in zip(weights, biases, names, strict=True):
            h, rounded = EAGER[name](linear(h, w.double(), b.double())), EAGER[name](linear(rounded, w, b))
        truth = loss_of(kind, h, x.double()).sum(1) / width_of(kind, x.shape[1])
        loss_dtype = torch.promote_types(dtype, torch.float32)
        same = eager_loss(kind)(rounded.to(loss_dtype), x.to(loss_dtype), reduction="none").sum(1)
        same = same / width_of(kind, x.shape[1])
        for ops in (kernels, TORCH, ONEDNN):
            if ops is kernels and (ALL_KINDS.index(kind) + DTYPES.index(dtype) + len(dims)) % 4 > 1:
                continue  # they take turns
            score = ops.stack_score(*args, kind)
            assert score.dtype == loss_dtype
            check(score, same, truth, FLOOR[dtype])
            assert kind != MSE or torch.equal(score, ops.stack_score(*args))


@pytest.mark.parametrize(
    "dims",
    [(1, 1, 1), (7, 7), (70, 70), (5, 3, 5), (33, 20, 3, 20, 33), (100, 40, 1, 100), (3, 64, 65, 33, 2, 3)],
    ids=short,
)
def test_each_depth_and_odd_widths(dims: tuple[int, ...]) -> None:
    names = ["relu", "gelu", "sigmoid", "softplus", "identity"][: len(dims) - 1]
    turns = list(zip((1, 17, 33, 5), DTYPES, strict=True))
    for M, dtype in turns[len(dims) % 2 :: 2]:
        both(stack(M, dims, dtype, names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_the_widest_hidden_layers(dtype: torch.dtype) -> None:
    """256 and 255 columns, of which the weights are multiplied in parts."""
    for dims in ((5, 256, 255, 5), (3, 255, 1, 256, 3)):
        both(stack(3, dims, dtype))


def test_dtype_of_the_code() -> None:
    for dtype in DTYPES:
        assert kernels.stack_encode(*stack(3, (5, 4, 5), dtype)).dtype == dtype


# ---------------------------------------------------------------- biases, views, tied weights


def test_each_subset_of_biases() -> None:
    for given in itertools.product((True, False), repeat=3):
        x, weights, biases, names = stack(17, (9, 20, 5, 9), torch.float32, ["sigmoid", "relu", "softplus"])
        both((x, weights, [b if keep else None for b, keep in zip(biases, given, strict=True)], names))


@pytest.mark.parametrize("view", VIEWS, ids=short)
def test_views(view: Callable[[Tensor], Tensor]) -> None:
    dtype = (torch.float32, torch.bfloat16)[VIEWS.index(view) % 2]
    x, weights, biases, names = stack(35, (37, 20, 37), dtype, ["gelu", "tanh"])
    both((view(x), weights, [flat(view)(b) for b in biases], names))
    both((x, [view(w) for w in weights], biases, names))


def test_tied_weights() -> None:
    x, weights, biases, names = stack(35, (37, 20, 5, 20, 37), torch.bfloat16)
    tied = [*weights[:2], weights[1].t(), weights[0].t()]
    both((x, tied, biases, names))


# ---------------------------------------------------------------- empty, inf, NaN


def test_empty() -> None:
    """No rows, no columns (a mean of nothing), a layer of no features (its successor sees only its bias)."""
    for M, dims in (
        (0, (5, 3, 5)),
        (0, (5, 5)),
        (3, (0, 4, 0)),
        (3, (0, 0)),
        (3, (5, 0, 5)),
        (3, (5, 4, 0, 4, 5)),
        (3, (5, 4, 0)),
    ):
        args = stack(M, dims, torch.float32)
        if dims[0] == dims[-1]:
            both(args)
            for kind in KINDS[1:3]:
                three_ways("stack_score", *args, kind)
        else:
            assert kernels.stack_encode(*args).shape == (M, dims[-1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_inf_and_nan_stay_in_their_row(activation: str, value: float) -> None:
    """Also where negative weights bring inf back to a finite row: what lies beside the layer must not spoil it."""
    x, weights, biases, _ = stack(20, (9, 20, 5, 9), torch.float32)
    x[3, 4] = value
    weights[0] = -weights[0].abs()
    args = x, weights, biases, [activation, "relu", "identity"]
    both(args)
    for kind in KINDS[1:3]:
        (score,) = three_ways("stack_score", *args, kind)
        assert score.isfinite().tolist() == [row != 3 for row in range(20)]
    code = kernels.stack_encode(x, weights[:2], biases[:2], [activation, "relu"])
    assert code[:3].isfinite().all()
    assert code[4:].isfinite().all()
    if value == float("inf"):
        assert code[3].isfinite().all()


# ---------------------------------------------------------------- limits, launches, the same bits every time


def test_wider_than_the_chip() -> None:
    args = stack(2, (3, 257, 3), torch.float32)
    with pytest.raises(ValueError, match=r"^stack_score: hidden layers must have at most 256 features; got \[257\]$"):
        kernels.stack_score(*args)
    with pytest.raises(ValueError, match=r"^stack_encode: every layer must have at most 256 features; got \[257, 3\]$"):
        kernels.stack_encode(*args)


def test_input_and_output_may_be_wider() -> None:
    args = stack(3, (300, 4, 300), torch.float32)
    check(kernels.stack_score(*args), TORCH.stack_score(*args), TORCH.stack_score(*wide(args)))


def test_fits_stack() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert kernels.fits_stack((784, 256, 128, 256, 784), dtype)
        assert kernels.fits_stack((20000, 20000), dtype)
        assert not kernels.fits_stack((784, 257, 784), dtype)
    assert kernels.fits_stack((784, 128, 784), torch.float64)
    assert not kernels.fits_stack((784, 129, 784), torch.float64)
    assert TORCH.fits_stack((784, 257, 784), torch.float32), "the twins have no chip to fit on"


def test_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    run = launch.launch
    monkeypatch.setattr(launch, "launch", lambda *a, **o: (counted.append(1), run(*a, **o))[1])
    args = stack(40, (70, 20, 5, 20, 70), torch.float32)
    kernels.stack_score(*args)
    assert len(counted) == 1
    kernels.stack_encode(*args[:1], *(a[:2] for a in args[1:]))
    assert len(counted) == 2


def test_rows_alone_and_the_same_bits_every_time() -> None:
    x, *layers = stack(70, (33, 20, 5, 20, 33), torch.bfloat16)
    scores = kernels.stack_score(x, *layers)
    assert torch.equal(scores, kernels.stack_score(x, *layers))
    assert torch.equal(scores[40:], kernels.stack_score(x[40:], *layers))


@pytest.mark.parametrize("kind", KINDS[:3], ids=short)
def test_onednn_scores_in_blocks(kind: LossKind) -> None:
    """More rows than a block, a last weight that is packed once for squared error: the twin's scores."""
    x, *layers = stack(4500, (512, 260, 512), torch.bfloat16, ["relu", "identity"])
    floor = FLOOR[torch.bfloat16]
    for few in (x, x[:7]):
        truth = TORCH.stack_score(*wide((few, *layers)), kind)
        check(ONEDNN.stack_score(few, *layers, kind), TORCH.stack_score(few, *layers, kind), truth, floor)
