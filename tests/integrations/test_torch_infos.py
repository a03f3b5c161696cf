"""PyTorch's own inputs for its modules and functions (ModuleInfo, OpInfo), handed to fastae's and to PyTorch's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastae
from fastae.patching.recognise import of_module

pytestmark = pytest.mark.integrations

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATION_MODULES = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus,
)  # fmt: skip
# op -> (fastae's activation, arguments of a sample that are that activation)
ACTIVATION_OPS: dict[str, tuple[str, Callable[..., bool]]] = {
    "nn.functional.relu": ("relu", lambda **_: True),
    "nn.functional.leaky_relu": ("leaky_relu", lambda negative_slope=0.01, **_: negative_slope == 0.01),
    "nn.functional.elu": ("elu", lambda alpha=1.0, **_: alpha == 1),
    "nn.functional.silu": ("silu", lambda **_: True),
    "nn.functional.mish": ("mish", lambda **_: True),
    "sigmoid": ("sigmoid", lambda **_: True),
    "tanh": ("tanh", lambda **_: True),
    "nn.functional.softplus": ("softplus", lambda beta=1, threshold=20, **_: (beta, threshold) == (1, 20)),
}


def infos() -> tuple[list[Any], list[Any]]:
    """PyTorch's databases; imported here, for they want expecttest and take seconds."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    return module_db, op_db


def module_inputs(kind: type[nn.Module], dtype: torch.dtype) -> list[Any]:
    info = next(m for m in infos()[0] if m.module_cls is kind)
    inputs: list[Any] = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    assert inputs
    return inputs


def samples(name: str, dtype: torch.dtype) -> Iterator[Any]:
    info = next(o for o in infos()[1] if o.name == name and o.variant_test_name == "")
    return iter(info.sample_inputs("cpu", dtype, requires_grad=True))


def fresh(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def result(call: Callable[..., Any], args: Any, kwargs: Any, parameters: list[Tensor]) -> list[Tensor]:
    """What the call gives, and every first gradient; second ones too in fp64."""
    args, kwargs = [fresh(a) for a in args], {k: fresh(v) for k, v in kwargs.items()}
    y = call(*args, **kwargs)
    leaves = [t for t in (*args, *kwargs.values(), *parameters) if isinstance(t, Tensor) and t.requires_grad]
    again = y.dtype == torch.float64
    first = torch.autograd.grad(y.sum(), leaves, create_graph=again, allow_unused=True, materialize_grads=True)
    total = sum(g.sin().sum() for g in first if g.requires_grad) if again else torch.zeros(())
    second: Any = ()
    if isinstance(total, Tensor) and total.requires_grad:
        second = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [y.detach(), *first, *second]


def same(mine: list[Tensor], theirs: list[Tensor], truth: list[Tensor] | None = None) -> None:
    """Equal by PyTorch's own tolerances; in half precision no further from fp64 than twice PyTorch's distance."""
    assert len(mine) == len(theirs)
    if mine[0].dtype.itemsize > 2:
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)
        return
    assert truth is not None
    for a, b, true in zip(mine, theirs, truth, strict=False):  # of the truth there are second gradients too
        assert a.dtype == b.dtype
        errors = [(t.double() - true).norm() for t in (a, b)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(a.dtype).eps * true.norm()


def wide(values: Any) -> Any:
    """The same in fp64."""
    if isinstance(values, dict):
        return {name: wide(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [wide(value) for value in values]
    of = isinstance(values, Tensor) and values.is_floating_point()
    return values.detach().double().requires_grad_(values.requires_grad) if of else values


@pytest.fixture(params=["auto", "onednn", "triton"])
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastae.use_backend(request.param):
        yield request.param


# ---------------------------------------------------------------- modules


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", [nn.Linear, nn.MSELoss])
def test_module(kind: type[nn.Module], dtype: torch.dtype, chosen: str) -> None:
    for given in module_inputs(kind, dtype):
        args, kwargs = given.constructor_input.args, dict(given.constructor_input.kwargs)
        if kind is nn.Linear:
            theirs: nn.Module = nn.Linear(*args, **kwargs, dtype=dtype)
            mine: nn.Module = fastae.LinearAct(*args, **kwargs, activation="identity", dtype=dtype)
            mine.load_state_dict(theirs.state_dict())
        else:
            theirs, mine = nn.MSELoss(*args, **kwargs), fastae.MSELoss(*args, **kwargs)
        assert isinstance(mine, kind)
        forward = given.forward_input.args, given.forward_input.kwargs
        wanted = result(theirs, *forward, list(theirs.parameters()))
        exact = copy.deepcopy(theirs).double()
        truth = result(exact, *map(wide, forward), list(exact.parameters()))
        for module in (mine, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), mine.eval()):
            same(result(module, *forward, list(module.parameters())), wanted, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", ACTIVATION_MODULES)
def test_a_linear_layer_and_the_module_patched(kind: type[nn.Module], dtype: torch.dtype, chosen: str) -> None:
    fused = 0
    for given in module_inputs(kind, dtype):
        (x,) = given.forward_input.args
        width = x.shape[-1] if x.dim() else 1
        x = x.detach().reshape(x.shape or (1,)).requires_grad_()
        torch.manual_seed(0)
        activation = kind(*given.constructor_input.args, **given.constructor_input.kwargs)
        theirs = nn.Sequential(nn.Linear(width, width, dtype=dtype), activation)
        mine = copy.deepcopy(theirs)
        report = fastae.patch(mine)
        assert bool(report.replaced) == (of_module(activation) is not None)
        fused += len(report.replaced)
        exact = copy.deepcopy(theirs).double()
        results = [result(m, (t,), {}, list(m.parameters())) for m, t in ((mine, x), (theirs, x), (exact, wide(x)))]
        same(*results)
    assert fused


# ---------------------------------------------------------------- functions


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_linear(dtype: torch.dtype, chosen: str) -> None:
    taken = 0
    for sample in samples("nn.functional.linear", dtype):
        x, (weight, *bias) = sample.input, sample.args
        if weight.dim() == 1 or x.dim() == 0:  # F.linear's dot product, which is no layer
            with pytest.raises(ValueError, match="linear_act: weight must be"):
                fastae.linear_act(x, weight, *bias)
            continue
        taken += 1
        given = x, *sample.args
        same(
            result(fastae.linear_act, given, {}, []),
            result(F.linear, given, {}, []),
            result(F.linear, wide(given), {}, []),
        )
    assert taken > 8


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_mse_loss(dtype: torch.dtype, chosen: str) -> None:
    for sample in samples("nn.functional.mse_loss", dtype):
        given = (sample.input, *sample.args), sample.kwargs
        if sample.args[0].shape != sample.input.shape:
            with pytest.raises(ValueError, match="mse_loss: target must be"):
                fastae.mse_loss(*given[0], **given[1])
            continue
        truth = result(F.mse_loss, *map(wide, given), [])
        same(result(fastae.mse_loss, *given, []), result(F.mse_loss, *given, []), truth)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ACTIVATION_OPS)
def test_activation(name: str, dtype: torch.dtype, chosen: str) -> None:
    """With the identity for a weight, p is x to the last bit."""
    activation, is_ours = ACTIVATION_OPS[name]
    info = next(o for o in infos()[1] if o.name == name and o.variant_test_name == "")
    for sample in samples(name, dtype):
        x = sample.input.detach().reshape(sample.input.shape or (1,)).requires_grad_()
        if not is_ours(**sample.kwargs):
            if name != "nn.functional.softplus":  # all of PyTorch's samples have another beta
                continue
            sample.kwargs = {}
        eye = torch.eye(x.shape[-1], dtype=dtype)
        same(
            result(lambda t: fastae.linear_act(t, eye, None, activation), (x,), {}, []),  # noqa: B023
            result(info.op, (x,), sample.kwargs, []),
        )
