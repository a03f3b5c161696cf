"""Bottlenecks that raise the loss: their values and gradients against autograd in fp64 and against Keras' and Rifai's
formulas written out; what a step trains; what they exclude."""

from typing import Any

import pytest
import torch
from cases import uniform
from fastae_kernels.elementwise import ACTIVATIONS
from torch import Tensor, nn
from torch.func import jacrev, vmap

import fastae
from fastae import ConvAutoencoder, DenseAutoencoder
from fastae.bottlenecks import L1, Contractive, KLSparse
from fastae.engine.penalties import code_penalty, contraction

pytestmark = pytest.mark.usefixtures("one_thread")
X = uniform(24, 11, low=0.05, high=0.95, dtype=torch.float64)
PARTS: dict[str, dict[str, Any]] = {
    "l1": {"bottleneck": L1(0.3)},
    "kl_sparse": {"bottleneck": KLSparse(0.1, 0.2), "code_activation": "sigmoid"},
    "contractive": {"bottleneck": Contractive(0.3), "activation": "tanh", "code_activation": "sigmoid"},
}
every_part = pytest.mark.parametrize("name", PARTS)


def model(features: list[int], dtype: torch.dtype = torch.float64, **options: Any) -> DenseAutoencoder:
    torch.manual_seed(0)
    return DenseAutoencoder(features, dtype=dtype, **options)


def gradients(ae: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in ae.parameters() if p.grad is not None]


def jacobians(ae: DenseAutoencoder, x: Tensor) -> Tensor:
    """||dz / dx||^2 of each row, by PyTorch's own Jacobian of layers by PyTorch's own ops."""

    def encoded(row: Tensor) -> Tensor:
        for layer in ae.encoder:
            row = ACTIVATIONS[layer.activation].differentiable(nn.functional.linear(row, layer.weight, layer.bias))
        return row

    return vmap(jacrev(encoded))(x).square().sum((1, 2))


@pytest.mark.parametrize("features", [[11, 4], [11, 6, 4], [11, 13, 6, 4]])
@pytest.mark.parametrize("activation", ["tanh", "relu", "silu"])
def test_contraction_is_the_norm_of_the_jacobian(features: list[int], activation: str) -> None:
    ae = model(features, activation=activation, code_activation="sigmoid")
    weight = torch.rand(len(X), dtype=torch.float64)
    made = contraction(Contractive(0.7), [*ae.encoder], X, weight)
    wanted = 0.7 * (weight * jacobians(ae, X)).mean()
    torch.testing.assert_close(made, wanted, rtol=1e-12, atol=0)
    parameters = [*ae.encoder.parameters()]
    for grad, truth in zip(torch.autograd.grad(made, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-14)


def test_contraction_of_many_rows_is_that_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    ae = model([11, 6, 4], activation="tanh", bottleneck=Contractive(0.3))
    whole = ae.loss(X).detach()
    step = fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), lr=0.0), len(X))
    step(X)
    grads = gradients(ae)
    monkeypatch.setattr("fastae.engine.penalties.MOST_VALUES", 6 * 4 * 5)  # five rows at once
    torch.testing.assert_close(ae.loss(X).detach(), whole, rtol=1e-12, atol=0)
    step(X)
    for grad, before in zip(gradients(ae), grads, strict=True):
        torch.testing.assert_close(grad, before, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_are_derivatives(name: str) -> None:
    p = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    if name == "logit":
        p = torch.linspace(0.01, 0.99, 101, dtype=torch.float64, requires_grad=True)
    f = ACTIVATIONS[name]
    if name == "softplus":
        assert f.slope(torch.tensor(21.0, dtype=torch.float64)) == 1
    (truth,) = torch.autograd.grad(f.differentiable(p).sum(), p, create_graph=True)
    slope = f.slope(p)
    torch.testing.assert_close(slope, truth, rtol=1e-10, atol=1e-12)
    if truth.requires_grad and slope.requires_grad:
        (second,) = torch.autograd.grad(slope.sum(), p)
        (wanted,) = torch.autograd.grad(truth.sum(), p)
        torch.testing.assert_close(second, wanted, rtol=1e-9, atol=1e-11)


def test_l1_and_kl_sparse_by_hand() -> None:
    z, r = torch.rand(7, 3, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    torch.testing.assert_close(code_penalty(L1(2.0), -z, r), 2 * (z * r[:, None]).sum() / 7)
    mean = (z * r[:, None]).sum(0) / r.sum()
    laws = [torch.distributions.Bernoulli(probs=p) for p in (torch.full_like(mean, 0.05), mean)]
    wanted = 3 * torch.distributions.kl_divergence(*laws).sum()
    torch.testing.assert_close(code_penalty(KLSparse(0.05, 3.0), z, r), wanted, rtol=1e-4, atol=0)


def test_kl_sparse_is_finite_where_a_unit_is_always_on_or_off() -> None:
    z = torch.tensor([[0.0, 1.0]] * 4, requires_grad=True)
    penalty = code_penalty(KLSparse(0.05, 1.0), z, None)
    (grad,) = torch.autograd.grad(penalty, z)
    assert bool(penalty.isfinite())
    assert bool(grad.isfinite().all())
    assert bool((grad[:, 0] < 0).all() & (grad[:, 1] > 0).all())  # on with the one, off with the other


@every_part
@pytest.mark.parametrize("features", [[11, 4], [11, 6, 4]])
@pytest.mark.parametrize("more", [{}, {"tied": True}, {"likelihood": "bernoulli"}], ids=["plain", "tied", "bernoulli"])
def test_a_step_trains_what_loss_says(name: str, features: list[int], more: dict[str, Any]) -> None:
    ae = model(features, **PARTS[name], **more)
    weight = torch.rand(len(X), dtype=torch.float64)
    ae.loss(X, None, weight).backward()
    wanted, value = gradients(ae), ae.loss(X, None, weight).detach()
    step = fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), lr=0.0), len(X))
    for _ in range(2):  # recorded, and replayed
        torch.testing.assert_close(step(X, sample_weight=weight), value, rtol=1e-12, atol=0)
        for grad, truth in zip(gradients(ae), wanted, strict=True):
            torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-15)
    plain = DenseAutoencoder(**{k: v for k, v in ae.config().items() if k != "bottleneck"}).double()
    plain.load_state_dict(ae.state_dict())
    raised = value - plain.loss(X, None, weight).detach()
    torch.testing.assert_close(step.penalty(), raised, rtol=1e-9, atol=0)


@every_part
def test_a_step_of_the_kernels_trains_what_loss_says(name: str) -> None:
    ae = model([11, 6, 4], torch.float32, **PARTS[name])
    x = X.float()
    ae.loss(x).backward()
    wanted, value = gradients(ae), ae.loss(x).detach()
    with fastae.use_backend("triton"):
        step = fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), lr=0.0), len(x))
    torch.testing.assert_close(step(x), value, rtol=1e-5, atol=1e-7)
    for grad, truth in zip(gradients(ae), wanted, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-6)


@every_part
def test_frozen_layers_and_islands(name: str) -> None:
    """An encoder of foreign modules behind the code's layer, and one whose first layer is frozen."""
    ae = model([11, 6, 4], **PARTS[name])
    ae.encoder[0].requires_grad_(False)
    ae.decoder = nn.Sequential(ae.decoder[0], nn.Sequential(nn.LayerNorm(6, dtype=torch.float64), ae.decoder[1]))
    ae.loss(X).backward()
    wanted = gradients(ae)
    step = fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), lr=0.0), len(X))
    for _ in range(2):
        step(X)
        for grad, truth in zip(gradients(ae), wanted, strict=True):
            torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-15)


@every_part
def test_a_penalty_does_what_it_is_for(name: str) -> None:
    rows = uniform(256, 11, low=0, high=1)
    measures = {
        "l1": lambda ae: ae.encode(rows).abs().mean(),
        "kl_sparse": lambda ae: (ae.encode(rows).mean(0) - 0.1).abs().mean(),
        "contractive": lambda ae: jacobians(ae, rows).mean(),
    }
    found = {}
    for with_it in (False, True):
        options = {k: v for k, v in PARTS[name].items() if k != "bottleneck" or with_it}
        ae = model([11, 6, 4], torch.float32, **options)
        history = ae.fit(rows, epochs=40, lr=1e-2, batch_size=64, progress=False)
        found[with_it] = float(measures[name](ae).detach())
        assert len(history.penalty) == (40 if with_it else 0)
        assert all(0 <= raised <= loss for raised, loss in zip(history.penalty, history.loss, strict=False))
    assert found[True] < 0.5 * found[False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L1(-1), "L1: c must be a number at least 0; got -1"),
        (lambda: KLSparse(0), "KLSparse: rho must be above 0; got 0"),
        (lambda: KLSparse(1), "KLSparse: rho must be a number between 0 and 1, 1 excluded; got 1"),
        (lambda: KLSparse(0.1, -1), "KLSparse: c must be a number at least 0; got -1"),
        (lambda: Contractive(float("nan")), "Contractive: c must be a number at least 0; got nan"),
        (lambda: model([11, 4], bottleneck="l1"), "DenseAutoencoder: bottleneck: l1 needs c; got 'l1'"),
        (lambda: model([11, 4], bottleneck="kl_sparse"), "code_activation must be 'sigmoid' beside kl_sparse; got 'id"),
        (
            lambda: model([11, 4], bottleneck="contractive:1", dropout=0.5),
            r"DenseAutoencoder: dropout must be 0 beside a contractive code; got 0\.5",
        ),
        (
            lambda: ConvAutoencoder((1, 8, 8), bottleneck="contractive:1"),
            "ConvAutoencoder: bottleneck must not be contractive: the encoder is not of dense layers",
        ),
        (
            lambda: ConvAutoencoder((1, 8, 8), bottleneck="kl_sparse", code_activation="sigmoid"),
            r"ConvAutoencoder: code must be a width beside kl_sparse, whose units lie in \(0, 1\); got None",
        ),
        (
            lambda: model([11, 4], bottleneck="l1:0.1").sample(2),
            "sample: bottleneck must be Variational; got a model without one",
        ),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_contractive_encoder_of_other_layers_is_refused() -> None:
    ae = model([11, 6, 4], bottleneck="contractive:0.1")
    ae.encoder.insert(1, nn.BatchNorm1d(6))
    for call in (lambda: ae.loss(X), lambda: ae.fit(X, precision="float64", progress=False)):
        with pytest.raises(ValueError, match="encoder must be of plain layers beside a contractive code; a layer is a"):
            call()
