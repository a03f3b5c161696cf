"""What can happen to a model, its parameters, their storage, its hooks or its optimizer: a `TrainStep` heeds it.

The table: every EVENT, before the first step and between steps, under every optimizer, for every variant of the model,
by hand and inside `fit` by a callback. Each cell equals a plain loop in fp64 to rounding, or raises: what PyTorch
raises too, or what the event says.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastae
from fastae.engine.train_step import TrainStep
from fastae.likelihoods import Huber

Model = fastae.DenseAutoencoder
Event = Callable[[Model, torch.optim.Optimizer], Any]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
}
VARIANTS = ("plain", "tied", "shared")
X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BATCHES = [X[:16], X[16:32], X[32:], X[8:24]]


def model(variant: str) -> Model:
    torch.manual_seed(0)
    ae = Model([8, 8, 3], activation="tanh", tied=variant == "tied", dtype=torch.float64)
    if variant == "shared":
        ae.decoder[1].weight = ae.encoder[0].weight
        ae.decoder[0].bias = ae.encoder[0].bias
    return ae


# ---------------------------------------------------------------- events

EVENTS: dict[str, Event] = {}
# What is refused, and by which optimizers: PyTorch's fused update would write between the elements of a slice; a plain
# loop whose optimizer holds other tensors than the model's trains nothing, in silence
SLICE = "TrainStep: optimizer must not be fused for a parameter [8, 8] with strides (16, 1)"
REFUSED = {
    "a slice of a larger tensor": ("fused", SLICE),
    "data becomes a slice": ("fused", SLICE),
    "load_state_dict(assign=True)": ("", "TrainStep: optimizer must be over the model's parameters; got one"),
}


def event(function: Event) -> Event:
    EVENTS[str(function.__doc__)] = function
    return function


@event
def _(ae: Model, optimizer: Any) -> None:
    """nothing"""


@event
def _(ae: Model, optimizer: Any) -> None:
    """a layer is frozen"""
    ae.encoder[0].requires_grad_(False)


@event
def _(ae: Model, optimizer: Any) -> None:
    """a weight alone is frozen"""
    ae.encoder[1].weight.requires_grad_(False)


@event
def _(ae: Model, optimizer: Any) -> None:
    """all but one bias are frozen"""
    ae.requires_grad_(False)
    ae.decoder[1].bias.requires_grad_(True)


@event
def _(ae: Model, optimizer: Any) -> None:
    """a layer is unfrozen, or frozen if it was not"""
    ae.encoder[1].requires_grad_(not ae.encoder[1].bias.requires_grad)


@event
def _(ae: Model, optimizer: Any) -> None:
    """a new Parameter that the optimizer does not hold"""
    ae.encoder[1].weight = nn.Parameter(ae.encoder[1].weight.detach() * 0.5)


@event
def _(ae: Model, optimizer: Any) -> None:
    """a new Parameter in a group of its own"""
    ae.encoder[1].weight = nn.Parameter(ae.encoder[1].weight.detach() * 0.5)
    optimizer.add_param_group({"params": [ae.encoder[1].weight], "lr": 2e-2})


@event
def _(ae: Model, optimizer: Any) -> None:
    """data replaced"""
    for p in ae.parameters():
        p.data = p.data.clone() * 0.5


@event
def _(ae: Model, optimizer: Any) -> None:
    """data transposed in memory"""
    ae.encoder[0].weight.data = ae.encoder[0].weight.data.t().contiguous().t()


@event
def _(ae: Model, optimizer: Any) -> None:
    """data transposed where it lies"""
    ae.encoder[0].weight.data = ae.encoder[0].weight.data.t()


@event
def _(ae: Model, optimizer: Any) -> None:
    """a column-major Parameter"""
    values = ae.encoder[0].weight.detach().t().contiguous().t()
    ae.encoder[0].weight = nn.Parameter(values)
    optimizer.add_param_group({"params": [ae.encoder[0].weight]})


@event
def _(ae: Model, optimizer: Any) -> None:
    """a slice of a larger tensor"""
    larger = torch.zeros(8, 16, dtype=torch.float64)
    larger[:, :8] = ae.encoder[0].weight.detach()
    ae.encoder[0].weight = nn.Parameter(larger[:, :8])
    optimizer.add_param_group({"params": [ae.encoder[0].weight]})


@event
def _(ae: Model, optimizer: Any) -> None:
    """data becomes a slice"""
    larger = torch.zeros(8, 16, dtype=torch.float64)
    larger[:, :8] = ae.encoder[0].weight.detach()
    ae.encoder[0].weight.data = larger[:, :8]


@event
def _(ae: Model, optimizer: Any) -> None:
    """the storage moves"""
    ae.float().double()


@event
def _(ae: Model, optimizer: Any) -> None:
    """load_state_dict"""
    ae.load_state_dict({k: v * 0.5 for k, v in ae.state_dict().items()})


@event
def _(ae: Model, optimizer: Any) -> None:
    """load_state_dict(assign=True)"""
    ae.load_state_dict({k: v.clone() * 0.5 for k, v in ae.state_dict().items()}, assign=True)


@event
def _(ae: Model, optimizer: Any) -> None:
    """a weight is overwritten in place"""
    with torch.no_grad():
        ae.decoder[0].bias.add_(0.1)


@event
def _(ae: Model, optimizer: Any) -> None:
    """a bias is shared"""
    ae.decoder[0].bias = ae.encoder[0].bias


@event
def _(ae: Model, optimizer: Any) -> None:
    """a bias is taken away"""
    ae.encoder[0].bias = None


@event
def _(ae: Model, optimizer: Any) -> None:
    """a forward hook"""
    ae.encoder[0].register_forward_hook(lambda _m, _a, y: y * 1.5)


@event
def _(ae: Model, optimizer: Any) -> None:
    """a forward pre-hook"""
    ae.decoder[1].register_forward_pre_hook(lambda _m, args: (args[0] * 0.5,))


@event
def _(ae: Model, optimizer: Any) -> None:
    """a backward hook"""
    ae.decoder[0].register_full_backward_hook(lambda _m, grads, _: tuple(None if g is None else g * 2 for g in grads))


@event
def _(ae: Model, optimizer: Any) -> None:
    """a hook on the encoder"""
    ae.encoder.register_forward_hook(lambda _m, _a, z: z + 0.1)


@event
def _(ae: Model, optimizer: Any) -> None:
    """a hook that is taken away again"""
    ae.encoder[0].register_forward_hook(lambda _m, _a, y: y * 1.5).remove()


@event
def _(ae: Model, optimizer: Any) -> None:
    """a hook on a parameter"""
    ae.encoder[0].weight.register_hook(lambda g: g * (g.abs() > 0.01))


@event
def _(ae: Model, optimizer: Any) -> None:
    """a post-accumulate hook on a parameter"""
    ae.encoder[0].bias.register_post_accumulate_grad_hook(lambda p: p.grad.clamp_(-1e-3, 1e-3))


@event
def _(ae: Model, optimizer: Any) -> Any:
    """a hook on all modules"""
    return nn.modules.module.register_module_forward_hook(
        lambda m, _a, y: y * 1.1 if isinstance(m, fastae.LinearAct) else None
    )


@event
def _(ae: Model, optimizer: Any) -> None:
    """another activation"""
    ae.encoder[0].activation = "softplus"


@event
def _(ae: Model, optimizer: Any) -> None:
    """an output activation"""
    ae.decoder[1].activation = "sigmoid"


@event
def _(ae: Model, optimizer: Any) -> None:
    """a layer replaced by PyTorch's"""
    other = nn.Linear(8, 3, dtype=torch.float64)
    other.weight.data.fill_(0.1)
    other.bias.data.zero_()
    ae.encoder[1] = other
    optimizer.add_param_group({"params": list(other.parameters())})


@event
def _(ae: Model, optimizer: Any) -> None:
    """a layer appended"""
    ae.decoder.append(nn.Softsign())


@event
def _(ae: Model, optimizer: Any) -> None:
    """a BatchNorm inserted"""
    norm = nn.BatchNorm1d(8, dtype=torch.float64)
    ae.encoder.insert(1, norm)
    optimizer.add_param_group({"params": list(norm.parameters())})


@event
def _(ae: Model, optimizer: Any) -> None:
    """weight_norm"""
    torch.nn.utils.parametrizations.weight_norm(ae.encoder[1])
    optimizer.add_param_group({"params": list(ae.encoder[1].parametrizations.parameters())})


@event
def _(ae: Model, optimizer: Any) -> None:
    """a forward of the instance"""
    own = ae.forward
    ae.forward = lambda v: own(v) + 0.1  # type: ignore[method-assign]


@event
def _(ae: Model, optimizer: Any) -> None:
    """a forward of a layer"""
    layer = ae.decoder[0]
    layer.forward = lambda v: F.linear(v, torch.ones(8, 3, dtype=v.dtype)) * 0.1 + layer.bias


@event
def _(ae: Model, optimizer: Any) -> None:
    """eval mode"""
    ae.eval()


@event
def _(ae: Model, optimizer: Any) -> None:
    """another learning rate"""
    optimizer.param_groups[0]["lr"] = 3e-3


@event
def _(ae: Model, optimizer: Any) -> None:
    """a learning rate as a tensor"""
    optimizer.param_groups[0]["lr"] = torch.tensor(3e-3, dtype=torch.float64)


@event
def _(ae: Model, optimizer: Any) -> None:
    """another weight decay"""
    optimizer.param_groups[0]["weight_decay"] = 0.3


@event
def _(ae: Model, optimizer: Any) -> None:
    """maximize"""
    optimizer.param_groups[0]["maximize"] = True


@event
def _(ae: Model, optimizer: Any) -> None:
    """amsgrad"""
    optimizer.param_groups[0]["amsgrad"] = True


@event
def _(ae: Model, optimizer: Any) -> None:
    """zero_grad to None"""
    optimizer.zero_grad(set_to_none=True)


@event
def _(ae: Model, optimizer: Any) -> None:
    """another likelihood"""
    ae.likelihood = Huber()


@event
def _(ae: Model, optimizer: Any) -> None:
    """zero_grad in place"""
    optimizer.zero_grad(set_to_none=False)


@event
def _(ae: Model, optimizer: Any) -> None:
    """a gradient of someone else's"""
    for p in ae.parameters():
        p.grad = torch.full_like(p, 7.0)


@event
def _(ae: Model, optimizer: Any) -> None:
    """the optimizer's state loaded"""
    optimizer.load_state_dict(optimizer.state_dict())


@event
def _(ae: Model, optimizer: Any) -> None:
    """the optimizer's state lost"""
    optimizer.state.clear()


@event
def _(ae: Model, optimizer: Any) -> None:
    """one parameter's state replaced"""
    p = ae.decoder[1].bias
    if p in optimizer.state:
        optimizer.state[p] = {k: v.clone() * 0.5 for k, v in optimizer.state[p].items()}


@event
def _(ae: Model, optimizer: Any) -> None:
    """a moment replaced"""
    state = optimizer.state.get(ae.encoder[1].bias, {})
    for name in ("exp_avg", "momentum_buffer"):
        if state.get(name) is not None:
            state[name] = torch.zeros_like(state[name])


@event
def _(ae: Model, optimizer: Any) -> None:
    """a parameter leaves the optimizer"""
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not ae.decoder[1].bias]


@event
def _(ae: Model, optimizer: Any) -> None:
    """a second group"""
    group = optimizer.param_groups[0]
    moved = [p for p in group["params"] if p is ae.decoder[1].bias]
    group["params"] = [p for p in group["params"] if p is not ae.decoder[1].bias]
    optimizer.add_param_group({"params": moved, "lr": 0.1})


@event
def _(ae: Model, optimizer: Any) -> None:
    """a hook before the optimizer's step"""

    def halve(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(0.5)

    optimizer.register_step_pre_hook(halve)


@event
def _(ae: Model, optimizer: Any) -> None:
    """a hook after the optimizer's step"""

    def clip(optimizer: Any, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.clamp_(-0.2, 0.2)

    optimizer.register_step_post_hook(clip)


@event
def _(ae: Model, optimizer: Any) -> None:
    """a step of the optimizer's instance"""
    own = optimizer.step
    optimizer.step = lambda *a, **k: (own(*a, **k), own(*a, **k))[1]


@event
def _(ae: Model, optimizer: Any) -> None:
    """a learning rate schedule"""
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    own = optimizer.step

    def step(*a: Any, **k: Any) -> Any:
        done = own(*a, **k)
        schedule.step()
        return done

    optimizer.step = step


# ---------------------------------------------------------------- the table

WHEN = ("before the first step", "between steps")
PLACE = 2  # the step, or the epoch, before which "between steps" is


@contextmanager
def removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            if hasattr(handle, "remove"):
                handle.remove()


def plainly(name: str, variant: str, optimizer: str, when: int, batches: list[Tensor], place: int) -> Any:
    """The weights and gradients of a loop as people write it, or what it raises."""
    ae = model(variant)
    made, handles = OPTIMIZERS[optimizer](ae.parameters()), list[Any]()
    with removed(handles):
        try:
            for i, x in enumerate(batches):
                if i == (0, place)[when]:
                    handles.append(EVENTS[name](ae, made))
                made.zero_grad()
                ae.zero_grad()  # what the optimizer does not hold
                loss = F.huber_loss if isinstance(ae.likelihood, Huber) else F.mse_loss
                loss(ae(x), x).backward()
                made.step()
        except Exception as error:
            return error
    return ae


def by_hand(name: str, variant: str, optimizer: str, when: int) -> Any:
    ae = model(variant)
    made, handles = OPTIMIZERS[optimizer](ae.parameters()), list[Any]()
    with removed(handles):
        try:
            step = None if when == 0 else TrainStep(ae, made, 16)
            for i, x in enumerate(BATCHES):
                if i == (0, PLACE)[when]:
                    handles.append(EVENTS[name](ae, made))
                step = step or TrainStep(ae, made, 16)
                step(x)
        except Exception as error:
            return error
    return ae


class At(fastae.Callback):
    def __init__(self, epoch: int, event: Event, handles: list[Any]) -> None:
        self.epoch, self.event, self.handles = epoch, event, handles

    def on_train_begin(self, run: Any) -> None:
        if self.epoch == 0:
            self.handles.append(self.event(run.model, run.optimizer))

    def on_epoch_end(self, run: Any) -> None:
        if run.history.epochs == self.epoch:
            self.handles.append(self.event(run.model, run.optimizer))


def in_fit(name: str, variant: str, optimizer: str, when: int) -> Any:
    ae = model(variant)
    made, handles = OPTIMIZERS[optimizer](ae.parameters()), list[Any]()
    callback = At((0, 1)[when], EVENTS[name], handles)
    with removed(handles):
        try:
            ae.fit(X, epochs=2, batch_size=16, optimizer=made, seed=5, validation_split=0, precision="float64",
                   callbacks=[callback], progress=False)  # fmt: skip
        except Exception as error:
            return error
    return ae


def fit_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [X[rows] for _ in range(2) for rows in torch.randperm(40, generator=generator).split(16)]


def differs(found: Any, wanted: Any, name: str, optimizer: str) -> str:
    """What is wrong with a cell, or nothing."""
    kind, text = REFUSED.get(name, ("nothing", ""))
    if optimizer.startswith(kind):
        return "" if isinstance(found, ValueError) and str(found).startswith(text) else f"not refused: {found!r}"
    if isinstance(wanted, Exception) or isinstance(found, Exception):
        same = type(found) is type(wanted)
        return "" if same else f"raised {found!r}, a plain loop {wanted!r}"
    for (key, p), q in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        if not torch.allclose(p, q, rtol=1e-9, atol=1e-11):
            return f"{key} is {(p - q).abs().max().item():.1e} off"
    for (key, p), q in zip(found.named_parameters(), wanted.parameters(), strict=True):
        if (p.grad is None) != (q.grad is None):
            return f"{key}.grad is {'missing' if p.grad is None else 'there'}, a plain loop's is not"
        if p.grad is not None and not torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-11):
            return f"{key}.grad is {(p.grad - q.grad).abs().max().item():.1e} off"
    return ""


CELLS = list(itertools.product(VARIANTS, OPTIMIZERS, range(2)))


def test_the_number_of_cells() -> None:
    assert len(EVENTS) * len(CELLS) * 2 == 2640


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", EVENTS)
def test_called_by_hand(name: str) -> None:
    problems = {}
    for variant, optimizer, when in CELLS:
        wanted = plainly(name, variant, optimizer, when, BATCHES, PLACE)
        if problem := differs(by_hand(name, variant, optimizer, when), wanted, name, optimizer):
            problems[variant, optimizer, WHEN[when]] = problem
    assert not problems


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", EVENTS)
def test_inside_fit_by_a_callback(name: str) -> None:
    problems = {}
    for variant, optimizer, when in CELLS:
        wanted = plainly(name, variant, optimizer, when, fit_batches(), 3)
        if name == "eval mode":  # fit trains: the mode is the loop's own, and changes nothing here
            wanted = plainly("nothing", variant, optimizer, when, fit_batches(), 3)
        if problem := differs(in_fit(name, variant, optimizer, when), wanted, name, optimizer):
            problems[variant, optimizer, WHEN[when]] = problem
    assert not problems
