"""What the kernel tests have in common: dtypes, hostile shapes, awkward views, sensible numbers for each activation,
losses in closed form, the three-way rule for an op."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accuracy import check_all
from fastae_kernels.elementwise import ACTIVATIONS as TABLE
from fastae_kernels.elementwise import LossKind
from fastae_kernels.jit.backend import TRITON
from fastae_kernels.reference import TORCH
from torch import Tensor

from fastae.verify.inputs import EAGER as EAGER  # the activations as a user writes them in PyTorch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ACTIVATIONS = tuple(TABLE)

# Every activation and every dtype, but not every pair of them: those are `fastae verify`'s
TURNS = tuple((activation, DTYPES[i % len(DTYPES)]) for i, activation in enumerate(ACTIVATIONS))

# M, N, K: one, odd, one row or column, just past a tile of 32, several tiles each way
SHAPES = ((1, 1, 1), (3, 5, 7), (1, 33, 2), (33, 1, 17), (5, 2, 65), (70, 37, 96))
EMPTY_SHAPES = ((0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 4), (0, 3, 0), (3, 0, 0), (0, 0, 0))


def short(value: object) -> str:
    """The name of a case: of a dtype, of a loss, of a view."""
    if isinstance(value, LossKind):
        return f"{value.name}-{value.setting}" if value.setting else value.name
    return str(getattr(value, "__name__", value)).removeprefix("torch.")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uniform(*shape: int, low: float, high: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    u = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (low + (high - low) * u).to(dtype)


def layer(activation: str, M: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, w, b with p of order one; for logit p lies in (0.05, 0.95), in every third column far outside it (clamped)."""
    if activation == "logit":
        x, w = (
            uniform(M, K, low=0.4, high=1, dtype=dtype),
            uniform(N, K, low=0.2, high=0.9, dtype=torch.float64, seed=1),
        )
        b = torch.tensor([0.02, -2.0, 2.0] * N, dtype=dtype)[:N]
        return x, (w / max(K, 1)).to(dtype), b
    w = normal(N, K, dtype=torch.float64, seed=1) * (2 / max(K, 1) ** 0.5)
    return normal(M, K, dtype=dtype), w.to(dtype), normal(N, dtype=dtype, seed=2)


def saved(activation: str, M: int, N: int, dtype: torch.dtype) -> Tensor | None:
    """What the backward pass of an activation gets: its y, its p, or nothing."""
    what = TABLE[activation].saves
    if what is None:
        return None
    if activation == "logit":
        p = uniform(M, N, low=0.05, high=0.95, dtype=dtype, seed=3)
        p.view(-1)[::5] = 1.5
        p.view(-1)[1::5] = -0.5
        return p
    p = normal(M, N, dtype=torch.float64, seed=3) * 3
    return (EAGER[activation](p) if what == "y" else p).to(dtype)


# ---------------------------------------------------------------- losses

KINDS = (LossKind("mse"), LossKind("mae"), LossKind("huber", 0.3), LossKind("huber", 1.0), LossKind("huber", 2.5))
# Losses of an error, and negative log-likelihoods of what the last layer gives, which a row sums
ALL_KINDS = (
    *KINDS, LossKind("gaussian"), LossKind("bernoulli"), LossKind("poisson"), LossKind("nb"), LossKind("gaussian", 0.7),
)  # fmt: skip


def suited(kind: LossKind, t: Tensor) -> Tensor:
    """A target that the loss is for: counts where it is one of counts and no formula has a meaning elsewhere."""
    return (2 * t).round().abs() if kind.name == "nb" else t


def loss_of(kind: LossKind, y: Tensor, t: Tensor | float = 0.0, a: Tensor | None = None) -> Tensor:
    """The loss of each value, as a book has it; of a log-likelihood without its constants. a: its parameter."""
    e = y - t
    if kind.name == "nb":
        a = torch.zeros_like(y) if a is None else a
        theta = a.exp()
        gammas = torch.lgamma(t + theta) - torch.lgamma(theta)
        return (t + theta) * torch.logaddexp(a.expand_as(y), y) - theta * a - t * y - gammas
    if kind.name == "gaussian" and a is not None:
        return (e * e * torch.exp(-a) + a) / 2
    size, delta = e.abs(), kind.setting
    if kind.name == "huber":
        return torch.where(size <= delta, e * e / 2, delta * (size - delta / 2))
    if kind.name == "bernoulli":
        return torch.log1p(torch.exp(-y.abs())) + y.clamp(min=0) - t * y
    if kind.name == "poisson":
        return torch.exp(y) - t * y
    return {"mse": e * e, "mae": size, "gaussian": e * e / 2 * math.exp(-delta)}[kind.name]


def slope_of(kind: LossKind, y: Tensor, t: Tensor | float = 0.0, a: Tensor | None = None) -> Tensor:
    """Its derivative by y."""
    e = y - t
    a = torch.full((1,), kind.setting if kind.name == "gaussian" else 0.0, dtype=y.dtype) if a is None else a
    slopes = {
        "mse": lambda: 2 * e, "mae": e.sign, "huber": lambda: e.clamp(-kind.setting, kind.setting),
        "gaussian": lambda: e * torch.exp(-a), "bernoulli": lambda: torch.sigmoid(y) - t,
        "poisson": lambda: torch.exp(y) - t,
        "nb": lambda: torch.exp(a) * (torch.exp(y) - t) / (torch.exp(a) + torch.exp(y)),
    }  # fmt: skip
    return slopes[kind.name]()


def parameter_slope_of(kind: LossKind, y: Tensor, t: Tensor, a: Tensor) -> Tensor:
    """Its derivative by the parameter."""
    if kind.name == "gaussian":
        return (1 - (y - t) ** 2 * torch.exp(-a)) / 2
    theta, mu = a.exp(), y.exp()
    digammas = torch.digamma(t + theta) - torch.digamma(theta)
    return -theta * (digammas - torch.log1p(mu / theta) + (mu - t) / (theta + mu))


def width_of(kind: LossKind, features: int) -> int:
    """What a mean divides the sum of a row by."""
    return features if kind in KINDS else 1


def eager_loss(kind: LossKind) -> Callable[..., Tensor]:
    """As a PyTorch user writes it, of (y, t, reduction=...)."""
    if kind.name == "huber":
        return lambda y, t, reduction: F.huber_loss(y, t, reduction=reduction, delta=kind.setting)
    if kind in KINDS:
        return {"mse": F.mse_loss, "mae": F.l1_loss}[kind.name]
    values = {
        "gaussian": lambda y, t: F.mse_loss(y, t, reduction="none") / 2 * math.exp(-kind.setting),
        "nb": lambda y, t: -torch.distributions.NegativeBinomial(1.0, logits=y).log_prob(t) - torch.lgamma(t + 1),
        "bernoulli": lambda y, t: F.binary_cross_entropy_with_logits(y, t, reduction="none"),
        "poisson": lambda y, t: F.poisson_nll_loss(y, t, reduction="none"),
    }[kind.name]
    return lambda y, t, reduction: {
        "none": lambda v: v, "sum": torch.sum, "mean": lambda v: v.sum() / (v.numel() // v.shape[-1])
    }[reduction](values(y, t))  # fmt: skip


# ---------------------------------------------------------------- the three-way rule for an op


def wide(argument: Any) -> Any:
    """fp64, of a tensor or of all those in a tuple or a list."""
    if isinstance(argument, Tensor):
        return argument.double() if argument.is_floating_point() else argument
    if hasattr(argument, "_fields"):  # a Layer, a Criterion
        return type(argument)(*map(wide, argument))
    return type(argument)(map(wide, argument)) if isinstance(argument, (list, tuple)) else argument


def results_of(result: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return (result,) if isinstance(result, Tensor) else result


def three_ways(op: str, *args: Any, floor: float | None = None, **options: Any) -> tuple[Tensor | None, ...]:
    """The results of the kernel, held to its twin in the same dtype and in fp64 on the same numbers."""
    kernel, twin = getattr(TRITON, op), getattr(TORCH, op)
    truth = twin(*map(wide, args), **{name: wide(option) for name, option in options.items()})
    result = results_of(kernel(*args, **options))
    check_all(result, results_of(twin(*args, **options)), results_of(truth), floor)
    assert all(t is None or t.is_contiguous() for t in result)
    return result


# ---------------------------------------------------------------- views; what lies between their elements is NaN


def strided(t: Tensor) -> Tensor:
    around = t.new_full([2 * size + 3 for size in t.shape], float("nan"))
    view = around[tuple(slice(1, 1 + 2 * size, 2) for size in t.shape)]
    return view.copy_(t)


def transposed(t: Tensor) -> Tensor:
    around = t.new_full([size + 2 for size in reversed(t.shape)], float("nan"))
    view = around.permute(*reversed(range(t.dim())))[tuple(slice(1, 1 + size) for size in t.shape)]
    return view.copy_(t)


def expanded_rows(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def expanded_columns(t: Tensor) -> Tensor:
    return t[..., :1].expand(t.shape)


def expanded(t: Tensor) -> Tensor:
    """One number for all, as sum().backward() hands it on."""
    return t.reshape(-1)[:1].view([1] * t.dim()).expand(t.shape)


def flat(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """That view of a vector, or a copy where one axis has none."""
    return view if view in (strided, expanded) else torch.clone


VIEWS = (strided, transposed, expanded_rows, expanded_columns, expanded)
