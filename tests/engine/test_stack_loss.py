"""`DenseAutoencoder.loss` and `score` as one function over the stack: gradients, and when it steps aside."""

import copy

import pytest
import torch
from accuracy import FLOOR, check, check_all
from cases import ACTIVATIONS, DTYPES, normal, uniform
from torch import Tensor, nn
from twins import plain, plain_loss

import fastae
from fastae.engine import library as _ops
from fastae.nn import library as _layer_ops


def model(dtype: torch.dtype = torch.float32, **options: object) -> fastae.DenseAutoencoder:
    torch.manual_seed(0)
    return fastae.DenseAutoencoder([17, 12, 5], **options).to(dtype)


def gradients(ae: fastae.DenseAutoencoder, loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(ae.parameters()))]


def data(dtype: torch.dtype, low: float = 0.2, high: float = 0.9) -> tuple[Tensor, Tensor]:
    return tuple(uniform(23, 17, low=low, high=high, dtype=dtype, seed=seed) for seed in (3, 4))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    for name in ("stack_loss", "stack_loss_backward", "stack_score", "linear_act_fwd", "linear_act_loss", "loss"):
        home = _ops if name.startswith("stack") else _layer_ops

        def spy(*args: object, op: object = getattr(home, name), name: str = name) -> object:
            seen.append(name)
            return op(*args)

        monkeypatch.setattr(home, name, spy)
    return seen


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_equal_autograds(activation: str, tied: bool, dtype: torch.dtype, backend: str) -> None:
    ae = model(dtype, activation=activation, tied=tied, output_activation="sigmoid")
    x, target = data(dtype)
    if activation == "logit":  # keep its argument inside (0, 1)
        with torch.no_grad():
            for layer in ae.encoder:
                layer.weight.mul_(0.1)
            for layer in (*ae.encoder, *ae.decoder):
                layer.bias.fill_(0.4)
    wide = copy.deepcopy(ae).double()
    loss, *grads = gradients(ae, ae.loss(x, target))
    plains, *plain_grads = gradients(ae, plain_loss(ae, x, target))
    truth, *truths = gradients(wide, plain_loss(wide, x.double(), target.double()))
    check(loss, plains, truth, FLOOR[dtype])  # hidden rows are rounded to dtype, whatever the loss comes in
    check_all(grads, plain_grads, truths)


def test_the_gradient_of_x_and_a_gradient_above(backend: str) -> None:
    ae, (x, target) = model(activation="silu"), data(torch.float32)
    x.requires_grad_()
    (3 * ae.loss(x, target)).backward()
    grad, x.grad = x.grad, None
    (3 * plain_loss(ae, x, target)).backward()
    torch.testing.assert_close(grad, x.grad)


@pytest.mark.parametrize("frozen", ["encoder", "decoder", "encoder.0.weight", "decoder.1.bias", "decoder.1"])
def test_frozen_parts(frozen: str, backend: str) -> None:
    ae, (x, target) = model(activation="gelu"), data(torch.float32)
    for name, p in ae.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    ae.loss(x, target).backward()
    ours = [p.grad for p in ae.parameters()]
    ae.zero_grad()
    plain_loss(ae, x, target).backward()
    for got, p in zip(ours, ae.parameters(), strict=True):
        assert (got is None) == (p.grad is None) == (not p.requires_grad)
        if got is not None:
            torch.testing.assert_close(got, p.grad)


def test_retain_graph_and_accumulation(backend: str) -> None:
    ae, (x, target) = model(), data(torch.float32)
    loss = ae.loss(x, target)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in ae.parameters()]
    loss.backward()
    for grad, p in zip(once, ae.parameters(), strict=True):
        torch.testing.assert_close(2 * grad, p.grad)


def test_gradients_of_gradients(backend: str) -> None:
    small = fastae.DenseAutoencoder([3, 4, 2], activation="silu", tied=True).double()
    x, target = normal(3, 3, dtype=torch.float64, seed=1), normal(3, 3, dtype=torch.float64, seed=2)
    parameters = list(small.parameters())
    assert torch.autograd.gradcheck(lambda *_: small.loss(x, target), parameters)
    assert torch.autograd.gradgradcheck(lambda *_: small.loss(x, target), parameters)


def test_fp16_gradients_do_not_vanish(backend: str) -> None:
    """2 (y - t) / n of many rows is near the smallest fp16; the chain between layers carries it without its 1 / n."""
    ae = model(torch.float16)
    x = uniform(1000, 17, low=0, high=1, dtype=torch.float16)
    target = plain(ae, x).detach() + 2e-2 * normal(1000, 17, dtype=torch.float16, seed=9)
    wide = copy.deepcopy(ae).double()
    truth = gradients(wide, plain_loss(wide, x.double(), target.double()))[1]

    def error(loss: Tensor) -> float:
        return ((gradients(ae, loss)[1].double() - truth).norm() / truth.norm()).item()

    assert error(ae.loss(x, target)) < error(plain_loss(ae, x, target)) / 2


# ---------------------------------------------------------------- one function, or not


def test_one_op_forward_and_one_backward(calls: list[str]) -> None:
    ae, (x, target) = model(), data(torch.float32)
    ae.loss(x, target).backward()
    assert calls == ["stack_loss", "stack_loss_backward"]
    calls.clear()
    with torch.no_grad():
        ae.loss(x)
    assert calls == ["linear_act_fwd"] * 3 + ["linear_act_loss"]


@pytest.mark.parametrize(
    "reason", ["hook", "3-D", "autocast", "subclass", "target gradient", "foreign layer", "weight_norm", "global hook"]
)
def test_steps_aside(reason: str, calls: list[str]) -> None:
    class Own(fastae.DenseAutoencoder):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1

    ae, (x, target) = model(), data(torch.float32)
    seen: list[object] = []
    handle = None
    if reason == "hook":
        ae.encoder[0].register_forward_hook(lambda *_: seen.append(1))
    elif reason == "subclass":
        ae = Own([17, 12, 5])
    elif reason == "target gradient":
        target.requires_grad_()
    elif reason == "foreign layer":
        ae.encoder[0] = nn.Linear(17, 12)
    elif reason == "weight_norm":
        nn.utils.parametrizations.weight_norm(ae.encoder[0])
    elif reason == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        cast = torch.autocast("cpu", torch.bfloat16, enabled=reason == "autocast")
        with cast, fastae.use_backend("triton"):
            loss = ae.loss(x[None], target[None]) if reason == "3-D" else ae.loss(x, target)
        loss.backward()
    finally:
        if handle is not None:
            handle.remove()
    assert "stack_loss" not in calls
    assert "loss" in calls
    assert not reason.endswith("hook") or seen
    torch.testing.assert_close(
        loss, fastae.mse_loss(ae(x), target), atol=1e-2 if reason == "autocast" else 1e-6, rtol=1e-5
    )


# ---------------------------------------------------------------- score


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_score(tied: bool, dtype: torch.dtype, backend: str) -> None:
    ae = model(dtype, activation="gelu", tied=tied)
    x, _ = data(dtype)
    wide = copy.deepcopy(ae).double()

    def errors(ae: fastae.DenseAutoencoder, x: Tensor) -> Tensor:
        return (plain(ae, x) - x).to(torch.promote_types(x.dtype, torch.float32)).square().mean(1).detach()

    check(ae.score(x), errors(ae, x), errors(wide, x.double()))


# ---------------------------------------------------------------- opcheck


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("op", ["stack_loss", "stack_loss_backward", "stack_score", "stack_encode"])
def test_opcheck(op: str, activation: str, backend: str) -> None:
    ae, (x, target) = model(activation=activation), data(torch.float32)
    layers = [*ae.encoder, *ae.decoder]
    weights, biases = [layer.weight.detach() for layer in layers], [layer.bias.detach() for layer in layers]
    activations, backends = [layer.activation for layer in layers], [backend] * 4
    _, dp, dx, outputs, kept = _ops.stack_loss(x, target, weights, biases, activations, backends, True)
    needs, scale = [True, True, False, True, True, False, True, True], torch.tensor(0.1)
    arguments = {
        "stack_loss": (x, target, weights, biases, activations, backends, True),
        "stack_loss_backward": (dp, dx, x, outputs, kept, weights, activations, backends, needs, scale, True),
        "stack_score": (x, weights, biases, activations, backend),
        "stack_encode": (x, weights, biases, activations, backend),
    }
    torch.library.opcheck(getattr(_ops, op), arguments[op])
