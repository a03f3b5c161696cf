"""Every op with every kind of argument: what a case is, the fixed grid of them, and how fresh ones are drawn."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fastae_kernels.elementwise import ACTIVATIONS, LOSSES, LossKind
from fastae_kernels.noise import CORRUPTIONS
from fastae_kernels.ops import Below, Criterion, Layer, Out
from torch import Tensor

from fastae.nn.backend import ops
from fastae.verify import random_cases
from fastae.verify.inputs import FAR, VIEWS, Draw

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NARROW = DTYPES[:3]  # of normal numbers, which are fp32 whatever they are added to
# M, N, K: one, odd, one row or column, just past a tile of 32, several tiles each way
SHAPES = ((3, 5, 7), (33, 1, 17), (70, 37, 96), (1, 33, 2), (5, 2, 65), (1, 1, 1))
EMPTY_SHAPES = ((0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 4), (0, 3, 0), (3, 0, 0), (0, 0, 0))
REDUCTIONS = ("mean", "sum", "none")
# Losses with a parameter: one number for each column, or one for all
TRAINED = (("gaussian", "one"), ("gaussian", "each"), ("nb", "each"))

Views = Callable[[str, Tensor], Tensor]
Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Op:
    """`build` makes the arguments of the launcher; `tensors` names those that may come as views, `far` the 2-D ones."""

    build: Callable[[Case, Draw, Views], Arguments]
    tensors: tuple[str, ...]
    activated: bool = True
    options: dict[str, tuple[Any, ...]] | None = None
    floor_of_x: bool = False  # hidden rows are rounded to x's dtype on the way to an fp32 result
    dtypes: tuple[torch.dtype, ...] = DTYPES
    lossy: bool = False  # whether it takes a loss: the cases are squared error's, and some of each other one


@dataclass(frozen=True)
class Case:
    op: str
    dtype: torch.dtype
    shape: tuple[int, int, int]  # M, N, K
    activation: str
    options: tuple[tuple[str, Any], ...] = ()
    views: tuple[tuple[str, str], ...] = ()  # argument -> one of VIEWS or FAR
    seed: int = 0
    loss: str = "mse"
    parameter: str = ""  # of the loss: "one", or "each" column has its own

    def option(self, name: str) -> Any:
        return dict(self.options)[name]

    def describe(self) -> str:
        M, N, K = self.shape
        words = [f"M={M} N={N} K={K}"]
        words += [f"{name}: {view}" for name, view in self.views if view != "contiguous"]
        words += [name if value is True else f"{name}={value}" for name, value in self.options if value]
        words += [] if self.loss == "mse" else [self.loss]
        words += [f"parameter: {self.parameter}"] if self.parameter else []
        return ", ".join(words)

    def arguments(self, device: str) -> Arguments:
        """The same numbers each time; contiguous tensors too lie between NaN."""
        chosen = dict(self.views)

        def view(name: str, t: Tensor) -> Tensor:
            return (VIEWS | FAR)[chosen.get(name, "contiguous")](t)

        return OPS[self.op].build(self, Draw(self.seed, device, self.shape == (1, 1, 1)), view)


def implementation(backend: str, op: str) -> Callable[..., Any]:
    """An op on a backend, which returns what is to be compared; the gradient by a loss's parameter comes last."""
    call: Callable[..., Any] = getattr(ops(backend), op)
    return partial(_RESULTS[op], call) if op in _RESULTS else call


def _loss_results(call: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    *given, parameter = args
    place = None if parameter is None or not given[4] else torch.empty_like(parameter)
    return *call(*given, Out(dparameter=place), parameter), place


def _linear_act_loss_results(call: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    parameter = args[3].parameter
    place = None if parameter is None or not args[4] else torch.empty_like(parameter)
    return *call(*args, Out(dparameter=place)), place


def _decoder_loss_results(call: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    parameter = args[3].parameter
    place = None if parameter is None else torch.empty_like(parameter)
    return *call(*args, place), place


_RESULTS = {
    "linear_sample": random_cases.sample_results,
    "gather": random_cases.gather_results,
    "loss": _loss_results,
    "linear_act_loss": _linear_act_loss_results,
    "decoder_loss": _decoder_loss_results,
}


def _if(condition: bool, t: Tensor | None) -> Tensor | None:
    return t if condition else None


def _viewed(view: Views, name: str, t: Tensor | None) -> Tensor | None:
    return None if t is None else view(name, t)


def _linear_act_fwd(case: Case, draw: Draw, view: Views) -> Arguments:
    x, w, b = draw.layer(case.activation, *case.shape, case.dtype)
    bias = _viewed(view, "b", _if(case.option("bias"), b))
    dropout = random_cases.dropout(case, draw)
    return view("x", x), view("w", w), bias, case.activation, case.option("keep_p"), None, dropout


def _act_bwd(case: Case, draw: Draw, view: Views) -> Arguments:
    M, N, _ = case.shape
    saved = _viewed(view, "saved", draw.saved(case.activation, M, N, case.dtype))
    return view("dy", draw.normal(M, N, dtype=case.dtype)), saved, case.activation, case.option("db")


def _linear_dgrad_act(case: Case, draw: Draw, view: Views) -> Arguments:
    M, N, K = case.shape
    dp, w = draw.normal(M, N, dtype=case.dtype), draw.normal(N, K, dtype=case.dtype)
    saved = _viewed(view, "saved", draw.saved(case.activation, M, K, case.dtype))
    return view("dp", dp), view("w", w), saved, case.activation, None, random_cases.dropout(case, draw)


def _linear_wgrad(case: Case, draw: Draw, view: Views) -> Arguments:
    M, N, K = case.shape
    dp, x = draw.normal(M, N, dtype=case.dtype), draw.normal(M, K, dtype=case.dtype)
    scale = _if(case.option("scale"), draw.uniform(1, low=0.1, high=3)[0])
    return view("dp", dp), view("x", x), case.option("db"), scale


def _kind(case: Case) -> LossKind:
    """The loss of a case; huber with a delta that lies among the errors."""
    return LossKind(case.loss, 0.75 if case.loss == "huber" else 0.0)


def _suited(case: Case, target: Tensor) -> Tensor:
    """A target that the loss is for: counts for the negative binomial."""
    return (2 * target).round().abs() if case.loss == "nb" else target


def _parameter(case: Case, draw: Draw, columns: int) -> Tensor | None:
    """Of the loss, in the dtype that it has: fp32, or fp64."""
    wide = torch.promote_types(case.dtype, torch.float32)
    return draw.normal({"each": columns, "one": 1}[case.parameter], dtype=wide) if case.parameter else None


def _loss(case: Case, draw: Draw, view: Views) -> Arguments:
    M, N, _ = case.shape
    input, target = draw.normal(M, N, dtype=case.dtype), _suited(case, -draw.normal(M, N, dtype=case.dtype))
    options = _kind(case), case.option("reduction"), case.option("dinput")
    return view("input", input), view("target", target), *options, _parameter(case, draw, N)


def _criterion(case: Case, draw: Draw, view: Views) -> Criterion:
    M, N, _ = case.shape
    weights = draw.uniform(M, low=0, high=3, dtype=case.dtype)
    row_weight = _viewed(view, "row_weight", _if(case.option("row_weight"), weights))
    counted = torch.tensor(max(M - 2, 1), device=draw.device) if case.option("part") else None
    features = max(N - 2, 1) if case.option("part") else None
    parameter = _parameter(case, draw, N if features is None else features)
    share, penalty = 0.7 if case.option("more") else 1.0, random_cases.penalty(case, draw)
    reduction = case.option("reduction")
    return Criterion(_kind(case), reduction, row_weight, features, counted, share, penalty, parameter)


def _linear_act_loss(case: Case, draw: Draw, view: Views) -> Arguments:
    x, w, b = draw.layer(case.activation, *case.shape, case.dtype)
    target = random_cases.with_missing(case, _suited(case, -draw.normal(*case.shape[:2], dtype=case.dtype)))
    layer = Layer(view("w", w), _viewed(view, "b", _if(case.option("bias"), b)), case.activation)
    return view("x", x), layer, view("target", target), _criterion(case, draw, view), case.option("dp")


def _decoder_loss(case: Case, draw: Draw, view: Views) -> Arguments:
    M, N, K = case.shape
    x, w, b = draw.layer(case.activation, M, N, K, case.dtype)
    target = random_cases.with_missing(case, _suited(case, -draw.normal(M, N, dtype=case.dtype)))
    saved = draw.saved(case.activation, M, K, case.dtype)
    layer = Layer(view("w", w), _viewed(view, "b", _if(case.option("bias"), b)), case.activation)
    below = Below(_viewed(view, "saved", saved), case.activation, random_cases.dropout(case, draw))
    return view("x", x), layer, view("target", target), _criterion(case, draw, view), below


def _stack(case: Case, draw: Draw, view: Views) -> Arguments:
    """K features through N, through K // 2, and for a score back to K; the activation is that of the second layer."""
    M, N, K = case.shape
    widths = [K, N, max(K // 2, 1), K] if case.op == "stack_score" else [K, N, max(K // 2, 1)]
    names = ["tanh", case.activation, "identity"][: len(widths) - 1]
    weights, biases = [], []
    for name, (inside, outside) in zip(names, itertools.pairwise(widths), strict=True):
        if name == "logit":  # tanh lies in (-1, 1): p in 0.7 -+ 0.2, if there is a bias
            w = draw.uniform(outside, inside, low=-0.2, high=0.2, dtype=torch.float64) / max(inside, 1)
            b = torch.full((outside,), 0.7, dtype=case.dtype, device=draw.device)
        else:
            w = draw.normal(outside, inside, dtype=torch.float64, scale=1.5 / max(inside, 1) ** 0.5)
            b = draw.normal(outside, dtype=case.dtype)
        weights.append(view("weights", w.to(case.dtype)))
        biases.append(_viewed(view, "biases", _if(case.option("bias") or name == "logit", b)))
    x = view("x", _suited(case, draw.normal(M, K, dtype=case.dtype)))
    if case.op == "stack_encode":
        return x, weights, biases, names
    return x, weights, biases, names, _kind(case), _parameter(case, draw, K)


_EITHER = (True, False)
OPS: dict[str, Op] = {
    "linear_act_fwd": Op(
        _linear_act_fwd, ("x", "w", "b"), options={"bias": _EITHER, "keep_p": _EITHER, "dropout": _EITHER[::-1]}
    ),
    "act_bwd": Op(_act_bwd, ("dy", "saved"), options={"db": _EITHER}),
    "linear_dgrad_act": Op(_linear_dgrad_act, ("dp", "w", "saved"), options={"dropout": _EITHER[::-1]}),
    "linear_sample": Op(
        random_cases.linear_sample, ("x", "w", "b"), False,
        {"bias": _EITHER, "row_weight": _EITHER, "per_latent": _EITHER}, dtypes=NARROW,
    ),
    "linear_dgrad_sample": Op(
        random_cases.linear_dgrad_sample, ("dp", "w", "p"), False,
        {"row_weight": _EITHER, "per_latent": _EITHER, "lacks_scale": _EITHER}, dtypes=NARROW,
    ),
    "gather": Op(random_cases.gather, ("source",), False, {"noise": (*CORRUPTIONS, "swap")}, dtypes=NARROW),
    "linear_wgrad": Op(_linear_wgrad, ("dp", "x"), False, {"db": _EITHER, "scale": _EITHER}),
    "loss": Op(_loss, ("input", "target"), False, {"reduction": REDUCTIONS[:2], "dinput": _EITHER}, lossy=True),
    "linear_act_loss": Op(
        _linear_act_loss, ("x", "w", "b", "target", "row_weight"),
        options={
            "reduction": REDUCTIONS, "row_weight": _EITHER, "dp": _EITHER, "part": (False, True), "bias": _EITHER,
            "more": (False, True),
        },
        lossy=True,
    ),
    "decoder_loss": Op(
        _decoder_loss, ("x", "w", "b", "target", "saved", "row_weight"),
        options={
            "reduction": REDUCTIONS, "row_weight": _EITHER, "part": (False, True), "bias": _EITHER,
            "more": (False, True), "dropout": (False, True),
        },
        lossy=True,
    ),
    "stack_score": Op(_stack, ("x", "weights", "biases"), options={"bias": _EITHER}, floor_of_x=True, lossy=True),
    "stack_encode": Op(_stack, ("x", "weights", "biases"), options={"bias": _EITHER}, floor_of_x=True),
}  # fmt: skip
_FLAT = ("b", "biases", "row_weight")  # 1-D: their views are those that one axis can have
_LONG = {"linear_act_fwd": (9, 9, 20000), "linear_act_loss": (9, 9, 20000), "linear_dgrad_act": (9, 20000, 9)}
_FLAT_VIEWS = ("unaligned", "strided", "expanded")


def _combinations(op: Op) -> list[tuple[tuple[str, Any], ...]]:
    options = op.options or {}
    return [tuple(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def _views_of(name: str) -> tuple[str, ...]:
    """No equal weights in a stack: sums of equal terms round the same way every time, and from layer to layer."""
    views = tuple(VIEWS)[1:]
    return _FLAT_VIEWS if name in _FLAT else views[:3] if name == "weights" else views


def grid(name: str, quick: bool) -> Iterator[Case]:
    """The same cases every time. All pairs of dtype and activation on every shape; shapes, views and options turn."""
    op = OPS[name]
    activations = tuple(ACTIVATIONS) if op.activated else ("identity",)
    combinations = itertools.cycle(_combinations(op))
    views = itertools.cycle([((argument, view),) for argument in op.tensors for view in _views_of(argument)])
    shapes = itertools.cycle(SHAPES)
    for dtype, activation in itertools.product(op.dtypes, activations):
        if quick and op.activated:
            yield Case(name, dtype, next(shapes), activation, next(combinations))
            continue
        for shape in SHAPES:
            yield Case(name, dtype, shape, activation, next(combinations))
        yield Case(name, dtype, (35, 37, 33), activation, next(combinations), next(views))
    for combination in _combinations(op)[:: 5 if quick else 1]:  # 5 is prime to their number: each value comes
        yield Case(name, torch.float32, (35, 37, 33), activations[-2 % len(activations)], combination)
    dtypes = itertools.cycle((torch.float32, torch.bfloat16))
    for argument in op.tensors:
        for view in _views_of(argument):
            yield Case(name, next(dtypes), (35, 37, 33), _some(op), next(combinations), ((argument, view),))
    for shape in EMPTY_SHAPES:
        yield Case(name, torch.float32, shape, _some(op, "sigmoid"), next(combinations))
    for loss, dtype in itertools.product([k for k in LOSSES if k != "mse"] if op.lossy else [], DTYPES):
        for shape, activation in ((SHAPES[2], "relu"), ((35, 37, 33), "gelu")):
            yield Case(name, dtype, shape, _some(op, activation), next(combinations), loss=loss)
    for (loss, parameter), dtype in itertools.product(TRAINED if op.lossy else [], DTYPES):
        yield Case(
            name, dtype, (70, 37, 33), _some(op, "identity"), next(combinations), loss=loss, parameter=parameter
        )  # fmt: skip
    yield from _special(name)


def _some(op: Op, activation: str = "gelu") -> str:
    return activation if op.activated else "identity"


def _special(name: str) -> Iterator[Case]:
    """Offsets past 2^31; long sums; rows in splits; hidden layers as wide as the chip takes them."""
    op = OPS[name]
    if name in _LONG:  # in 600 steps: an accumulator of half precision drifts by more than it may
        yield Case(name, torch.float16, _LONG[name], "relu", _combinations(op)[0])
    for argument in (a for a in op.tensors if a not in (*_FLAT, "weights")):
        for view, shape in itertools.product(FAR, ((3, 3, 3), (3, 3, 33), (33, 3, 3))):
            yield Case(name, torch.float16, shape, _some(op), _combinations(op)[0], ((argument, view),))
    if name == "linear_wgrad":
        for M, combination in itertools.product((1025, 1300), _combinations(op)):
            yield Case(name, torch.float16, (M, 5, 3), "identity", combination)
    if name in ("decoder_loss", "stack_score", "stack_encode"):
        width = (3, 256, 5) if name.startswith("stack") else (3, 5, 256)
        yield Case(name, torch.bfloat16, width, "relu", _combinations(op)[0])


def drawn(name: str, seed: int, count: int) -> Iterator[Case]:
    """Fresh cases, the same for the same seed whatever else is run.

    Every size is 9 or more: an error is measured against the largest of the results, and among a few of them sums that
    happen to cancel leave nothing large.
    """
    op, chance = OPS[name], random.Random(f"{seed} {name}")
    for _ in range(count):
        M, N, K = (chance.choice((chance.randint(9, 40), chance.randint(9, 80))) for _ in range(3))
        argument = chance.choice(op.tensors)
        view = chance.choice(["contiguous", *_views_of(argument)])
        yield Case(
            name, chance.choice(op.dtypes), (M, N, K), chance.choice(list(ACTIVATIONS)) if op.activated else "identity",
            chance.choice(_combinations(op)), ((argument, view),), chance.randrange(2**31),
        )  # fmt: skip
