"""DenseAutoencoder: layers, tied weights, the same numbers as torch.nn, the summary, and the text of every error."""

import copy
import re
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastae import DenseAutoencoder, Scaler

ACTS = {"identity": lambda p: p, "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "gelu": F.gelu}


def model(*args: Any, seed: int = 0, **options: Any) -> DenseAutoencoder:
    torch.manual_seed(seed)
    return DenseAutoencoder(*(args or ([12, 8, 3],)), **options)


def data(rows: int = 50, features: int = 12, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, features)).astype(dtype)


def widths(stack: nn.Module) -> list[tuple[int, int, str]]:
    return [(layer.in_features, layer.out_features, layer.activation) for layer in stack]


def plain(stack: nn.Module, x: Tensor) -> Tensor:
    for layer in stack:
        x = ACTS[layer.activation](F.linear(x, layer.weight, layer.bias))
    return x


# ---------------------------------------------------------------- construction


def test_the_decoder_mirrors_the_encoder_and_each_activation_has_its_layer() -> None:
    ae = model([12, 8, 5, 3], activation="gelu", code_activation="tanh", output_activation="sigmoid")
    assert widths(ae.encoder) == [(12, 8, "gelu"), (8, 5, "gelu"), (5, 3, "tanh")]
    assert widths(ae.decoder) == [(3, 5, "gelu"), (5, 8, "gelu"), (8, 12, "sigmoid")]
    tied = model([12, 8, 5, 3], "gelu", "tanh", "sigmoid", tied=True)
    assert widths(tied.decoder) == widths(ae.decoder)


def test_defaults_are_relu_inside_and_identity_at_the_code_and_the_output() -> None:
    assert widths(model().encoder) == [(12, 8, "relu"), (8, 3, "identity")]
    assert widths(model().decoder) == [(3, 8, "relu"), (8, 12, "identity")]
    assert widths(model([12, 3]).encoder) == [(12, 3, "identity")]


def test_decoder_features_set_the_decoder_alone() -> None:
    ae = model((12, 8, 3), decoder_features=(3, 5, 9, 12), output_activation="tanh")
    assert widths(ae.encoder) == widths(model().encoder)
    assert widths(ae.decoder) == [(3, 5, "relu"), (5, 9, "relu"), (9, 12, "tanh")]
    assert ae(torch.zeros(2, 12)).shape == (2, 12)


def test_dtype_reaches_every_parameter() -> None:
    for tied in (False, True):
        assert {p.dtype for p in model(tied=tied, dtype=torch.float64).parameters()} == {torch.float64}


@pytest.mark.parametrize(
    "features", [[12], [], [12, 0], [12, -3], [12, 2.5], "12", 12, None, [12, None], [12, float("inf")]]
)
def test_bad_widths(features: Any) -> None:
    text = f"must be two or more positive whole numbers, like [784, 128]; got {features!r}"
    with pytest.raises(ValueError, match=re.escape(f"DenseAutoencoder: features {text}")):
        DenseAutoencoder(features)
    if features is not None:
        with pytest.raises(ValueError, match=re.escape(f"DenseAutoencoder: decoder_features {text}")):
            DenseAutoencoder([12, 3], decoder_features=features)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"decoder_features": [3, 8, 11]}, "decoder_features must run from 3 to 12; got [3, 8, 11]"),
        ({"decoder_features": [4, 8, 12]}, "decoder_features must run from 3 to 12; got [4, 8, 12]"),
        ({"decoder_features": [3, 8, 12], "tied": True}, "decoder_features must be None when tied=True; got both"),
        ({"activation": "rel"}, "activation must be one of identity, relu, "),
        ({"code_activation": "tanhh"}, "got 'tanhh'; did you mean 'tanh'?"),
        ({"output_activation": "Sigmoid"}, "got 'Sigmoid'; did you mean 'sigmoid'?"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], text: str) -> None:
    argument = next(iter(options))
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        DenseAutoencoder([12, 8, 3], **options)
    assert str(caught.value).startswith(f"DenseAutoencoder: {argument} must ")


@pytest.mark.parametrize(
    "options",
    [{}, {"tied": True}, {"decoder_features": [3, 12]}, {"activation": "gelu", "code_activation": "tanh"}],
)
def test_config_rebuilds_the_model(options: dict[str, Any]) -> None:
    ae = model([12, 8, 3], output_activation="sigmoid", **options)
    again = DenseAutoencoder(**ae.config())
    assert (repr(again), again.config()) == (repr(ae), ae.config())
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in ae.state_dict().items()}


def test_repr_shows_every_layer_and_which_are_tied() -> None:
    text = repr(model(tied=True))
    for line in ("LinearAct(12, 8, bias=True, activation='relu')", "TiedLinearAct(3, 8, activation='relu', tied)"):
        assert line in text
    assert "tied" not in repr(model())


# ---------------------------------------------------------------- tied weights


def test_a_tied_weight_is_one_parameter() -> None:
    ae = model(tied=True)
    names = [f"encoder.{i}.{p}" for i in (0, 1) for p in ("weight", "bias")] + ["decoder.0.bias", "decoder.1.bias"]
    assert list(ae.state_dict()) == names
    assert [name for name, _ in ae.named_parameters(remove_duplicate=False)] == names


def test_a_tied_gradient_is_the_sum_of_both_uses() -> None:
    ae = model(tied=True, output_activation="tanh", dtype=torch.float64)
    nn.init.normal_(ae.decoder[0].bias)
    x = torch.from_numpy(data(dtype=np.float64))
    ae.loss(x).backward()
    (w1, b1), (w2, b2) = ((layer.weight.detach(), layer.bias.detach()) for layer in ae.encoder)
    c1, c2 = (layer.bias.detach() for layer in ae.decoder)
    uses = [t.clone().requires_grad_() for t in (w1, w2, w2.t(), w1.t())]
    code = F.linear(torch.relu(F.linear(x, uses[0], b1)), uses[1], b2)
    F.mse_loss(torch.tanh(F.linear(torch.relu(F.linear(code, uses[2], c1)), uses[3], c2)), x).backward()
    e1, e2, d2, d1 = (use.grad for use in uses)
    assert all(part.abs().max() > 1e-6 for part in (e1, e2, d1, d2))  # a lost part would show
    torch.testing.assert_close(ae.encoder[0].weight.grad, e1 + d1.t())
    torch.testing.assert_close(ae.encoder[1].weight.grad, e2 + d2.t())


def test_deepcopy_keeps_the_tie_inside_the_copy() -> None:
    ae, x = model(tied=True), torch.ones(2, 3)
    before = ae.decode(x)
    clone = copy.deepcopy(ae)
    with torch.no_grad():
        clone.encoder[1].weight.zero_()
        clone.encoder[0].weight.zero_()
    assert torch.equal(ae.decode(x), before)
    assert not clone.decode(x).any()  # the biases start at zero


# ---------------------------------------------------------------- the same numbers as torch.nn


@pytest.mark.parametrize("shape", [(50, 12), (1, 12), (0, 12), (12,), (4, 5, 12), (2, 0, 12)])
@pytest.mark.parametrize("grad", [True, False])
def test_calls_equal_a_stack_of_linear_layers(shape: tuple[int, ...], grad: bool) -> None:
    ae = model(activation="gelu", code_activation="tanh", output_activation="sigmoid")
    x = torch.randn(shape)
    with torch.set_grad_enabled(grad):
        code, y = ae.encode(x), ae(x)
        torch.testing.assert_close(code, plain(ae.encoder, x), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(y, plain(ae.decoder, plain(ae.encoder, x)), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ae.decode(code), y, rtol=0, atol=0)
        assert code.requires_grad == y.requires_grad == grad


def test_loss_and_its_gradients_equal_plain_pytorch_also_for_another_target() -> None:
    x, noisy = torch.from_numpy(data()), torch.from_numpy(data(seed=1))
    for target in (None, x):
        ours, twin = model(), model()
        ours.loss(noisy, target).backward()
        F.mse_loss(plain(twin.decoder, plain(twin.encoder, noisy)), noisy if target is None else target).backward()
        for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)
    assert ours.loss(noisy, x) != ours.loss(noisy)
    assert ours.loss(noisy).shape == ()


def test_a_code_is_differentiable() -> None:
    ae, x = model(), torch.from_numpy(data()).requires_grad_()
    ae.encode(x).sum().backward()
    twin = x.detach().clone().requires_grad_()
    plain(ae.encoder, twin).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    assert ae.encoder[0].weight.grad.abs().sum() > 0
    assert ae.decoder[0].weight.grad is None


def test_score_is_the_mean_squared_error_of_each_row() -> None:
    ae, x = model(), data()
    with torch.no_grad():
        wanted = (plain(ae.decoder, plain(ae.encoder, torch.from_numpy(x))).numpy() - x).astype(float) ** 2
    tensor, array = ae.score(torch.from_numpy(x)), ae.score(x)
    np.testing.assert_allclose(array, wanted.mean(1), rtol=1e-6)
    assert (array.dtype, array.shape, tensor.shape) == (np.float32, (50,), (50,))
    assert torch.equal(tensor, torch.from_numpy(array))
    assert not tensor.requires_grad


def test_state_dict_goes_to_a_sequential_and_back() -> None:
    torch.manual_seed(1)
    parts = [("encoder", nn.Sequential(nn.Linear(12, 3))), ("decoder", nn.Sequential(nn.Linear(3, 12)))]
    twin, ae, x = nn.Sequential(OrderedDict(parts)), model([12, 3]), torch.from_numpy(data())
    assert not torch.equal(ae(x), twin(x))
    ae.load_state_dict(twin.state_dict())
    torch.testing.assert_close(ae(x), twin(x), rtol=1e-6, atol=1e-7)
    other = model([12, 3], seed=2)
    twin.load_state_dict(other.state_dict())
    torch.testing.assert_close(other(x), twin(x), rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- summary


@pytest.mark.parametrize("tied", [False, True])
def test_summary_counts_parameters_and_flops(tied: bool) -> None:
    ae = model([784, 256, 12], tied=tied)
    lines = [line.split() for line in ae.summary().splitlines()]
    wanted, note = [], ["(tied)"] if tied else []
    for name, k, n, act in (("encoder.0", 784, 256, "relu"), ("encoder.1", 256, 12, "identity")):
        wanted.append([name, f"{k}", "->", f"{n}", act, f"{k * n + n:,}", f"{2 * k * n:,}"])
    for name, k, n, act in (("decoder.0", 12, 256, "relu"), ("decoder.1", 256, 784, "identity")):
        count = n if tied else k * n + n
        wanted.append([name, f"{k}", "->", f"{n}", *note, act, f"{count:,}", f"{2 * k * n:,}"])
    assert [line for line in lines if line and line[0].startswith(("encoder", "decoder"))] == wanted
    total = sum(p.numel() for p in ae.parameters())
    assert ["total", f"{total:,}", f"{4 * (784 * 256 + 256 * 12):,}"] in lines
    assert ae.summary().splitlines()[-1] == " 784 values become 12: compression ratio 65.3 to 1"


def test_summary_names_the_scaler() -> None:
    ae = model()
    ae.scaler = Scaler.fit(data(), "unit")
    assert ae.summary().endswith(" trained on data scaled to 'unit': pass model.scaler.transform(x)")
    ae.scaler = Scaler.fit(data(), "none")
    assert ae.summary() == model().summary()
