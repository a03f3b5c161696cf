"""Any sequence of events: a TrainStep beside a plain loop, and fused layers beside their twins of torch.nn."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from events import EVENTS, OPTIMIZERS, REFUSED, VARIANTS, X, model
from hypothesis import given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor, nn

import fastae
from fastae.likelihoods import Huber

# PyTorch's own pair warns of it, once a process
pytestmark = pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")

# ---------------------------------------------------------------- a training run

# Not among them: what is refused (the event table knows what by), and those after which a plain loop and a step mean
# different things by the same word
COMMON = sorted(set(EVENTS) - set(REFUSED))


@settings(max_examples=settings().max_examples // 2)
@given(
    st.sampled_from(VARIANTS), st.sampled_from(sorted(OPTIMIZERS)),
    st.lists(st.one_of(st.sampled_from(COMMON), st.integers(1, 16)), min_size=3, max_size=12), st.booleans(),
)  # fmt: skip
def test_a_step_heeds_any_sequence_of_events(variant: str, kind: str, life: list[Any], early: bool) -> None:
    results: list[Any] = []
    for plain in (True, False):
        ae, handles = model(variant), list[Any]()
        optimizer = OPTIMIZERS[kind](ae.parameters())
        step = fastae.TrainStep(ae, optimizer, 16) if early and not plain else None
        trace: list[Any] = []
        try:
            for at in (*life, 16):
                if isinstance(at, str):
                    handles.append(EVENTS[at](ae, optimizer))
                    own = {id(p) for p in ae.parameters()}
                    for p in (p for group in optimizer.param_groups for p in group["params"] if id(p) not in own):
                        p.grad = None  # a step leaves it, as `model.zero_grad` does; the loop below would not
                    continue
                x = X[at : at + at]
                if plain:
                    optimizer.zero_grad()
                    ae.zero_grad()
                    loss = (F.huber_loss if isinstance(ae.likelihood, Huber) else F.mse_loss)(ae(x), x)
                    loss.backward()
                    optimizer.step()
                else:
                    step = step or fastae.TrainStep(ae, optimizer, 16)
                    loss = step(x)
                trace.append(loss.item())
        except Exception as error:
            trace.append(error)
        finally:
            for handle in handles:
                if hasattr(handle, "remove"):
                    handle.remove()
        results.append((ae, trace))
    (theirs, wanted), (mine, found) = results
    note(f"a plain loop: {wanted}\na step: {found}")
    if any(isinstance(t, Exception) for t in (wanted[-1], found[-1])):
        # what PyTorch raises the step raises; it also refuses, by name, what a plain loop does not train
        refusal = isinstance(found[-1], ValueError) and str(found[-1]).startswith("TrainStep: ")
        assert refusal or type(found[-1]) is type(wanted[-1])
        return
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-8, atol=1e-10)
    for (name, p), q in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------- a layer

MODULES = {
    "identity": nn.Identity, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "gelu": nn.GELU,
    "silu": nn.SiLU, "mish": nn.Mish, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "softplus": nn.Softplus,
}  # fmt: skip


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A forward hook that pickles."""
    return output * 2


class LayerLife(RuleBasedStateMachine):
    """A `LinearAct`, a patched pair and the pair of torch.nn live the same life, in fp64."""

    @initialize(activation=st.sampled_from(sorted(MODULES)), bias=st.booleans(),
                backend=st.sampled_from(["auto", "onednn", "triton"]))  # fmt: skip
    def start(self, activation: str, bias: bool, backend: str) -> None:
        self.block = fastae.use_backend(backend)
        self.block.__enter__()
        torch.manual_seed(0)
        fused = fastae.LinearAct(5, 4, bias, activation, dtype=torch.float64)
        self.all: list[nn.Module] = [
            nn.Sequential(nn.Linear(5, 4, bias, dtype=torch.float64), MODULES[activation]()),
            nn.Sequential(fused),
            nn.Sequential(nn.Linear(5, 4, bias, dtype=torch.float64), MODULES[activation]()),
        ]
        for m in self.all:
            m[0].load_state_dict(fused.state_dict())  # type: ignore[index]
        fastae.patch(self.all[2])
        self.optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in self.all]
        self.outputs: list[list[Tensor]] = []
        self.close: dict[str, float] = {}

    def teardown(self) -> None:
        if hasattr(self, "block"):
            self.block.__exit__(None, None, None)

    def each(self, function: Any) -> list[Any]:
        """Do it to all; they give the same, or raise the same kind."""
        found: list[Any] = []
        for i, m in enumerate(self.all):
            try:
                found.append(function(i, m))
            except Exception as error:
                found.append(error)
        for other in found[1:]:
            if isinstance(found[0], Exception) or isinstance(other, Exception):
                assert type(other) is type(found[0]), found
            elif isinstance(found[0], Tensor):
                torch.testing.assert_close(other, found[0], **self.close)
        return found

    @rule(rows=st.integers(0, 7), lead=st.booleans(), grad=st.booleans(), seed=st.integers(0, 9))
    def call(self, rows: int, lead: bool, grad: bool, seed: int) -> None:
        shape = (2, rows, 5) if lead else (rows, 5)
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        made = self.each(lambda i, m: m(x.to(next(m.parameters()).dtype).requires_grad_(grad)))
        if not any(isinstance(y, Exception) for y in made):
            self.outputs.append(made)

    @precondition(lambda self: self.outputs)
    @rule(add=st.booleans())
    def change_in_place(self, add: bool) -> None:
        made = self.outputs[-1]
        self.each(lambda i, _: made[i].add_(1) if add else made[i].mul_(0.5))

    @precondition(lambda self: self.outputs)
    @rule(keep=st.booleans(), old=st.booleans())
    def backward(self, keep: bool, old: bool) -> None:
        made = self.outputs[0 if old else -1]
        self.each(lambda i, _: made[i].square().sum().backward(retain_graph=keep))
        if not keep:
            self.outputs = [o for o in self.outputs if o is not made]
        self.gradients()

    def gradients(self) -> None:
        def grads(m: nn.Module) -> list[Any]:
            return [p.grad for p in m.parameters()]

        for a, b in zip(zip(*map(grads, self.all[1:]), strict=True), grads(self.all[0]), strict=True):
            for mine in a:
                assert (mine is None) == (b is None)
                if mine is not None:
                    torch.testing.assert_close(mine, b, **self.close)

    @rule()
    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    @rule(which=st.integers(0, 1), on=st.booleans())
    def freeze(self, which: int, on: bool) -> None:
        self.each(lambda i, m: [p.requires_grad_(on) for p in list(m.parameters())[which:]][:0])

    @rule(double=st.booleans())
    def convert(self, double: bool) -> None:
        self.outputs.clear()
        if not double:  # what was rounded once stays so
            self.close = {"rtol": 1e-3, "atol": 1e-4}
        self.each(lambda i, m: (m.double() if double else m.float()) and None)
        self.optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in self.all]

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save", "state_dict"]))
    def copy(self, how: str) -> None:
        self.outputs.clear()
        for i, m in enumerate(self.all):
            if how == "deepcopy":
                self.all[i] = copy.deepcopy(m)
            elif how == "pickle":
                self.all[i] = pickle.loads(pickle.dumps(m))
            elif how == "torch.save":
                file = io.BytesIO()
                torch.save(m, file)
                file.seek(0)
                self.all[i] = torch.load(file, weights_only=False)
            else:
                m.load_state_dict(copy.deepcopy(m.state_dict()))
        self.optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in self.all]

    @rule(kind=st.sampled_from(["transposed", "slice", "new"]))
    def storage(self, kind: str) -> None:
        for m in self.all:
            layer: Any = m[0]  # type: ignore[index]
            w = layer.weight.detach()
            if kind == "transposed":
                layer.weight.data = w.t().contiguous().t()
            elif kind == "slice":
                layer.weight.data = torch.cat([w, w], 1)[:, : w.shape[1]]
            else:
                layer.weight = nn.Parameter(w * 0.5)
        self.optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in self.all]

    @rule()
    def hook(self) -> None:
        for m in self.all:
            m[-1].register_forward_hook(doubled)  # type: ignore[index]

    @rule(on=st.booleans())
    def patch_again(self, on: bool) -> None:
        (fastae.patch if on else fastae.unpatch)(self.all[2])

    @rule(mode=st.booleans())
    def mode(self, mode: bool) -> None:
        for m in self.all:
            m.train(mode)


TestLayerLife = LayerLife.TestCase
TestLayerLife.settings = settings(stateful_step_count=15)
