"""What works with `torch.nn` works after an import is changed: names, what is kept for the backward pass, the tails."""

from __future__ import annotations

import contextvars
import copy
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, EAGER
from torch import Tensor, nn

import fastae
from fastae.nn import backend as _backend

MODULES = {
    "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "gelu": nn.GELU, "silu": nn.SiLU, "mish": nn.Mish,
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "softplus": nn.Softplus,
}  # fmt: skip


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def twins(activation: str, dtype: torch.dtype = torch.float64) -> tuple[fastae.LinearAct, nn.Sequential]:
    """(the fused layer, the pair of torch.nn) with the same parameters."""
    torch.manual_seed(0)
    mine = fastae.LinearAct(5, 4, activation=activation, dtype=dtype)
    theirs = nn.Sequential(nn.Linear(5, 4, dtype=dtype), MODULES[activation]())
    theirs[0].load_state_dict(mine.state_dict())
    return mine, theirs


def outcome(function: Callable[[], None]) -> str:
    """The kind of error, or nothing."""
    try:
        function()
    except RuntimeError as error:
        return "modified" if "modified by an inplace operation" in str(error) else str(error)
    return ""


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("activation", MODULES)
def test_a_result_may_be_changed_in_place_where_pytorchs_pair_allows_it(activation: str, backend: str) -> None:
    for layer in (pair := twins(activation)):
        layer(draw(3, 5)).mul_(2)  # without a backward pass: always

    def run(layer: nn.Module) -> None:
        y = layer(draw(3, 5)).add_(1)
        y.square().sum().backward()

    found, wanted = outcome(lambda: run(pair[0])), outcome(lambda: run(pair[1]))
    assert found == wanted
    if not wanted:
        torch.testing.assert_close(pair[0].weight.grad, pair[1][0].weight.grad)


@pytest.mark.parametrize("activation", MODULES)
def test_only_what_a_gradient_needs_is_kept(activation: str, backend: str) -> None:
    """A step of the optimizer between two backward passes; a frozen weight and its x changed in place; memory."""

    def stepped(layer: nn.Module) -> None:
        a, b = layer(draw(3, 5)), layer(draw(3, 5, seed=1))
        a.sum().backward()
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(1)
        b.sum().backward()

    def frozen(layer: nn.Module) -> None:
        weight = next(layer.parameters()).requires_grad_(False)
        x = draw(3, 5)
        y = layer(x)
        x.add_(1)
        weight.add_(1)
        y.sum().backward()

    for run in (stepped, frozen):
        mine, theirs = twins(activation)
        assert outcome(lambda: run(mine)) == outcome(lambda: run(theirs)) == ""  # noqa: B023
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad)


def test_a_frozen_layer_keeps_no_input_alive(backend: str) -> None:
    layer = fastae.LinearAct(5, 4, activation="gelu")
    layer.weight.requires_grad_(False)
    saved: list[int] = []
    x = torch.randn(3, 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.data_ptr()), t)[1], lambda t: t):
        layer(x)
    assert x.data_ptr() not in saved


@pytest.mark.parametrize("activation", ["leaky_relu", "elu", "softplus"])
def test_patch_keeps_a_model_whose_pairs_results_are_changed_in_place(activation: str, backend: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(6, 6), MODULES[activation]())
            self.g = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.f(x)
            h += x
            return self.g(h)

    torch.manual_seed(0)
    model = Block().double()
    plain, x = copy.deepcopy(model), draw(7, 6)
    assert len(fastae.patch(model).replaced) == 1
    for m in (model, plain):
        m(x).square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


# ---------------------------------------------------------------- the tails


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"identity"}))
def test_gradients_in_the_tail_are_as_near_to_the_truth_as_pytorchs(
    activation: str, dtype: torch.dtype, backend: str
) -> None:
    low, high = (0.01, 0.99) if activation == "logit" else (-12.0, 12.0)
    p = torch.linspace(low, high, 481).to(dtype)

    def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
        leaf = at.clone().requires_grad_()
        (dp,) = torch.autograd.grad(function(leaf).sum(), leaf)
        return dp.double()

    def layer(t: Tensor) -> Tensor:
        return fastae.linear_act(t[:, None], torch.ones(1, 1, dtype=dtype), None, activation)

    truth = gradient(EAGER[activation], p.double())
    errors = [
        ((gradient(f, p) - truth).abs() / truth.abs().clamp_min(1e-10)).max().item()  # gelu_tanh's own truth cancels
        for f in (layer, EAGER[activation])
    ]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps


# ---------------------------------------------------------------- names


def test_arguments_have_the_names_of_torch_nn(backend: str) -> None:
    x, y = draw(3, 5), draw(3, 4)
    mine, theirs = twins("relu")
    torch.testing.assert_close(mine(input=x), theirs(input=x))
    tied = fastae.DenseAutoencoder([5, 4], tied=True, dtype=torch.float64)
    torch.testing.assert_close(tied.decoder[0](input=y), tied.decoder[0](y))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(5, 5, dtype=torch.float64), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=self.act(self.fc(x)))

    model = Twice()
    wanted = model(x)
    assert len(fastae.patch(model).replaced) == 1
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), {}),
        ((None, None, "sum"), {}),
        (("sum",), {}),
        ((), {"reduction": "none"}),
        ((None, None), {"reduction": "sum"}),
    ],
)
def test_mse_loss_takes_what_its_twin_takes(
    arguments: tuple[object, ...], options: dict[str, str], backend: str
) -> None:
    mine = fastae.MSELoss(*arguments, **options)
    theirs = nn.MSELoss(reduction=mine.reduction)
    assert isinstance(mine, nn.MSELoss)
    assert mine.reduction == (options.get("reduction") or (arguments[-1] if arguments else None) or "mean")
    y, t = draw(3, 4), draw(3, 4, seed=1)
    torch.testing.assert_close(mine(y, t), theirs(y, t))
    with pytest.warns(UserWarning, match="Using a target size"):
        wide = mine(y, t[:1])
    torch.testing.assert_close(wide, F.mse_loss(y, t[:1].expand(3, 4), reduction=mine.reduction))


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_mse_loss_takes_the_deprecated_arguments_and_weights(backend: str) -> None:
    assert fastae.MSELoss(size_average=False).reduction == nn.MSELoss(size_average=False).reduction == "sum"
    assert fastae.MSELoss(reduce=False).reduction == "none"
    with pytest.raises(ValueError, match="MSELoss: reduction must be one of mean, sum, none; got 'avg'"):
        fastae.MSELoss("avg")
    y, t, weight = draw(3, 4).requires_grad_(), draw(3, 4, seed=1), draw(3, 4, seed=2).abs()
    for reduction in ("mean", "sum", "none"):
        found = fastae.mse_loss(y, t, reduction, weight)
        torch.testing.assert_close(found, F.mse_loss(y, t, reduction=reduction, weight=weight))
    with pytest.raises(ValueError, match=r"mse_loss: target and weight must be \[3, 4\] as input is; got \[3, 4\] and"):
        fastae.mse_loss(y, t, weight=weight[:1])


# ---------------------------------------------------------------- devices, sizes, threads


def test_meta_tensors_go_through_under_every_backend(backend: str) -> None:
    x = torch.empty(7, 5, device="meta")
    ae = fastae.DenseAutoencoder([5, 3], device="meta")
    assert fastae.LinearAct(5, 4, activation="gelu", device="meta")(x).shape == (7, 4)
    assert ae.loss(x).device.type == fastae.mse_loss(x, x).device.type == "meta"
    with torch.no_grad():
        assert ae.encode(x).shape == (7, 3)
        assert ae.score(x).shape == (7,)


@pytest.mark.parametrize("row_weight", [None, torch.empty(0)])
def test_the_mean_over_no_values_is_nan_as_in_pytorch(row_weight: Tensor | None, backend: str) -> None:
    assert F.mse_loss(torch.empty(0, 3), torch.empty(0, 3)).isnan()
    nothing = torch.empty(0, 2), torch.ones(3, 2), None, torch.empty(0, 3)
    assert fastae.linear_act_mse(*nothing, row_weight=row_weight).isnan()
    assert fastae.linear_act_mse(*nothing, reduction="sum", row_weight=row_weight) == 0


def test_use_backend_is_the_threads_own() -> None:
    entered, left = threading.Event(), threading.Event()
    seen: list[str] = []

    def other() -> None:
        with fastae.use_backend("triton"):
            entered.set()
            left.wait(10)
            seen.append(fastae.get_backend())

    before = fastae.get_backend()
    thread = threading.Thread(target=other)
    with fastae.use_backend("torch"):
        thread.start()
        entered.wait(10)
        seen.append(fastae.get_backend())
    assert fastae.get_backend() == before  # the other thread's block was entered last and goes on
    left.set()
    thread.join()
    assert seen == ["torch", "triton"]
    assert fastae.get_backend() == before


def test_a_block_that_is_left_in_another_context_leaves_nothing() -> None:
    def block() -> Iterator[None]:
        with fastae.use_backend("torch"):
            yield

    before, generator = fastae.get_backend(), block()
    contextvars.copy_context().run(next, generator)
    generator.close()
    assert fastae.get_backend() == before
    assert [b.name for b in _backend._blocks][1:] == []
    assert _backend._traced == before
