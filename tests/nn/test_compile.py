"""`torch.compile`: one graph, no more compilations than plain PyTorch for any sequence of batches; `torch.export`."""

import copy
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, EAGER, normal
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastae
from fastae import DenseAutoencoder, LinearAct
from fastae.likelihoods import Huber

# Dynamo itself instantiates autograd.Function, and Inductor imports TorchScript, which warn.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

SIZES = (6, 7, 33, 2, 6)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Counted:
    """A function compiled without graph breaks, and how often."""

    def __init__(self, function: Callable[..., Tensor], backend: str = "aot_eager", **options: object) -> None:
        self.counter = CompileCounterWithBackend(backend)
        self.run = torch.compile(function, backend=self.counter, fullgraph=True, **options)

    @property
    def graphs(self) -> int:
        return self.counter.frame_count


def train_and_infer(model: nn.Module, twin: nn.Module, backend: str) -> list[int]:
    """Graphs after each batch size; training and inference alternate, values and gradients must agree with the twin."""
    compiled, graphs = Counted(model, backend), []
    for rows in SIZES:
        x = normal(rows, 12, seed=rows)
        losses = [F.mse_loss(y, x) for y in (compiled.run(x), twin(x))]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled.run(x), twin(x))
        model.train()
        graphs.append(compiled.graphs)
    return graphs


class Twin(nn.Sequential):
    """What a DenseAutoencoder is in plain PyTorch."""

    def __init__(self, activation: str) -> None:
        super().__init__(nn.Linear(12, 8), nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 12))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = EAGER[self.activation](self[0](x))
        return self[3](EAGER[self.activation](self[2](self[1](h))))


def autoencoder(activation: str = "gelu", **options: object) -> tuple[DenseAutoencoder, Twin]:
    torch.manual_seed(0)
    model, twin = DenseAutoencoder([12, 8, 4], activation=activation, **options), Twin(activation)
    if not options:
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.data.copy_(mine.data)
    return model, twin


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.integrations)])
def test_no_more_graphs_than_plain_pytorch(backend: str) -> None:
    """Two for the first size, training and not, and two for any size."""
    model, twin = autoencoder()
    mine = train_and_infer(model, copy.deepcopy(twin), backend)
    if backend != "inductor":
        torch._dynamo.reset()
        assert mine == train_and_infer(twin, copy.deepcopy(twin), backend)
    assert mine == [2, 4, 4, 4, 4]


def test_one_graph_for_any_size_if_told_so() -> None:
    model, _ = autoencoder()
    compiled = Counted(model, dynamic=True)
    for rows in SIZES:
        compiled.run(normal(rows, 12)).sum().backward()
    assert compiled.graphs == 1


def test_a_size_at_which_the_implementation_changes() -> None:
    """`auto` on some CPUs takes oneDNN from 2^23 multiply-adds: 32 rows here. Each call of one graph decides."""
    layer = LinearAct(512, 512)
    compiled = Counted(layer)
    for rows in (3, 6, 31, 33, 200, 4):
        x = normal(rows, 512, seed=rows)
        layer.zero_grad()
        y = compiled.run(x)
        y.sum().backward()
        mine = [y.detach(), layer.weight.grad.clone()]
        layer.zero_grad()
        eager = layer(x)
        eager.sum().backward()
        assert torch.equal(mine[0], eager), "another implementation than the eager call's"
        torch.testing.assert_close(mine[1], layer.weight.grad, rtol=1e-4, atol=1e-4)
    assert compiled.graphs == 2


@pytest.mark.parametrize("method", ["loss", "score", "encode", "decode"])
def test_the_methods_of_an_autoencoder(method: str) -> None:
    model, _ = autoencoder()
    compiled = Counted(getattr(model, method), "aot_eager" if method == "loss" else "eager")
    for rows in SIZES:
        x = normal(rows, 4 if method == "decode" else 12, seed=rows)
        if method == "loss":
            mine = torch.autograd.grad(compiled.run(x), [*model.parameters()])
            theirs = torch.autograd.grad(model.loss(x), [*model.parameters()])
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled.run(x), getattr(model, method)(x))
    assert compiled.graphs == (4 if method == "loss" else 2)


def test_the_functions_and_the_loss() -> None:
    w, b = normal(4, 12).requires_grad_(), normal(4).requires_grad_()
    functions = {
        "linear_act_mse and linear_act_loss": lambda x: (
            fastae.linear_act_mse(x, w, b, x[:, :4].detach(), "relu")
            + fastae.linear_act_loss(x, w, b, x[:, :4].detach(), "relu", Huber(0.3), "sum")
            + fastae.linear_act_loss(x, w, b, x[:, :4].detach(), "gelu", "mae")
        ),
        "MSELoss": lambda x: fastae.MSELoss()(fastae.linear_act(x, w, b, "tanh"), x[:, :4]),
        "three dimensions": lambda x: fastae.linear_act(x.view(-1, 1, 12), w, b, "silu").sum(),
    }
    for function in functions.values():
        compiled = Counted(function)
        for rows in SIZES:
            x = normal(rows, 12, seed=rows)
            mine, theirs = (torch.autograd.grad(f(x), [w, b]) for f in (compiled.run, function))
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert compiled.graphs == 2


def test_autocast_tied_weights_checkpoints_and_transforms() -> None:
    x = normal(5, 12)
    tied, _ = autoencoder(tied=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = Counted(tied).run(x)
        assert torch.equal(y, tied(x))
    y.sum().backward()
    layer = LinearAct(12, 4, activation="gelu")
    for function in (
        lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False),
        lambda x: torch.func.vmap(layer)(x),
        lambda x: torch.func.grad(lambda v: layer(v).sum())(x),
    ):
        torch.testing.assert_close(Counted(function).run(x), function(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.p = nn.Linear(12, 8), 0.0
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.dropout(F.relu(self.fc(x)), self.p, self.training))


def test_a_patched_model() -> None:
    torch.manual_seed(0)
    plain = Net()
    patched = copy.deepcopy(plain)
    assert len(fastae.patch(patched).replaced) == 2
    assert train_and_infer(patched, plain, "aot_eager") == [2, 4, 4, 4, 4]


def test_a_compiled_model_that_is_patched_and_unpatched() -> None:
    torch.manual_seed(0)
    model, x = Net(), normal(3, 12)
    compiled = Counted(model)
    before = compiled.run(x)
    for change in (fastae.patch, fastae.unpatch):
        change(model)
        torch.testing.assert_close(compiled.run(x), before)


# ---------------------------------------------------------------- torch.export


@pytest.mark.parametrize(("activation", "tied"), [*product(ACTIVATIONS, [False]), ("relu", True)])
def test_export_is_plain_pytorch(activation: str, tied: bool) -> None:
    """What was exported needs no fastae, and takes any number of rows."""
    model = DenseAutoencoder([12, 8, 4], activation=activation, tied=tied)
    for strict in (False, True) if activation == "relu" else (False,):
        dynamic = ({0: torch.export.Dim("rows")},)
        program = torch.export.export(model, (normal(5, 12),), dynamic_shapes=dynamic, strict=strict)
        ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert all(op.startswith("aten.") for op in ops), ops
        x = normal(9, 12, seed=1)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_export_of_a_patched_model_and_of_losses() -> None:
    model = Net().eval()
    fastae.patch(model)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ae = DenseAutoencoder([12, 8, 4])

        def forward(self, x: Tensor) -> Tensor:
            return self.ae.loss(x)

    class LinearLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return fastae.linear_act_loss(x, self.fc.weight, self.fc.bias, x, "sigmoid", "huber", "none")

    for exported in (model, Loss(), LinearLoss()):
        program = torch.export.export(exported, (normal(5, 12),), dynamic_shapes=({0: torch.export.Dim("rows")},))
        assert not any("fastae" in str(node.target) for node in program.graph.nodes)
        x = normal(9, 12, seed=1)
        torch.testing.assert_close(program.module()(x), exported(x))


# ---------------------------------------------------------------- TorchScript


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript_is_refused_with_the_ways_out() -> None:
    patched = nn.Sequential(nn.Linear(12, 4), nn.ReLU())
    fastae.patch(patched)
    tied = DenseAutoencoder([12, 4], tied=True)
    refused = {
        "linear_act": [(torch.jit.trace, LinearAct(12, 4)), (torch.jit.trace, tied), (torch.jit.trace, patched)],
        "LinearAct": [(torch.jit.script, LinearAct(12, 4)), (torch.jit.script, patched)],
        "DenseAutoencoder": [(torch.jit.script, tied)],
        "TiedLinearAct": [(torch.jit.script, tied.decoder)],
        "MSELoss": [(torch.jit.script, fastae.MSELoss())],
    }
    for name, cases in refused.items():
        for function, module in cases:
            arguments = (normal(5, 12),) if function is torch.jit.trace else ()
            with pytest.raises(
                RuntimeError, match=rf"^{name}: the caller must not be TorchScript .* use torch\.compile"
            ):
                function(module, *arguments)
    for function in (fastae.linear_act, fastae.linear_act_loss, fastae.linear_act_mse, fastae.mse_loss):
        with pytest.raises(RuntimeError, match=rf"^{function.__name__}: the caller must not be TorchScript"):
            torch.jit.script(function)
    fastae.unpatch(patched)
    torch.jit.trace(patched, (normal(5, 12),))
