"""Events of a training run: what can happen to a model, its parameters, their storage, its hooks or its optimizer."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastae
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
