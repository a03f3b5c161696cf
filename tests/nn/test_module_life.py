"""What PyTorch programs do to modules beside calling them, done to fastae's and to their `torch.nn` twins alike."""

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import normal
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from twins import close, gradients, pair, x

import fastae
from fastae import DenseAutoencoder, LinearAct

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
