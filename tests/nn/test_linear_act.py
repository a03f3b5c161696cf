"""`linear_act` as PyTorch sees it: gradients, gradients of gradients, what is saved, autocast, opcheck."""

import itertools
from functools import partial

import pytest
import torch
from accuracy import check_all
from cases import ACTIVATIONS, DTYPES, EAGER, TURNS, layer, normal, short
from fastae_kernels.elementwise import ACTIVATIONS as TABLE
from torch import Tensor

import fastae
from fastae.nn import backend as _backend
from fastae.nn import library as _ops


def eager(x: Tensor, w: Tensor, b: Tensor | None, activation: str) -> Tensor:
    return EAGER[activation](torch.nn.functional.linear(x, w, b))


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def everything(function: object, args: list[Tensor | None], activation: str, dy: Tensor) -> list[Tensor | None]:
    """The output and every gradient."""
    y = function(*args, activation)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(None if t is None else t.grad for t in args)]


def three_ways(args: list[Tensor | None], activation: str, dy: Tensor) -> None:
    truth = everything(eager, leaves(*(None if t is None else t.double() for t in args)), activation, dy.double())
    check_all(
        everything(fastae.linear_act, leaves(*args), activation, dy),
        everything(eager, leaves(*args), activation, dy),
        truth,
    )


# ---------------------------------------------------------------- forward and backward


@pytest.mark.parametrize(("activation", "dtype"), TURNS, ids=short)
def test_forward_and_gradients(activation: str, dtype: torch.dtype, backend: str) -> None:
    x, w, b = layer(activation, 37, 20, 9, dtype)
    three_ways([x, w, b], activation, normal(37, 20, dtype=dtype, seed=4))
    three_ways([x, w, None], activation, normal(37, 20, dtype=dtype, seed=4))


@pytest.mark.parametrize("activation", ["identity", "relu", "elu", "gelu"])
def test_every_dtype(activation: str, backend: str) -> None:
    """Of what saves nothing, the output, p; and of one that PyTorch saves p of where the output is enough."""
    for dtype in DTYPES:
        three_ways([*layer(activation, 9, 20, 5, dtype)], activation, normal(9, 20, dtype=dtype, seed=4))


@pytest.mark.parametrize("shape", [(33,), (1, 33), (2, 3, 33), (2, 1, 2, 33), (0, 33), (2, 0, 33)], ids=short)
def test_any_number_of_dimensions(shape: tuple[int, ...], backend: str) -> None:
    _, w, b = layer("silu", 1, 20, 33, torch.float32)
    three_ways([normal(*shape), w, b], "silu", normal(*shape[:-1], 20, seed=4))


def test_no_features(backend: str) -> None:
    for N, K in ((3, 0), (0, 3), (0, 0)):
        three_ways([normal(2, 2, K), normal(N, K), normal(N)], "silu", normal(2, 2, N))


def test_strided_arguments_and_expanded_gradient(backend: str) -> None:
    x, w, b = normal(2, 33, 5).transpose(1, 2), normal(33, 20).t(), normal(20, 2)[:, 0]
    for activation in ("identity", "relu", "gelu"):
        args = leaves(x, w, b)
        same = leaves(x, w, b)
        fastae.linear_act(*args, activation).sum().backward()
        eager(*same, activation).sum().backward()
        for mine, theirs in zip(args, same, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_each_subset_of_gradients(activation: str, backend: str) -> None:
    x, w, b = layer(activation, 5, 4, 3, torch.float32)
    for wanted in itertools.product([True, False], repeat=3):
        grads = []
        for function in (fastae.linear_act, eager):
            args = [t.clone().requires_grad_(need) for t, need in zip((x, w, b), wanted, strict=True)]
            y = function(*args, activation)
            assert y.requires_grad == any(wanted)
            if any(wanted):
                y.backward(normal(5, 4, seed=4))
            grads.append([t.grad for t in args])
            assert [g is not None for g in grads[-1]] == list(wanted)
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs) if mine is not None else None


@pytest.mark.parametrize("name", ["onednn", "triton"])  # "torch" is autograd's own
def test_backward_runs_only_what_is_asked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(_backend._process, "name", name)
    calls: list[tuple[str, object]] = []
    for op_name, flag in (("act_bwd", 3), ("linear_dgrad_act", None), ("linear_wgrad", 2)):
        op = getattr(_ops, op_name)
        monkeypatch.setattr(
            _ops, op_name, lambda *a, _n=op_name, _o=op, _f=flag: (calls.append((_n, _f and a[_f])), _o(*a))[1]
        )
    wanted = {
        (True, False, False): [("act_bwd", False), ("linear_dgrad_act", None)],
        (False, True, False): [("act_bwd", False), ("linear_wgrad", False)],
        (False, True, True): [("act_bwd", False), ("linear_wgrad", True)],
        (False, False, True): [("act_bwd", True)],
        (True, True, True): [("act_bwd", False), ("linear_dgrad_act", None), ("linear_wgrad", True)],
    }
    for needs, expected in wanted.items():
        args = [t.requires_grad_(need) for t, need in zip(layer("elu", 3, 4, 5, torch.float32), needs, strict=True)]
        y = fastae.linear_act(*args, "elu")
        calls.clear()
        y.sum().backward()
        assert calls == expected


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str, backend: str) -> None:
    x, w, b = layer(activation, 2, 3, 2, torch.float64)
    for p in (torch.nn.functional.linear(x, w, b), torch.nn.functional.linear(x, w)):
        assert p.abs().min() > 1e-3, "too near a kink for finite differences"
    args = tuple(leaves(x, w, b))
    if backend == "triton":  # in random directions
        assert torch.autograd.gradcheck(lambda *a: fastae.linear_act(*a, activation), args, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *a: fastae.linear_act(*a, activation), args, fast_mode=True)
        return
    assert torch.autograd.gradcheck(lambda *a: fastae.linear_act(*a, activation), args)
    assert torch.autograd.gradgradcheck(lambda *a: fastae.linear_act(*a, activation), args)
    assert torch.autograd.gradgradcheck(lambda *a: fastae.linear_act(*a, None, activation), args[:2])


def test_one_tensor_in_two_places(backend: str) -> None:
    square = normal(2, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: fastae.linear_act(s, s, None, "tanh"), (square,))
    assert torch.autograd.gradgradcheck(lambda s: fastae.linear_act(s, s, None, "tanh"), (square,))
    assert torch.autograd.gradgradcheck(lambda s: fastae.linear_act(s, s, s[0], "silu"), (square,))


def test_one_tensor_in_two_places_with_a_graph(backend: str) -> None:
    """Each place has its own gradient; gradgradcheck would not see both counted twice."""
    square = normal(4, 4).requires_grad_()
    (plain,) = torch.autograd.grad(fastae.linear_act(square, square, square[0], "tanh").sum(), square)
    (graph,) = torch.autograd.grad(
        fastae.linear_act(square, square, square[0], "tanh").sum(), square, create_graph=True
    )
    torch.testing.assert_close(graph.detach(), plain, rtol=1e-5, atol=1e-5)


def test_create_graph_gives_the_same_first_gradient(backend: str) -> None:
    for activation in ACTIVATIONS:
        args = leaves(*layer(activation, 5, 4, 3, torch.float32))
        dy = normal(5, 4, seed=4)
        plain = torch.autograd.grad(fastae.linear_act(*args, activation), args, dy)
        graph = torch.autograd.grad(fastae.linear_act(*args, activation), args, dy, create_graph=True)
        for mine, theirs in zip(plain, graph, strict=True):
            assert theirs.requires_grad or activation == "identity"  # whose db depends on dy alone
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what is kept


def _note(seen: list[int], t: Tensor) -> Tensor:
    seen.append(t.data_ptr())
    return t


@pytest.mark.parametrize("name", ["onednn", "triton"])
def test_p_is_kept_only_where_a_gradient_may_be_asked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(_backend._process, "name", name)
    kept: list[bool] = []
    op = _ops.linear_act_fwd
    monkeypatch.setattr(_ops, "linear_act_fwd", lambda *a: (kept.append(a[4]), op(*a))[1])
    args = leaves(*layer("gelu", 3, 4, 5, torch.float32))
    for activation, keeps in (("gelu", True), ("silu", True), ("relu", False), ("identity", False), ("tanh", False)):
        kept.clear()
        fastae.linear_act(*args, activation)
        with torch.no_grad():
            fastae.linear_act(*args, activation)
        with torch.inference_mode():
            fastae.linear_act(*args, activation)
        fastae.linear_act(*(t.detach() for t in args), activation)
        assert kept == [keeps, False, False, False]


def test_what_is_saved(backend: str) -> None:
    """relu needs x, w and its own output; identity not even that; gelu one tensor more, its p."""
    assert [TABLE[name].eager_saves for name in ("identity", "relu", "gelu")] == [None, "y", "p"]
    for activation in ACTIVATIONS:
        args = leaves(*layer(activation, 3, 4, 5, torch.float32))
        saved: list[int] = []
        note = partial(_note, saved)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = fastae.linear_act(*args, activation)
        known = {t.data_ptr() for t in (*args, y)}
        assert len(set(saved) - known) == (TABLE[activation].eager_saves == "p"), activation
        assert (y.data_ptr() in saved) == (TABLE[activation].eager_saves == "y"), activation


def test_a_saved_tensor_modified_in_place_is_refused(backend: str) -> None:
    for activation, victims in (("relu", "xwy"), ("gelu", "xw"), ("identity", "xw")):
        for victim in victims:
            x, w, b = (t * 1 for t in leaves(*layer(activation, 3, 4, 5, torch.float32)))
            y = fastae.linear_act(x, w, b, activation)
            {"x": x, "w": w, "y": y}[victim].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


def test_inputs_and_gradients_are_left_as_they_were(backend: str) -> None:
    for activation in ACTIVATIONS:
        args, dy = leaves(*layer(activation, 3, 4, 5, torch.float32)), normal(3, 4)
        y = fastae.linear_act(*args, activation)
        before = [t.detach().clone() for t in (*args, y, dy)]
        y.backward(dy, retain_graph=True)
        first = [t.grad.clone() for t in args]
        y.backward(dy)
        assert all(torch.equal(a, b) for a, b in zip((*args, y, dy), before, strict=True))
        assert all(torch.equal(t.grad, 2 * g) for t, g in zip(args, first, strict=True))


def test_backward_runs_where_its_forward_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("act_bwd", "linear_dgrad_act", "linear_wgrad"):
        op = getattr(_ops, name)
        monkeypatch.setattr(_ops, name, lambda *a, _op=op: (ran.append(a[-1]), _op(*a))[1])
    args = leaves(*layer("elu", 3, 4, 5, torch.float32))
    for name in ("triton", "onednn"):
        with fastae.use_backend(name):
            y = fastae.linear_act(*args, "elu")
        with fastae.use_backend("torch" if name == "triton" else "triton"):
            y.sum().backward()
        assert ran == [name] * 3
        ran.clear()


# ---------------------------------------------------------------- autocast


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=short)
def test_autocast_as_linear_does(dtype: torch.dtype, bias: bool, backend: str) -> None:
    x, w, b = layer("relu", 9, 4, 5, torch.float64 if dtype == torch.float64 else torch.float32)
    x, b = x.to(dtype), b if bias else None
    results = []
    for function in (fastae.linear_act, eager):
        args = leaves(x, w, b)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(*args, "relu")
        y.sum().backward()
        results.append([y.detach(), *(None if t is None else t.grad for t in args)])
    for mine, theirs in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_create_graph_and_backward_inside_autocast(backend: str) -> None:
    for outside in (True, False):
        args = leaves(*layer("silu", 4, 3, 5, torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not outside):
            y = fastae.linear_act(*args, "silu").float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grads = torch.autograd.grad(y.sum(), args, create_graph=True)
            sum(g.float().square().sum() for g in grads).backward()
        assert [g.dtype for g in grads] == [t.grad.dtype for t in args] == [torch.float32] * 3


# ---------------------------------------------------------------- opcheck

OPCHECKS = {
    "linear_act_fwd-keep": ("linear_act_fwd", lambda x, w, b, dy: (x, w, b, "gelu", True)),
    "linear_act_fwd-plain": ("linear_act_fwd", lambda x, w, b, dy: (x, w, None, "relu", False)),
    "act_bwd-db": ("act_bwd", lambda x, w, b, dy: (dy, dy.sin(), "tanh", True)),
    "act_bwd-expanded": ("act_bwd", lambda x, w, b, dy: (dy[:1, :1].expand(5, 4), None, "identity", False)),
    "linear_dgrad_act-below": ("linear_dgrad_act", lambda x, w, b, dy: (dy, w, x, "silu")),
    "linear_dgrad_act-none": ("linear_dgrad_act", lambda x, w, b, dy: (dy.t().contiguous().t(), w, None, "identity")),
    "linear_wgrad-db": ("linear_wgrad", lambda x, w, b, dy: (dy, x, True, torch.tensor(0.5))),
    "linear_wgrad-plain": ("linear_wgrad", lambda x, w, b, dy: (dy, x, False, None)),
}


@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case: str) -> None:
    name, arguments = OPCHECKS[case]
    x, w, b = layer("relu", 5, 4, 3, torch.float32)
    for backend in ("onednn", "triton"):
        torch.library.opcheck(getattr(_ops, name), (*arguments(x, w, b, normal(5, 4)), backend))
