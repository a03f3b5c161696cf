"""What a user meets of `linear_act`: the text of every error, and `LinearAct` beside `nn.Linear`."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from cases import ACTIVATIONS, EAGER, normal
from torch import nn

import fastae
from fastae import LinearAct, linear_act

x, w, b = normal(2, 3), normal(4, 3), normal(4)
VALID = ", ".join(ACTIVATIONS)
FLOATS = "float32, float16, bfloat16 or float64"

ERRORS = {
    "in_features": (
        lambda: linear_act(x, normal(4, 5)),
        ValueError,
        "linear_act: weight must be [out_features, 3] to match x [2, 3]; got [4, 5]",
    ),
    "in_features, 3-d": (
        lambda: linear_act(normal(2, 5, 3), normal(3, 4)),
        ValueError,
        "linear_act: weight must be [out_features, 3] to match x [2, 5, 3]; got [3, 4]",
    ),
    "weight 1-d": (
        lambda: linear_act(x, normal(3)),
        ValueError,
        "linear_act: weight must be [out_features, 3] to match x [2, 3]; got [3]",
    ),
    "weight 0-d": (
        lambda: linear_act(x, torch.tensor(1.0)),
        ValueError,
        "linear_act: weight must be [out_features, 3] to match x [2, 3]; got []",
    ),
    "bias": (
        lambda: linear_act(x, w, normal(3)),
        ValueError,
        "linear_act: bias must be [4] to match weight [4, 3]; got [3]",
    ),
    "bias 2-d": (
        lambda: linear_act(x, w, normal(1, 4)),
        ValueError,
        "linear_act: bias must be [4] to match weight [4, 3]; got [1, 4]",
    ),
    "x 0-d": (
        lambda: linear_act(torch.tensor(1.0), w),
        ValueError,
        "linear_act: x must be [..., in_features]; got a scalar",
    ),
    "int": (lambda: linear_act(x.long(), w.long()), TypeError, f"linear_act: x must be {FLOATS}; got int64"),
    "bool": (lambda: linear_act(x > 0, w), TypeError, f"linear_act: x must be {FLOATS}; got bool"),
    "complex": (lambda: linear_act(x + 0j, w + 0j), TypeError, f"linear_act: x must be {FLOATS}; got complex64"),
    "mixed weight": (
        lambda: linear_act(x, w.double()),
        TypeError,
        "linear_act: weight must be float32 as x is; got float64",
    ),
    "mixed bias": (
        lambda: linear_act(x, w, b.half()),
        TypeError,
        "linear_act: bias must be float32 as x is; got float16",
    ),
    "weight elsewhere": (
        lambda: linear_act(x, w.to("meta")),
        ValueError,
        "linear_act: weight must be on cpu as x is; got meta",
    ),
    "bias elsewhere": (
        lambda: linear_act(x, w, b.to("meta")),
        ValueError,
        "linear_act: bias must be on cpu as x is; got meta",
    ),
    "x elsewhere": (
        lambda: linear_act(x.to("meta"), w),
        ValueError,
        "linear_act: weight must be on meta as x is; got cpu",
    ),
    "activation": (
        lambda: linear_act(x, w, b, "rellu"),
        ValueError,
        f"linear_act: activation must be one of {VALID}; got 'rellu'; did you mean 'relu'?",
    ),
    "activation, nothing near": (
        lambda: linear_act(x, w, b, "qqq"),
        ValueError,
        f"linear_act: activation must be one of {VALID}; got 'qqq'",
    ),
    "activation None": (
        lambda: linear_act(x, w, b, None),
        ValueError,
        f"linear_act: activation must be one of {VALID}; got None",
    ),
    "layer activation": (
        lambda: LinearAct(3, 4, activation="sigmoyd"),
        ValueError,
        f"LinearAct: activation must be one of {VALID}; got 'sigmoyd'; did you mean 'sigmoid'?",
    ),
    "x a list": (lambda: linear_act([[1.0]], w), TypeError, "linear_act: x must be a torch.Tensor; got list"),
    "x an array": (
        lambda: linear_act(np.ones((2, 3)), w),
        TypeError,
        "linear_act: x must be a torch.Tensor; got ndarray",
    ),
    "weight a list": (lambda: linear_act(x, [[1.0]]), TypeError, "linear_act: weight must be a torch.Tensor; got list"),
    "bias a number": (lambda: linear_act(x, w, 1.0), TypeError, "linear_act: bias must be a torch.Tensor; got float"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error(case: str) -> None:
    call, kind, text = ERRORS[case]
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        call()


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r"^linear_act: weight must be a torch\.Tensor; got NoneType$"):
        linear_act(x, None)


def test_errors_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for case in ("in_features", "bias", "x 0-d", "int", "activation", "weight elsewhere"):
            call, kind, text = ERRORS[case]
            with pytest.raises(kind, match=re.escape(text)):
                call()


def test_meta_tensors_go_through_as_in_nn_linear() -> None:
    """Shape inference on the meta device: what torch.device("meta") models are for."""
    with torch.device("meta"):
        layer, twin = LinearAct(3, 4), nn.Linear(3, 4)
        y = layer(torch.ones(2, 3))
        assert (y.shape, y.device, y.dtype) == (twin(torch.ones(2, 3)).shape, torch.device("meta"), torch.float32)


# ---------------------------------------------------------------- LinearAct


@pytest.mark.parametrize("bias", [True, False])
def test_same_initial_values_as_linear(bias: bool) -> None:
    torch.manual_seed(3)
    layer = LinearAct(30, 64, bias)
    after = torch.rand(1)
    torch.manual_seed(3)
    twin = nn.Linear(30, 64, bias)
    assert torch.equal(after, torch.rand(1)), "another number of random draws"
    assert isinstance(layer, nn.Linear)
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in twin.named_parameters()]
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_both_ways(bias: bool) -> None:
    layer, twin = LinearAct(3, 4, bias, activation="gelu"), nn.Linear(3, 4, bias)
    assert list(layer.state_dict()) == list(twin.state_dict())
    assert not torch.equal(layer.weight, twin.weight)
    layer.load_state_dict(twin.state_dict())
    assert torch.equal(layer(x), linear_act(x, twin.weight, twin.bias, "gelu"))
    with torch.no_grad():
        layer.weight.add_(1)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight, twin.weight)


def test_layer_runs_and_learns(backend: str) -> None:
    for activation in ACTIVATIONS:
        layer = LinearAct(3, 4, activation=activation)
        twin = copy.deepcopy(layer)
        layer(x).sum().backward()
        wanted = EAGER[activation](nn.functional.linear(x, twin.weight, twin.bias))
        wanted.sum().backward()
        torch.testing.assert_close(layer(x), wanted)
        torch.testing.assert_close(layer.weight.grad, twin.weight.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.bias.grad, twin.bias.grad, rtol=1e-5, atol=1e-5)


def test_dtype_and_device_arguments() -> None:
    layer = LinearAct(3, 4, device="cpu", dtype=torch.float64)
    assert layer.weight.dtype == layer.bias.dtype == torch.float64
    assert LinearAct(3, 4, device="meta").weight.device.type == "meta"
    assert LinearAct(3, 4).activation == "relu"


@pytest.mark.parametrize("layer", [LinearAct(3, 4), LinearAct(5, 2, False, "gelu_tanh")], ids=repr)
def test_repr_gives_back_the_constructor_call(layer: LinearAct) -> None:
    again = eval(repr(layer), {"LinearAct": LinearAct})
    assert repr(again) == repr(layer)
    assert (again.in_features, again.out_features) == (layer.in_features, layer.out_features)
    assert (again.bias is None, again.activation) == (layer.bias is None, layer.activation)


def test_deepcopy_and_pickle() -> None:
    layer = LinearAct(3, 4, activation="silu")
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(again) == repr(layer)
        assert again.weight.data_ptr() != layer.weight.data_ptr()
        assert torch.equal(again(x), layer(x))


def test_public_names_exist() -> None:
    assert all(hasattr(fastae, name) for name in fastae.__all__)
    assert {"LinearAct", "MSELoss", "linear_act", "linear_act_loss", "mse_loss", "use_backend"} <= set(fastae.__all__)
