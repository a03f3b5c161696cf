"""torch.func, forward-mode derivatives, subclasses of Tensor, other layouts, fx and DTensors, beside `torch.nn`."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, EAGER, layer, normal
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from twins import close, gradients, pair, x

import fastae
from fastae import LinearAct

# Forward-mode derivatives in PyTorch import TorchScript, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

# ---------------------------------------------------------------- torch.func


def test_functional_call() -> None:
    for options in ({}, {"tied": True}):
        model, _ = pair(**options)
        other = {name: (p.detach() * 2).requires_grad_() for name, p in model.named_parameters()}
        y = functional_call(model, other, (x,))
        y.square().sum().backward()
        same = copy.deepcopy(model)
        same.load_state_dict(other)
        same(x).square().sum().backward()
        close({name: t.grad for name, t in other.items()}, gradients(same))
        assert all(p.grad is None for p in model.parameters())


def per_sample(model: nn.Module) -> dict[str, Tensor]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return F.mse_loss(functional_call(model, parameters, (row,)), row)

    return vmap(grad(loss), (None, 0))(parameters, x)


def test_vmap_and_gradients_of_each_sample() -> None:
    model, twin = pair()
    close(vmap(model)(x), twin(x))
    close(per_sample(model), per_sample(twin))
    close(vmap(model.loss)(x), vmap(twin.loss)(x))
    close(vmap(fastae.mse_loss)(x, x * 2), (x * x).mean(1))
    w, b = normal(4, 12), normal(4)
    mine = vmap(lambda r: fastae.linear_act_mse(r[None], w, b, r[None, :4], "relu", "sum"))(x)
    close(mine, (torch.relu(F.linear(x, w, b)) - x[:, :4]).square().sum(1))


def test_an_ensemble() -> None:
    for kind in (0, 1):
        models = [pair()[kind] for _ in range(3)]
        for i, model in enumerate(models):
            with torch.no_grad():
                model.encoder[0].weight.mul_(i)
        parameters, buffers = torch.func.stack_module_state(models)
        base = copy.deepcopy(models[0]).to("meta")
        y = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)), (0, 0, None))(parameters, buffers, x)  # noqa: B023
        close(y, torch.stack([model(x) for model in models]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_transform_of_a_layer(activation: str) -> None:
    args = layer(activation, 5, 4, 3, torch.float64)

    def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return EAGER[activation](F.linear(x, w, b))

    def mine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fastae.linear_act(x, w, b, activation)

    transforms: dict[str, Callable[[Callable[..., Tensor]], object]] = {
        "grad": lambda f: grad(lambda *a: f(*a).square().sum(), (0, 1, 2))(*args),
        "vjp": lambda f: vjp(f, *args)[1](normal(5, 4, dtype=torch.float64)),
        "jvp": lambda f: jvp(f, args, args),
        "jacrev": lambda f: jacrev(f, (0, 1))(*args),
        "jacfwd": lambda f: jacfwd(f, (0, 1))(*args),
        "hessian": lambda f: hessian(lambda *a: f(*a).sum())(*args),
        "vmap": lambda f: vmap(f, (0, None, None))(*args),
        "vmap of grad": lambda f: vmap(grad(lambda *a: f(*a).sum(), 1), (0, None, None))(*args),
    }
    for name, transform in transforms.items():
        torch.testing.assert_close(transform(mine), transform(eager), msg=lambda text, n=name: f"{n}: {text}")


def test_forward_mode() -> None:
    model, twin = pair()
    tangents = []
    for m in (model, twin):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(m(forward_ad.make_dual(x, x.sin()))).tangent)
    close(*tangents)


# ---------------------------------------------------------------- subclasses of Tensor, other layouts


class Named(Tensor):
    pass


def test_a_subclass_of_tensor_stays_one() -> None:
    model, twin = pair()
    for m in (model, twin):
        y = m(x.as_subclass(Named))
        assert type(y) is Named
        y.sum().backward()
    close(gradients(model), gradients(twin))
    assert type(fastae.mse_loss(x.as_subclass(Named), x)) is Named


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_sparse_and_nested_arguments() -> None:
    mine = LinearAct(12, 4)
    theirs = nn.Linear(12, 4)
    theirs.load_state_dict(mine.state_dict())
    close(mine(x.to_sparse()), theirs(x.to_sparse()).relu())
    rows = torch.nested.nested_tensor([x[:2], x[:3]], layout=torch.jagged)
    close(mine(rows).values(), theirs(rows).relu().values())


def test_fx_records_a_layer_as_one_call() -> None:
    model = nn.Sequential(LinearAct(12, 4), nn.Dropout(0.0))
    recorded = torch.fx.symbolic_trace(model)
    assert fastae.linear_act in [node.target for node in recorded.graph.nodes]
    close(recorded(x), model(x), 0)


# ---------------------------------------------------------------- DTensor


@pytest.fixture
def mesh():
    dist = torch.distributed
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors(mesh) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    w, b = normal(4, 12), normal(4)
    leaves = [w.clone().requires_grad_(), b.clone().requires_grad_()]
    wanted = torch.relu(F.linear(x, *leaves)).square().sum()
    wanted = torch.autograd.grad(wanted, leaves)
    rows = distribute_tensor(x, mesh, [Replicate()])
    for placement in (Shard(0), Replicate()):
        parts = [distribute_tensor(t, mesh, [placement]).requires_grad_() for t in (w, b)]
        y = fastae.linear_act(rows, *parts, "relu")
        assert isinstance(y, DTensor)
        found = torch.autograd.grad(y.square().sum(), parts)
        close([g.full_tensor() for g in found], [*wanted])
        for call in (
            lambda parts=parts: fastae.linear_act(x, *parts, "relu"),
            lambda parts=parts: fastae.linear_act_mse(x, *parts, normal(6, 4)),
            lambda parts=parts: fastae.linear_act_loss(x, *parts, normal(6, 4), loss="mae"),
            lambda: fastae.mse_loss(rows, x),
        ):
            with pytest.raises(TypeError, match=r"must be plain as \w+ is; got a DTensor: "):
                call()
        local = [p.to_local() for p in parts]
        close(fastae.linear_act(x, *local, "relu"), y.full_tensor())
