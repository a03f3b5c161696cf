"""What PyTorch programs do to modules beside calling them, done to fastae's and to their `torch.nn` twins alike."""

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, EAGER, layer, normal
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastae
from fastae import DenseAutoencoder, LinearAct

# Forward-mode derivatives in PyTorch import TorchScript, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

x = normal(6, 12)


class Twin(nn.Module):
    """The plain PyTorch autoencoder whose parameters have a DenseAutoencoder's names."""

    def __init__(self, activation: str = "tanh") -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 12))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        act = EAGER[self.activation]
        return self.decoder[1](act(self.decoder[0](self.encoder[1](act(self.encoder[0](x))))))

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(self(x).float(), x.float())


def pair(activation: str = "tanh", **options: object) -> tuple[DenseAutoencoder, Twin]:
    torch.manual_seed(0)
    model, twin = DenseAutoencoder([12, 8, 4], activation=activation, **options), Twin(activation)
    if not options:
        twin.load_state_dict(model.state_dict())
    return model, twin


def close(mine: object, theirs: object, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------- copies, conversions


@pytest.mark.parametrize("tied", [False, True])
def test_deepcopy_pickle_and_save(tied: bool) -> None:
    model, _ = pair(tied=tied)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(again(x), model(x))
        before = model(x)
        with torch.no_grad():
            again.encoder[0].weight.add_(1)  # a tied decoder follows its own encoder, not the first one's
        assert torch.equal(model(x), before)
        if tied:
            assert again.decoder[1].source is again.encoder[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("swap", [False, True])
def test_conversions(dtype: torch.dtype, swap: bool) -> None:
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for tied in (False, True):
            model, _ = pair(tied=tied)
            model = {torch.float16: model.half, torch.bfloat16: model.bfloat16, torch.float64: model.double}[dtype]()
            assert model(x.to(dtype)).dtype == dtype
            model.loss(x.to(dtype)).backward()
            assert {p.grad.dtype for p in model.parameters()} == {dtype}
            assert model.to("cpu", torch.float32)(x).dtype == torch.float32
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# ---------------------------------------------------------------- meta device and deferred initialisation


@pytest.mark.parametrize("tied", [False, True])
def test_made_on_the_meta_device_and_initialised_later(tied: bool) -> None:
    with torch.device("meta"):
        model = DenseAutoencoder([12, 8, 4], tied=tied)
        assert (model(torch.ones(3, 12)).shape, model.loss(torch.ones(3, 12)).shape) == ((3, 12), ())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))  # what memory may hold
    torch.manual_seed(0)
    for module in model.modules():  # the recipe of PyTorch's documentation of FSDP
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.manual_seed(0)
    close(model(x), DenseAutoencoder([12, 8, 4], tied=tied)(x), 0)


def test_skip_init_and_load_with_assign() -> None:
    layer = nn.utils.skip_init(LinearAct, 12, 4, activation="gelu")
    assert repr(layer) == repr(LinearAct(12, 4, activation="gelu"))
    model, twin = pair()
    with torch.device("meta"):
        empty = DenseAutoencoder([12, 8, 4], activation="tanh")
    empty.load_state_dict(twin.state_dict(), assign=True)
    close(empty(x), model(x), 0)


# ---------------------------------------------------------------- parametrizations

REPARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.parametrize("case", REPARAMETRIZED)
@pytest.mark.parametrize("tied", [False, True])
def test_parametrizations(case: str, tied: bool) -> None:
    """On a layer alone, on one in an autoencoder, and on one whose weight another layer shares."""
    torch.manual_seed(0)
    model = DenseAutoencoder([12, 8, 4], activation="tanh", tied=tied).eval()
    REPARAMETRIZED[case](model.encoder[0])
    w = [m.weight for m in model.encoder]
    w += [t.t() for t in w[::-1]] if tied else [m.weight for m in model.decoder]
    b = [m.bias for m in (*model.encoder, *model.decoder)]

    def plain() -> Tensor:
        h = torch.tanh(F.linear(x, w[0], b[0]))
        h = torch.tanh(F.linear(F.linear(h, w[1], b[1]), w[2], b[2]))
        return F.linear(h, w[3], b[3])

    wanted = torch.autograd.grad(F.mse_loss(plain(), x), [*model.parameters()])
    close(model(x), plain())
    close(torch.autograd.grad(model.loss(x), [*model.parameters()]), wanted)
    close(model.score(x), (plain() - x).square().mean(1).detach())
    with torch.no_grad():
        close(model.encode(x), F.linear(torch.tanh(F.linear(x, w[0], b[0])), w[1], b[1]))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_the_older_weight_norm() -> None:
    model, twin = pair()
    for m in (model, twin):
        nn.utils.weight_norm(m.encoder[0])
        m.loss(x).backward()
    close(gradients(model), gradients(twin))


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


# ---------------------------------------------------------------- training's habits


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    for activation in ("relu", "gelu"):  # y is kept, p is kept
        model, twin = pair(activation)
        for m in (model, twin):
            y = checkpoint(m, x.clone().requires_grad_(), use_reentrant=reentrant)
            y = checkpoint_sequential([*m.encoder, *m.decoder], 2, y, use_reentrant=reentrant)
            y.square().sum().backward()
        if activation == "relu":
            assert all(p.grad is not None for p in model.parameters())
        plain = copy.deepcopy(model)
        plain.zero_grad()
        y = plain(x)
        plain.decoder(plain.encoder(y)).square().sum().backward()
        close(gradients(model), gradients(plain))
    loss = checkpoint(model.loss, x, use_reentrant=False)
    close(torch.autograd.grad(loss, [*model.parameters()]), torch.autograd.grad(twin.loss(x), [*twin.parameters()]))


def test_hooks_of_modules() -> None:
    heard: list[list[object]] = []
    for m in (LinearAct(12, 4, activation="tanh"), nn.Sequential(nn.Linear(12, 4), nn.Tanh())):
        m.load_state_dict({k if isinstance(m, LinearAct) else f"0.{k}": v for k, v in PARAMETERS.items()})
        log: list[object] = []
        m.register_forward_pre_hook(lambda _, args, log=log: log.append(args[0].detach()))
        m.register_forward_hook(lambda _, args, y, log=log: log.append(y.detach()))
        m.register_full_backward_pre_hook(lambda _, dy, log=log: log.append(dy[0]))
        m.register_full_backward_hook(lambda _, dx, dy, log=log: log.extend((dx[0], dy[0])))
        m(x.clone().requires_grad_()).square().sum().backward()
        heard.append(log)
    assert len(heard[0]) == 5
    close(*heard)


PARAMETERS = {"weight": normal(4, 12), "bias": normal(4)}


def test_hooks_change_what_they_return() -> None:
    model, twin = pair()
    for m in (model, twin):
        m.encoder[0].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
        m.encoder[1].register_forward_hook(lambda _, args, y: y + 1)
        m.decoder[1].register_full_backward_hook(lambda _, dx, dy: (dx[0] * 3,))
        m.loss(x).backward()
    close(gradients(model), gradients(twin))


def test_hooks_of_parameters() -> None:
    for tied in (False, True):
        model, _ = pair(tied=tied)
        weight, heard = model.encoder[0].weight, []
        weight.register_hook(lambda g, heard=heard: heard.append("gradient"))
        weight.register_post_accumulate_grad_hook(lambda p, heard=heard: heard.append("accumulated"))
        model.loss(x).backward()
        assert heard == ["gradient", "accumulated"]


@pytest.mark.parametrize("part", ["encoder", "decoder", "encoder.0", "decoder.1.bias", "encoder.1.weight", ""])
def test_a_part_that_is_frozen(part: str) -> None:
    model, twin = pair()
    for m in (model, twin):
        for name, p in m.named_parameters():
            p.requires_grad_(not name.startswith(part) if part else False)
        if part:
            m.loss(x).backward()
    close(gradients(model), gradients(twin))
    assert model.loss(x).requires_grad == bool(part)


def test_gradients_accumulate() -> None:
    whole, parts = pair()[0], pair()[0]
    whole.loss(x).backward()
    for half in (x[:3], x[3:]):
        (parts.loss(half) / 2).backward()
    close(gradients(parts), gradients(whole))


def test_double_backward() -> None:
    """A penalty on the gradient of the input."""
    model, twin = pair()
    for m in (model, twin):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(m.loss(leaf), leaf, create_graph=True)
        (m.loss(leaf) + dx.square().sum()).backward()
    close(gradients(model), gradients(twin))


def test_inference_mode() -> None:
    model, _ = pair()
    with torch.inference_mode():
        inside = x.clone()
        results = [model(inside), model.loss(inside), model.score(inside), model.encode(inside)]
    assert all(r.is_inference() for r in results)
    close(results[0], model(x).detach())
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        model(inside)  # as with nn.Linear
    model(inside.clone()).sum().backward()


def test_threads() -> None:
    model, _ = pair("gelu")
    wanted = torch.autograd.grad(model.loss(x), [*model.parameters()])
    wrong: list[object] = []

    def work() -> None:
        try:
            for _ in range(50):
                with torch.no_grad():
                    model.encode(x)
                found = torch.autograd.grad(model.loss(x), [*model.parameters()])
                if not all(map(torch.equal, found, wanted)):
                    wrong.append(found)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


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
            lambda: fastae.mse_loss(rows, x),
        ):
            with pytest.raises(TypeError, match=r"must be plain as \w+ is; got a DTensor: "):
                call()
        local = [p.to_local() for p in parts]
        close(fastae.linear_act(x, *local, "relu"), y.full_tensor())


# ---------------------------------------------------------------- autocast and GradScaler


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("patched", [False, True])
def test_autocast_with_a_gradscaler(dtype: torch.dtype, patched: bool) -> None:
    losses = []
    for kind in (0, 1):
        model: nn.Module = pair()[kind]
        criterion: nn.Module = (fastae.MSELoss, nn.MSELoss)[kind]()
        if patched and kind == 0:
            model, criterion = pair()[1], nn.MSELoss()
            model = nn.Sequential(
                model.encoder[0], nn.Tanh(), model.encoder[1], model.decoder[0], nn.Tanh(), model.decoder[1]
            )
            assert len(fastae.patch(model).replaced) == 2
            assert len(fastae.patch(criterion).replaced) == 1
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        history = []
        for step in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                y = model(x)
                loss = criterion(y, x)
            assert (y.dtype, loss.dtype) == (dtype, torch.float32)
            scaler.scale(loss if step != 2 else loss * float("inf")).backward()  # a step that must be skipped
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            assert all(map(torch.equal, model.parameters(), before)) == (step == 2)
            history.append(loss.item())
        assert scaler.get_scale() == 2.0**7
        losses.append(history)
    close(*losses, tolerance=2e-3 if dtype == torch.float16 else 1e-2)


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("cast", [None, torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes_as_pytorch_treats_them(cast: torch.dtype | None) -> None:
    """Every mixture: an error here where `F.linear` and `F.mse_loss` have one, the same dtype of result elsewhere."""

    def outcome(function: Callable[..., Tensor], *args: Tensor) -> torch.dtype | None:
        with torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
            try:
                return function(*args).dtype
            except (RuntimeError, TypeError):
                return None

    for dx in FLOATS:
        for dw in FLOATS:
            for db in FLOATS:
                args = normal(3, 4).to(dx), normal(5, 4).to(dw), normal(5).to(db)
                assert outcome(fastae.linear_act, *args) == outcome(F.linear, *args), (dx, dw, db)
    for dx in (*FLOATS, torch.int64):
        for dt in (*FLOATS, torch.int64):
            args = normal(3, 4).to(dx), normal(3, 4, seed=1).to(dt)
            assert outcome(fastae.mse_loss, *args) == outcome(F.mse_loss, *args), (dx, dt)
