"""`patch` on models as people write them: what it replaces, what it leaves, and that nothing else changes."""

import copy
import io
import math
import pickle
import random
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import normal
from torch import nn

import fastae
from fastae import LinearAct, PatchReport
from fastae.patching import fused_modules as _patched

x = normal(5, 6)
FLAG = True


def models(build):
    """The same model twice, the first of them patched."""
    torch.manual_seed(0)
    plain = build()
    patched = copy.deepcopy(plain)
    return patched, plain, fastae.patch(patched)


def check_same(patched: nn.Module, plain: nn.Module, *args: torch.Tensor) -> None:
    """Output and every gradient agree, training and not."""
    args = args or (x,)
    for mode in (True, False):
        results = []
        for model in (patched.train(mode), plain.train(mode)):
            model.zero_grad()
            torch.manual_seed(3)
            y = model(*args)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in model.parameters())])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def ran(model: nn.Module, *args: torch.Tensor) -> int:
    """How many layers a call computes together with their activations."""
    with mock.patch.object(_patched, "linear_act", wraps=fastae.linear_act) as together:
        model(*(args or (x,)))
    return together.call_count


# ---------------------------------------------------------------- activations

MODULES = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "leaky_relu": nn.LeakyReLU(),
    "elu": nn.ELU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(),
}


@pytest.mark.parametrize("case", MODULES)
def test_activation_modules(case: str) -> None:
    patched, plain, report = models(lambda: nn.Sequential(nn.Linear(6, 4), MODULES[case], nn.Linear(4, 6)))
    assert [(r.name, r.activation, r.where) for r in report.replaced] == [("0", case.split()[0], "1")]
    assert ran(patched) == 1
    check_same(patched, plain)


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.fc, self.out = nn.Linear(6, 4), nn.Linear(4, 6)
        type(self).forward = function


FUNCTIONS = {
    "relu": [
        lambda self, x: self.out(F.relu(self.fc(x))),
        lambda self, x: self.out(F.relu(input=self.fc(x))),
        lambda self, x: self.out(F.relu(self.fc(x), inplace=True)),
        lambda self, x: self.out(torch.relu(self.fc(x))),
        lambda self, x: self.out(self.fc(x).relu()),
        lambda self, x: self.out(self.fc(x).relu_()),
        lambda self, x: self.out(torch.nn.functional.relu(self.fc(x))),
    ],
    "leaky_relu": [lambda self, x: self.out(F.leaky_relu(self.fc(x))), lambda self, x: F.leaky_relu(self.fc(x), 0.01)],
    "elu": [lambda self, x: self.out(F.elu(self.fc(x))), lambda self, x: F.elu(self.fc(x), alpha=1.0)],
    "gelu": [lambda self, x: self.out(F.gelu(self.fc(x)))],
    "gelu_tanh": [lambda self, x: self.out(F.gelu(self.fc(x), approximate="tanh"))],
    "silu": [lambda self, x: self.out(F.silu(self.fc(x)))],
    "mish": [lambda self, x: self.out(F.mish(self.fc(x)))],
    "sigmoid": [
        lambda self, x: self.out(torch.sigmoid(self.fc(x))),
        lambda self, x: F.sigmoid(self.fc(x)),
        lambda self, x: self.fc(x).sigmoid(),
    ],
    "tanh": [
        lambda self, x: self.out(torch.tanh(self.fc(x))),
        lambda self, x: F.tanh(self.fc(x)),
        lambda self, x: self.fc(x).tanh(),
    ],
    "softplus": [lambda self, x: self.out(F.softplus(self.fc(x))), lambda self, x: F.softplus(self.fc(x), 1, 20)],
}


def functional(forward):
    return type("Net", (Functional,), {})(forward)


@pytest.mark.parametrize(
    ("name", "forward"),
    [(name, f) for name, forms in FUNCTIONS.items() for f in forms],
    ids=lambda v: getattr(v, "x", v),
)
def test_activation_functions(name: str, forward) -> None:
    patched, plain, report = models(lambda: functional(forward))
    assert [(r.name, r.activation) for r in report.replaced] == [("fc", name)]
    assert ran(patched) == 1
    for parameter in plain.out.parameters():  # not every forward uses it
        parameter.grad = None
    assert torch.allclose(patched(x), plain(x), atol=1e-6)
    grads = [torch.autograd.grad(m(x).square().sum(), [*m.fc.parameters()]) for m in (patched, plain)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


LEFT = {
    "slope": (lambda: nn.Sequential(nn.Linear(6, 4), nn.LeakyReLU(0.2)), "with settings LinearAct does not support"),
    "alpha": (lambda: nn.Sequential(nn.Linear(6, 4), nn.ELU(0.5)), "with settings LinearAct does not support"),
    "beta": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Softplus(2.0)), "with settings LinearAct does not support"),
    "other": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Hardtanh()), "Hardtanh"),
    "norm between": (lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.ReLU()), "LayerNorm"),
    "last": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(6, 4)), "it is the last of its Sequential"),
    "used twice": (lambda: functional(lambda self, x: F.relu(h := self.fc(x)) + h), "its result is used 2 times"),
    "function's slope": (lambda: functional(lambda self, x: F.leaky_relu(self.fc(x), 0.3)), "leaky_relu follows it"),
    "function's alpha": (lambda: functional(lambda self, x: F.elu(self.fc(x), alpha=2)), "elu follows it"),
    "returned": (lambda: functional(lambda self, x: self.fc(x)), "its result is what Net.forward returns"),
}


@pytest.mark.parametrize("case", LEFT)
def test_left(case: str) -> None:
    build, reason = LEFT[case]
    patched, plain, report = models(build)
    assert not report.replaced
    assert any(reason in why for why in report.left.values()), report
    assert ran(patched) == 0
    assert torch.equal(patched.eval()(x), plain.eval()(x))
    assert not any(isinstance(m, LinearAct) for m in patched.modules())


# ---------------------------------------------------------------- layers that are not as they were made

CUSTOM = {
    "subclass": (lambda fc: setattr(fc, "__class__", type("Mine", (nn.Linear,), {})), "it is a Mine, not an nn.Linear"),
    "parametrized": (nn.utils.parametrizations.weight_norm, "it is parametrized"),
    "forward hook": (lambda fc: fc.register_forward_hook(lambda *_: None), "it has a hook"),
    "backward hook": (lambda fc: fc.register_full_backward_hook(lambda *_: None), "it has a hook"),
    "pre-hook with keywords": (
        lambda fc: fc.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
        "it has a hook that takes keyword arguments",
    ),
    "own forward": (lambda fc: setattr(fc, "forward", lambda x: x[:, :4]), "it has a forward of its own"),
}


@pytest.mark.parametrize("case", CUSTOM)
def test_customised_layers_are_left(case: str) -> None:
    change, reason = CUSTOM[case]
    for build in (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh()),
        lambda: functional(lambda self, x: self.fc(x).tanh()),
    ):
        torch.manual_seed(0)
        model = build()
        linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
        change(linear)
        before = model(x)
        report = fastae.patch(model)
        assert reason in report.left.values()
        assert not report.replaced
        assert torch.equal(model(x), before)


def test_hooks_on_the_activation_keep_it() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    model[1].register_forward_hook(lambda *_: None)
    assert fastae.patch(model).left == {"0": "the Tanh after it has a hook"}


@pytest.mark.parametrize("which", ["layer", "activation", "every module"])
def test_hooks_made_later_hear_what_they_would_have_heard(which: str) -> None:
    for build in (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh()),
        lambda: functional(lambda self, x: self.act(self.fc(x))),
    ):
        heard = []
        for patch in (True, False):
            torch.manual_seed(0)
            model = build()
            model.act = act = model[1] if isinstance(model, nn.Sequential) else nn.Tanh()
            if isinstance(model, nn.Sequential):
                del model.act
            fc = next(m for m in model.modules() if isinstance(m, nn.Linear))
            if patch:
                assert len(fastae.patch(model).replaced) == 1
                assert ran(model) == 1

            def note(module, args, y, heard=heard):
                heard.append(y.detach())

            on = {"layer": fc, "activation": act}.get(which)
            handle = (
                on.register_forward_hook(note)
                if on is not None
                else nn.modules.module.register_module_forward_hook(note)
            )
            try:
                model(x)
            finally:
                handle.remove()
            assert ran(model) == patch
        half = len(heard) // 2
        assert half >= 1
        assert all(torch.equal(a, b) for a, b in zip(heard[:half], heard[half:], strict=True))


def test_pre_hooks_are_heard_and_obeyed() -> None:
    patched, plain, _ = models(lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh()))
    for model in (patched, plain):
        model[0].register_forward_pre_hook(lambda module, args: args[0] * 2 if len(args) == 1 else None)
    assert ran(patched) == 1
    check_same(patched, plain)


# ---------------------------------------------------------------- what stays


class Net(nn.Module):
    """Pairs of every kind, one layer with two activations, a method that others call, and what must be left."""

    def __init__(self):
        super().__init__()
        self.fc1, self.twice, self.out = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 6)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.act = nn.GELU()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Dropout(0.5), nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.p = 0.3

    def encode(self, x):
        return torch.tanh(self.twice(F.relu(self.fc1(x))))

    def forward(self, x):
        h = torch.sigmoid(self.twice(self.encode(x)))
        for layer in self.layers:
            h = self.act(layer(h))
        h = F.dropout(h, self.p, self.training)
        return self.net(self.out(h))


def test_everything_else_stays() -> None:
    torch.manual_seed(0)
    model = Net().double()
    before = {name: (m, id(m), m.training) for name, m in model.named_modules()}
    parameters = [*model.parameters()]
    keys, state = [*model.state_dict()], vars(model).keys()
    fastae.patch(model)
    assert {name: (m, id(m), m.training) for name, m in model.named_modules()} == before
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert [*model.state_dict()] == keys
    assert model(x.double()).dtype == torch.float64
    fastae.unpatch(model)
    assert vars(model).keys() == state
    assert type(model) is Net
    assert {type(m) for m in model.modules()} == {
        Net, nn.Linear, nn.ModuleList, nn.Sequential, nn.GELU, nn.SiLU, nn.Dropout, nn.BatchNorm1d
    }  # fmt: skip
    assert {name: id(m) for name, m in model.named_modules()} == {name: i for name, (_, i, _) in before.items()}
    assert "activation" not in vars(model.fc1)


def test_the_report() -> None:
    patched, plain, report = models(Net)
    check_same(patched, plain)
    assert ran(patched) == 7
    assert str(report) == (
        "replaced 6\n"
        "  fc1 + relu in Net.forward                            LinearAct(6, 4, bias=True, activation='relu')\n"
        "  twice + tanh in Net.forward, sigmoid in Net.forward  LinearAct(4, 4, bias=True, activation='tanh')\n"
        "  layers.0 + act                                       LinearAct(4, 4, bias=True, activation='gelu')\n"
        "  layers.1 + act                                       LinearAct(4, 4, bias=True, activation='gelu')\n"
        "  layers.2 + act                                       LinearAct(4, 4, bias=True, activation='gelu')\n"
        "  net.0 + net.1                                        LinearAct(6, 6, bias=True, activation='silu')\n"
        "left 2\n"
        "  out    net follows it in Net.forward\n"
        "  net.3  a BatchNorm1d follows it"
    )
    assert isinstance(report, PatchReport)
    assert isinstance(patched.fc1, LinearAct)


def test_parts_called_by_themselves_compute_what_they_did() -> None:
    patched, plain, _ = models(Net)
    for part in (
        lambda m: m.encode(x),
        lambda m: m.fc1(x),
        lambda m: m.net[0](x),
        lambda m: m.net[:1](x),
        lambda m: m.net[:2](x),
        lambda m: m.net[1](m.net[0](x)),
        lambda m: [h := x, [h := layer(h) for layer in m.net[:2]]][1][0],
    ):
        assert torch.allclose(part(patched), part(plain), atol=1e-6)


def test_an_optimizer_made_before_trains_on() -> None:
    torch.manual_seed(0)
    runs = []
    for patch in (True, False):
        torch.manual_seed(0)
        model = Net().eval()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        if patch:
            fastae.patch(model)
        for _ in range(5):
            optimizer.zero_grad()
            F.mse_loss(model(x), x).backward()
            optimizer.step()
        runs.append(model.state_dict())
    assert [*runs[0]] == [*runs[1]]
    for mine, theirs in zip(runs[0].values(), runs[1].values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_checkpoints_both_ways() -> None:
    patched, plain, _ = models(Net)
    with torch.no_grad():
        for p in patched.parameters():
            p.add_(0.1)
    plain.load_state_dict(patched.state_dict())
    check_same(patched, plain)
    with torch.no_grad():
        for p in plain.parameters():
            p.sub_(0.2)
    patched.load_state_dict(plain.state_dict())
    check_same(patched, plain)


def test_copies_and_pickles_are_patched_too() -> None:
    patched, plain, _ = models(Net)
    file = io.BytesIO()
    torch.save(patched, file)
    file.seek(0)
    for again in (
        copy.deepcopy(patched),
        pickle.loads(pickle.dumps(patched)),
        torch.load(file, weights_only=False),
    ):
        assert ran(again.eval()) == 7
        assert again.fc1.weight is not patched.fc1.weight
        check_same(again, copy.deepcopy(plain))
        with torch.no_grad():
            again.fc1.weight.add_(1)  # its forward is its own, not the first one's
        assert not torch.allclose(again(x), patched.eval()(x))
        fastae.unpatch(again)
        assert type(again) is Net
        assert ran(again) == 0
    check_same(patched, plain)


def test_a_shallow_copy_calls_its_own_modules() -> None:
    """As `nn.DataParallel` does with its replicas."""
    patched, _, _ = models(Net)
    replica = patched._replicate_for_data_parallel()
    replica._modules["fc1"] = fc1 = copy.deepcopy(patched.fc1)
    with torch.no_grad():
        fc1.weight.zero_()
    assert not torch.allclose(replica.eval()(x), patched.eval()(x))


# ---------------------------------------------------------------- a model that changes later


def test_a_rewritten_forward_gives_way_when_what_it_saw_changes() -> None:
    def grow(model):
        torch.manual_seed(5)
        model.layers.append(nn.Linear(4, 4))

    for change, fused in {
        lambda m: setattr(m, "p", 0.9): 1,
        lambda m: setattr(m, "act", nn.Tanh()): 1,
        lambda m: setattr(m.act, "approximate", "tanh"): 1,
        grow: 1,
        lambda m: setattr(m, "net", nn.Identity()): 6,
        lambda m: m.net.insert(1, nn.Tanh()): 7,
        lambda m: m.net.pop(1): 6,
    }.items():
        patched, plain, _ = models(Net)
        change(patched)
        change(plain)
        check_same(patched, plain)
        assert ran(patched) == fused
        fastae.patch(patched)
        assert ran(patched) >= 6
        check_same(patched, plain)


def test_arguments_it_was_not_written_for() -> None:
    patched, plain, _ = models(lambda: functional(lambda self, x: F.relu(self.fc(x))))
    assert torch.allclose(patched(x=x), plain(x=x))
    with pytest.raises(TypeError, match="unexpected keyword"):
        patched(x, y=x)
    with pytest.raises(TypeError, match="missing 1 required"):
        patched()


def _optional(self, x, mask=None, *, double=False):
    h = torch.relu(self.fc(x))
    if mask is not None:
        h = h * mask
    return 2 * h if double else h


def test_optional_arguments() -> None:
    """At their defaults the pairs are one; with another value the model's own forward runs."""
    patched, plain, report = models(lambda: functional(_optional))
    assert report.replaced[0].name == "fc"
    for args, kwargs, fused in (
        ((x,), {}, 1),
        ((x, None), {"double": False}, 1),
        ((), {"x": x, "mask": None}, 1),
        ((x, torch.zeros(4)), {}, 0),
        ((x,), {"double": True}, 0),
        ((x,), {"double": 0}, 0),
    ):
        assert torch.allclose(patched(*args, **kwargs), plain(*args, **kwargs), atol=1e-6)
        assert ran(lambda *_, a=args, k=kwargs: patched(*a, **k)) == fused
    for args, kwargs in (((x,), {"x": x}), ((x, None, False), {}), ((x,), {"other": 1}), ((), {"mask": None})):
        with pytest.raises(TypeError):
            patched(*args, **kwargs)


class Variational(nn.Module):
    """PyTorch's own example of one, which draws its noise in the forward."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(5, 2)
        self.fc3, self.fc4 = nn.Linear(2, 5), nn.Linear(5, 6)

    def encode(self, x):
        h1 = F.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        return mu + torch.randn_like(std) * std

    def forward(self, x):
        mu, logvar = self.encode(x.view(-1, 6))
        h3 = F.relu(self.fc3(self.reparameterize(mu, logvar)))
        return torch.sigmoid(self.fc4(h3)) + 0 * (mu.sum() + logvar.sum())


class Functions(nn.Module):
    """Activations kept as attributes, layers found by name, buffers, parameters and another module's layer."""

    def __init__(self):
        super().__init__()
        self.fc0, self.fc1 = nn.Linear(6, 6), nn.Linear(6, 6)
        self.lists = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
        self.act, self.count, self.scale = F.gelu, 2, nn.Parameter(torch.ones(1))
        self.register_buffer("mean", torch.ones(6))

    @property
    def width(self):
        return 6

    def forward(self, x):
        for i in range(self.count):
            x = self.act(getattr(self, f"fc{i}")(x - self.mean))
        for layer in self.lists.values():
            x = F.silu(layer(x))
        return (x * self.scale * math.pi).reshape(-1, self.width)


@pytest.mark.parametrize(("build", "fused"), [(Variational, 3), (Functions, 4)])
def test_forwards_as_people_write_them(build: type[nn.Module], fused: int) -> None:
    patched, plain, _ = models(build)
    assert ran(patched) == fused
    check_same(patched, plain)
    again = pickle.loads(pickle.dumps(patched))
    assert ran(again) == fused
    check_same(again, plain)


def test_noise_is_drawn_afresh() -> None:
    patched, _, _ = models(Variational)
    assert not torch.equal(patched(x), patched(x))


def test_buffers_and_attributes_are_read_at_each_call() -> None:
    patched, plain, _ = models(Functions)
    for change in (
        lambda m: m.mean.zero_(),
        lambda m: m.register_buffer("mean", torch.full((6,), 3.0)),
        lambda m: setattr(m, "act", F.silu),
        lambda m: setattr(m, "count", 1),
        lambda m: setattr(m, "scale", nn.Parameter(torch.full((1,), 2.0))),
        lambda m: m.lists.pop("a"),
    ):
        for m in (patched, plain):
            change(m)
        assert torch.allclose(patched(x), plain(x), atol=1e-5)


# ---------------------------------------------------------------- forwards that cannot be recorded


def _training(self, x):
    return F.relu(self.fc(x)) if self.training else torch.tanh(self.fc(x))


def test_both_modes_of_a_forward_that_asks_for_them() -> None:
    patched, plain, report = models(lambda: functional(_training))
    assert report.replaced[0].name == "fc"
    for mode in (True, False):
        assert torch.allclose(patched.train(mode)(x), plain.train(mode)(x), atol=1e-6)
        assert ran(patched) == 1


def _with(self, x):
    with torch.no_grad():
        return torch.relu(self.fc(x))


def _prints(self, x):
    print(x.shape)
    return torch.relu(self.fc(x))


def _counts(self, x):
    self.count = 1
    return torch.relu(self.fc(x))


def _seen(self, x):
    self.seen.append(x)
    return torch.relu(self.fc(x))


def _raises(self, x):
    try:
        return torch.relu(self.fc(x))
    except ValueError:
        return x


def _imports(self, x):
    import math

    return torch.relu(self.fc(x)) * math.pi


def _element(self, x):
    h = torch.relu(self.fc(x))
    h[0] = 1
    return h


def _augmented(self, x):
    first = h = torch.relu(self.fc(x))
    h += 1
    return first


def _noise():
    return torch.randn(4)


def _asks(self, x):
    return torch.relu(self.fc(x)) if isinstance(x, torch.Tensor) else x


def _frozen(self, x):
    return torch.relu(self.fc(x)) + self.plain.exp()


def _assigned(self, x, mask=None):
    mask = x
    return torch.relu(self.fc(x)) if mask is not None else x


def _starred(self, *xs):
    return torch.relu(self.fc(xs[0]))


REFUSED = {
    "data": (lambda self, x: torch.relu(self.fc(x)) if x.sum() > 0 else x, "control flow"),
    "none": (lambda self, x: torch.relu(self.fc(x)) if self.fc.bias is not None else x, "compares with `is`"),
    "none, assigned": (_assigned, "compares with `is`"),
    "type": (_asks, "calls isinstance"),
    "random tensor": (lambda self, x: torch.relu(self.fc(x)) + torch.randn(4), "calls torch.randn"),
    "random tensor, called": (lambda self, x: torch.relu(self.fc(x)) + _noise(), "calls torch.randn"),
    "python's random": (lambda self, x: torch.relu(self.fc(x)) * random.random(), "calls random.random"),
    "grad mode": (lambda self, x: torch.relu(self.fc(x)) * torch.is_grad_enabled(), "calls torch.is_grad_enabled"),
    "global": (lambda self, x: torch.relu(self.fc(x)) * FLAG, "reads the global FLAG"),
    "with": (_with, "enters a `with` block"),
    "decorated": (torch.no_grad()(lambda self, x: torch.relu(self.fc(x))), "is decorated"),
    "print": (_prints, "calls print"),
    "assignment": (_counts, "assigns to an attribute"),
    "list of the model": (_seen, "it reads seen, a list"),
    "augmented": (_augmented, "has an assignment like +="),
    "exceptions": (_raises, "catches exceptions"),
    "import": (_imports, "imports"),
    "element": (_element, "assigns to an element"),
    "frozen": (_frozen, "it calls exp without its input"),
    "starred": (_starred, "takes any arguments, as *xs"),
    "tuple": (
        lambda self, x, dims=(0, 1): torch.relu(self.fc(x)).sum(dims),
        "has a default that torch.fx does not take",
    ),
    "list": (lambda self, x, seen=[]: torch.relu(self.fc(x)), "has a default that is not a plain value"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_forward_that_a_recording_cannot_stand_for_is_left(case: str) -> None:
    forward, reason = REFUSED[case]
    net = functional(forward)
    net.seen, net.plain = [], torch.ones(4)
    kept = dict(vars(net))
    report = fastae.patch(net)
    assert not report.replaced
    assert re.search(re.escape(reason), report.left["fc"]), report
    assert type(net).__mro__[0].__name__ == "Net"
    assert vars(net) == kept
    assert net.seen == []
    assert "__getattribute__" not in vars(nn.Module)
    assert isinstance(nn.Module.__setattr__, type(_with)), "nn.Module is as it was"
    setattr(net, "later", 1)  # noqa: B010 (nothing is refused any more)


def test_modules_of_pytorch_are_left() -> None:
    model = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    report = fastae.patch(model)
    assert report.left["linear1"] == "TransformerEncoderLayer: its forward is PyTorch's own"
    assert not report.replaced


def test_a_class_with_init_subclass_is_left() -> None:
    told = []

    class Registered(nn.Sequential):
        def __init_subclass__(cls):
            told.append(cls)

    model = Registered(nn.Linear(6, 4), nn.ReLU())
    assert fastae.patch(model).left == {"0": "Registered defines `__init_subclass__`"}
    assert told == []


def test_a_subclass_of_sequential() -> None:
    class Block(nn.Sequential):
        def __init__(self, width):
            super().__init__(nn.Linear(width, width), nn.ReLU())

    patched, plain, report = models(lambda: nn.Sequential(Block(6), Block(6)))
    assert [r.name for r in report.replaced] == ["0.0", "1.0"]
    assert [type(m).__name__ for m in patched] == ["Block", "Block"]
    assert isinstance(patched[0], Block)
    check_same(patched, plain)
    check_same(copy.deepcopy(patched), plain)


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses(reduction: str) -> None:
    loss = nn.MSELoss(reduction=reduction)
    report = fastae.patch(loss)
    assert str(report) == f"replaced 1\n  (the model)  MSELoss(reduction='{reduction}')\nleft 0"
    assert isinstance(loss, (nn.MSELoss, fastae.MSELoss))
    input, target = normal(4, 3).requires_grad_(), normal(4, 3, seed=1)
    torch.testing.assert_close(loss(input, target), F.mse_loss(input, target, reduction=reduction))
    wide = F.mse_loss(input, target.double(), reduction=reduction)
    assert torch.equal(loss(input, target.double()), wide)
    with pytest.warns(UserWarning, match="target size"):
        assert loss(input, target[:1]).shape == wide.shape
    fastae.unpatch(loss)
    assert type(loss) is nn.MSELoss


# ---------------------------------------------------------------- errors, and once more


def test_patching_twice_changes_nothing() -> None:
    patched, plain, report = models(Net)
    assert str(fastae.patch(patched)) == str(report)
    check_same(patched, plain)
    fastae.unpatch(patched)
    fastae.unpatch(patched)
    assert type(patched) is Net


def test_errors() -> None:
    for function in (fastae.patch, fastae.unpatch):
        name = function.__name__
        with pytest.raises(
            TypeError, match=rf"^{name}: model must be a torch\.nn\.Module outside TorchScript; got int$"
        ):
            function(3)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    fastae.patch(model)
    nn.utils.parametrizations.weight_norm(model[0])
    before = model(x)
    with pytest.raises(
        RuntimeError, match=r"^unpatch: model must be of the classes that patch gave it; got a ParametrizedPatch"
    ):
        fastae.unpatch(model)
    assert fastae.patch(model).left == {"0": "it is parametrized"}
    assert torch.equal(model(x), before)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    fastae.unpatch(model)
    assert type(model[0]) is nn.Linear
