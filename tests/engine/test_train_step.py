"""`TrainStep`: the same training as autograd's, on memory allocated once; what it refuses and what it leaves alone."""

import copy
import ctypes
import logging
import platform
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from accuracy import check_all
from cases import ACTIVATIONS, normal, uniform
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from twins import plain_loss

import fastae


def model(dtype: torch.dtype = torch.float32, **options: object) -> fastae.DenseAutoencoder:
    torch.manual_seed(0)
    return fastae.DenseAutoencoder([17, 12, 5], **options).to(dtype)


def adam(ae: nn.Module, **options: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(ae.parameters(), **({"fused": True, "lr": 1e-2} | options))


def train_plainly(
    ae: fastae.DenseAutoencoder,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    batches: list[Tensor],
    target: Tensor | None = None,
) -> list[Tensor]:
    losses = []
    for rows in batches:
        loss = plain_loss(ae, x[rows], (x if target is None else target)[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


DATA = uniform(50, 17, low=0, high=1)
BATCHES = [*torch.randperm(50, generator=torch.Generator().manual_seed(0)).split(16)] * 2  # 16, 16, 16, 2, twice


# ---------------------------------------------------------------- the same training


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "identity", "softplus"])
def test_trains_as_autograd_does(activation: str, tied: bool, backend: str) -> None:
    ae = model(torch.float64, activation=activation, tied=tied)
    other, x = copy.deepcopy(ae), DATA.double()
    step = fastae.TrainStep(ae, adam(ae), 16)
    losses = [step(x, rows).clone() for rows in BATCHES]
    torch.testing.assert_close(losses, train_plainly(other, adam(other), x, BATCHES), rtol=1e-9, atol=0)
    for p, q in zip(ae.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_by_the_three_way_rule(activation: str, dtype: torch.dtype, backend: str) -> None:
    ae = model(dtype, activation=activation, output_activation="sigmoid")
    if activation == "logit":  # keep its argument inside (0, 1)
        with torch.no_grad():
            for layer in (*ae.encoder, *ae.decoder):
                layer.weight.mul_(0.1)
                layer.bias.fill_(0.4)
    x = uniform(23, 17, low=0.2, high=0.9, dtype=dtype)
    wide, eager = copy.deepcopy(ae).double(), copy.deepcopy(ae)
    fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), lr=0.0), 23)(x)
    plain_loss(eager, x, x).backward()
    plain_loss(wide, x.double(), x.double()).backward()
    check_all(*([p.grad for p in m.parameters()] for m in (ae, eager, wide)))


def test_bfloat16_computes_low_and_keeps_fp32_parameters(backend: str) -> None:
    ae = model()
    low = copy.deepcopy(ae).bfloat16()
    fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), lr=0.0), 50, "bfloat16")(DATA)
    fastae.TrainStep(low, torch.optim.SGD(low.parameters(), lr=0.0), 50)(DATA.bfloat16())
    for p, q in zip(ae.parameters(), low.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.float32
        assert torch.equal(p.grad.bfloat16(), q.grad)  # the kernels round no gradient of an fp32 parameter


def test_a_target_and_none(backend: str) -> None:
    ae, other = model(), model()
    optimizer = adam(other)
    noisy = DATA + 0.1 * normal(*DATA.shape)
    step = fastae.TrainStep(ae, adam(ae), 16)
    for (x, target), rows in zip([(noisy, DATA), (DATA, None)] * 4, BATCHES, strict=True):
        loss = step(x, rows, target)
        torch.testing.assert_close([loss], train_plainly(other, optimizer, x, [rows], target), rtol=1e-4, atol=0)
    for p, q in zip(ae.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["encoder", "decoder", "decoder.1.bias"])
def test_frozen_parameters_stay(frozen: str) -> None:
    ae = model()
    for name, p in ae.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    before = copy.deepcopy(ae)
    other = copy.deepcopy(ae)
    step = fastae.TrainStep(ae, adam(ae), 16)
    for rows in BATCHES:
        step(DATA, rows)
    train_plainly(other, adam(other), DATA, BATCHES)
    for (name, p), q, was in zip(ae.named_parameters(), other.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        assert torch.equal(p, was) == name.startswith(frozen)
        assert (p.grad is None) == name.startswith(frozen)


# ---------------------------------------------------------------- optimizers


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, fused=True),
        lambda p: torch.optim.Adam(p, fused=True, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6),
        lambda p: torch.optim.AdamW(p, fused=True, weight_decay=0.1),
        lambda p: torch.optim.Adam(p),
        lambda p: torch.optim.Adam(p, fused=True, amsgrad=True),
        lambda p: torch.optim.Adam([{"params": [q], "lr": 0.01 * i} for i, q in enumerate(p)], fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.RMSprop(p),
    ],
    ids=["adam", "adam options", "adamw", "adam loop", "amsgrad", "groups", "sgd", "rmsprop"],
)
def test_every_optimizer_and_its_state(make: object) -> None:
    """The state is what the optimizer's own `step` would have made, so either can go on from the other's."""
    ae = model(torch.float64)
    other, x = copy.deepcopy(ae), DATA.double()
    ours, theirs = make(list(ae.parameters())), make(list(other.parameters()))
    step = fastae.TrainStep(ae, ours, 16)
    for _ in range(2):
        for rows in BATCHES[:3]:
            step(x, rows)
        train_plainly(other, theirs, x, BATCHES[:3])
        train_plainly(ae, ours, x, BATCHES[3:5])  # the optimizer's own step in between
        train_plainly(other, theirs, x, BATCHES[3:5])
    for p, q in zip(ae.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(ours.state[p], theirs.state[q], rtol=1e-6, atol=1e-12)


def test_a_loaded_optimizer_state_is_taken_over() -> None:
    ae = model()
    optimizer = adam(ae)
    step = fastae.TrainStep(ae, optimizer, 16)
    step(DATA, BATCHES[0])
    saved = copy.deepcopy([ae.state_dict(), optimizer.state_dict()])
    after = [step(DATA, rows).item() for rows in BATCHES]
    ae.load_state_dict(saved[0])
    optimizer.load_state_dict(copy.deepcopy(saved[1]))  # whose tensors the optimizer then trains on
    assert [step(DATA, rows).item() for rows in BATCHES] == after
    fresh = model()
    fresh.load_state_dict(saved[0])
    fresh_optimizer = adam(fresh)
    fresh_optimizer.load_state_dict(saved[1])
    again = fastae.TrainStep(fresh, fresh_optimizer, 16)
    assert [again(DATA, rows).item() for rows in BATCHES] == after


def test_a_learning_rate_schedule_and_hooks() -> None:
    ae, other = model(), model()
    ours, theirs = adam(ae), adam(other)
    step = fastae.TrainStep(ae, ours, 16)
    step(DATA, BATCHES[0])
    train_plainly(other, theirs, DATA, BATCHES[:1])
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.1) for o in (ours, theirs)]  # made after the TrainStep
    hooked: list[int] = []
    ours.register_step_post_hook(lambda *_: hooked.append(1))
    for rows in BATCHES[1:4]:
        step(DATA, rows)
        train_plainly(other, theirs, DATA, [rows])
        for schedule in schedules:
            schedule.step()
    assert len(hooked) == 3
    for p, q in zip(ae.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- the loss


def test_mean_loss_is_over_rows_and_starts_again() -> None:
    ae = model()
    step = fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), lr=0.0), 16)
    assert step.mean_loss() != step.mean_loss()  # NaN: no step yet
    for rows in BATCHES[:4]:
        step(DATA, rows)
    assert step.mean_loss() == pytest.approx(ae.loss(DATA).item(), rel=1e-6)
    step(DATA, BATCHES[0])
    assert step.mean_loss() == pytest.approx(ae.loss(DATA[BATCHES[0]]).item(), rel=1e-6)


def test_two_runs_are_bit_identical(backend: str) -> None:
    def run() -> list[Tensor]:
        ae = model()
        step = fastae.TrainStep(ae, adam(ae), 16)
        for rows in BATCHES:
            step(DATA, rows)
        return list(ae.parameters())

    assert all(torch.equal(p, q) for p, q in zip(run(), run(), strict=True))


# ---------------------------------------------------------------- memory


def allocations(backend: str, activation: str, precision: str | None) -> set[tuple[str, int]]:
    """(op, bytes) of what four steps in the steady state allocate, numbers aside."""
    torch.manual_seed(0)
    ae = fastae.DenseAutoencoder([784, 256, 128], activation=activation)
    x = torch.rand(512, 784).to(torch.bfloat16 if precision else torch.float32)
    with fastae.use_backend(backend):
        step = fastae.TrainStep(ae, adam(ae), 128, precision)
        batches = torch.randperm(512).split(128)
        for rows in batches:
            step(x, rows)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
            for rows in batches:
                step(x, rows)
    made = {(event.name, event.self_cpu_memory_usage) for event in traced.events()}
    assert any(bytes_ for _, bytes_ in made), "the profiler sees allocations"
    return {(name, bytes_) for name, bytes_ in made if bytes_ > 8}


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_the_steady_state_allocates_nothing(activation: str) -> None:
    assert allocations("torch", activation, None) == set()


MAPPED = """
import ctypes, resource, torch
from fastae_kernels import onednn
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usm fsm uord ford keep".split()]
info = ctypes.CDLL(None).mallinfo2
info.restype = Info
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if {kept}:
    onednn._keep_freed_memory()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
before = info().hblks
result = torch.empty(20 << 20, dtype=torch.uint8)
print(info().hblks - before, faults)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc 2.33 or newer"
)
def test_the_memory_of_onednns_results_stays_with_the_process() -> None:
    """They are fresh at every step: mapped from the system, page by page, or from what the heap has kept."""
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    found = [run([sys.executable, "-c", MAPPED.format(kept=kept)]).stdout.split() for kept in (False, True)]
    assert [int(mapped) for mapped, _ in found] == [1, 0]
    assert int(found[1][1]) < 12  # the block is never written to: it has 8,192 pages, or 16 huge ones


# ---------------------------------------------------------------- errors, and what is left to autograd


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.rand(4, 16),), "x must be [rows, 17]; got [4, 16]"),
        ((torch.empty(4, 17, device="meta"),), "x must be on cpu as the model is; got meta"),
        ((torch.rand(17, 17),), "a step takes 1 to 16 rows; got 17"),
        ((DATA, torch.arange(17)), "a step takes 1 to 16 rows; got 17"),
        ((DATA, torch.arange(0)), "a step takes 1 to 16 rows; got 0"),
        ((torch.rand(2, 3, 17),), "x must be [rows, 17]; got [2, 3, 17]"),
        ((DATA, torch.arange(3), torch.rand(50, 16)), "target must be [50, 17]; got [50, 16]"),
        ((torch.rand(3, 17), None, torch.rand(4, 17)), "target must be [3, 17]; got [4, 17]"),
    ],
)
def test_wrong_rows(arguments: tuple[Tensor, ...], text: str) -> None:
    ae = model()
    step = fastae.TrainStep(ae, adam(ae), 16)
    before = copy.deepcopy(ae.state_dict())
    with pytest.raises(ValueError, match=f"^TrainStep: {re.escape(text)}"):
        step(*arguments)
    assert all(torch.equal(before[k], v) for k, v in ae.state_dict().items())


def test_wrong_arguments() -> None:
    ae = model()
    for batch_size, error in ((0, ValueError), (2.5, TypeError), ("8", TypeError)):
        with pytest.raises(error, match="TrainStep: batch_size must be"):
            fastae.TrainStep(ae, adam(ae), batch_size)
    with pytest.raises(ValueError, match="precision must be None, 'float32' or 'bfloat16'; got 'float16'"):
        fastae.TrainStep(ae, adam(ae), 8, "float16")
    with pytest.raises(ValueError, match="precision 'bfloat16' needs float32 parameters; got float64"):
        fastae.TrainStep(ae.double(), adam(ae), 8, "bfloat16")
    with pytest.raises(ValueError, match="optimizer must be over the model's parameters"):
        fastae.TrainStep(ae, adam(model()), 8)
    with pytest.raises(ValueError, match="must have a parameter that requires a gradient"):
        fastae.TrainStep(ae.requires_grad_(False), adam(model()), 8)


class OwnLoss(fastae.DenseAutoencoder):
    def loss(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        return super().loss(x, target) + 0.01 * self.encode(x).abs().mean()


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_a_loss_of_ones_own_goes_by_autograd_and_says_so_once(
    precision: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    sparse = OwnLoss([17, 12, 5])
    theirs = copy.deepcopy(sparse)
    optimizer = adam(theirs)
    with caplog.at_level(logging.WARNING):
        step = fastae.TrainStep(sparse, adam(sparse), 16, precision)
        for rows in BATCHES:
            loss = step(DATA, rows)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
                wanted = theirs.loss(DATA[rows])
            wanted.backward()
            optimizer.step()
            torch.testing.assert_close(loss, wanted.detach(), rtol=1e-6, atol=0)
        sparse.encoder[0].bias.requires_grad_(False)
        step(DATA[:16])  # built anew
    assert caplog.messages == ["TrainStep calls the model's own loss through autograd: OwnLoss has a loss of its own"]


def test_fit_takes_a_loss_of_ones_own_for_both_of_its_losses() -> None:
    torch.manual_seed(0)
    sparse = OwnLoss([17, 12, 5])
    history = sparse.fit(DATA, epochs=3, batch_size=16, progress=False, validation_data=DATA[:9])
    assert history.loss[-1] < history.loss[0]
    assert history.val_loss[-1] == pytest.approx(sparse.loss(DATA[:9]).item(), rel=1e-6)


def test_a_loss_that_is_no_scalar_of_the_parameters_is_refused() -> None:
    class Rows(fastae.DenseAutoencoder):
        def loss(self, x: Tensor, target: Tensor | None = None) -> Tensor:
            return self(x).mean(1)

    ae = Rows([17, 5])
    with pytest.raises(ValueError, match="the model's loss must be a scalar tensor that depends on its parameters"):
        fastae.TrainStep(ae, adam(ae), 16)(DATA[:4])


def test_another_model_is_refused() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"^TrainStep: model must be an autoencoder of fastae; got Linear$"):
        fastae.TrainStep(layer, adam(layer), 16)


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_the_captured_step_trains_as_the_cpu_does(precision: str | None) -> None:
    ae, other = model(), model()
    ae.to("cuda")
    x = DATA.to("cuda")
    step = fastae.TrainStep(ae, adam(ae, capturable=True), 16, precision)
    theirs = fastae.TrainStep(other, adam(other), 16, precision)
    for rows in BATCHES * 4:
        loss = step(x, rows.to("cuda"))
        torch.testing.assert_close(loss.cpu(), theirs(DATA, rows), rtol=2e-2 if precision else 1e-3, atol=1e-5)
    assert step._graphed is not None
    assert step._graphed.graph is not None


@pytest.mark.gpu
def test_a_changed_learning_rate_is_captured_again() -> None:
    ae = model().to("cuda")
    optimizer = adam(ae, capturable=True)
    step, x = fastae.TrainStep(ae, optimizer, 50), DATA.to("cuda")
    for _ in range(5):
        step(x)
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(2):
        step(x)
    before = [p.detach().clone() for p in ae.parameters()]
    step(x)
    assert all(torch.equal(p, q) for p, q in zip(before, ae.parameters(), strict=True))


@pytest.mark.gpu
def test_the_steady_state_on_a_gpu_allocates_nothing_and_never_waits() -> None:
    ae = model().to("cuda")
    step, x = fastae.TrainStep(ae, adam(ae, capturable=True), 16), DATA.to("cuda")
    batches = [rows.to("cuda") for rows in BATCHES]
    for rows in batches:
        step(x, rows)
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rows in batches[:3]:
            step(x, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
