"""Modules that are not fastae's own, inside a `TrainStep` and inside `fit`: as a plain loop trains them."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastae
from fastae.engine.program import Dense

X = torch.randn(96, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model(kind: type = fastae.DenseAutoencoder, **options: object) -> fastae.DenseAutoencoder:
    torch.manual_seed(0)
    return kind([30, 64, 32], dtype=torch.float64, **options)


def normed(**options: object) -> fastae.DenseAutoencoder:
    ae = model(**options)
    ae.encoder.insert(1, nn.BatchNorm1d(64, dtype=torch.float64))
    ae.encoder.insert(2, nn.Dropout(0.2))
    return ae


def adam(ae: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(ae.parameters(), lr=3e-3, fused=True)


def plain_loop(ae: nn.Module, batches: list[Tensor], loss: Callable[..., Tensor] = F.mse_loss) -> list[Tensor]:
    optimizer, losses = adam(ae), []
    for x in batches:
        optimizer.zero_grad()
        value = loss(ae(x), x)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return losses


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Bit for bit, buffers and gradients included."""
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


# ---------------------------------------------------------------- BatchNorm and Dropout in the encoder


def test_batchnorm_and_dropout_are_bit_for_bit_the_plain_loops() -> None:
    ours, theirs = normed(), normed()
    step = fastae.TrainStep(ours, adam(ours), 64)
    assert [type(s) is Dense for s in step.static.program.stages] == [True, False, True, True, True]
    batches = [X[i * 7 % 32 :][:64] for i in range(48)] + [X[:17], X[:1].expand(5, 30)]  # partial ones too
    torch.manual_seed(1)
    mine = [step(x) for x in batches]
    torch.manual_seed(1)
    wanted = plain_loop(theirs, batches)
    assert_same(ours, theirs)
    torch.testing.assert_close(torch.stack(mine), torch.stack(wanted), rtol=1e-12, atol=0)
    assert step.static.repeats, "the calls around the island are replayed"


def test_fit_trains_it_as_a_plain_loop_does() -> None:
    ours, theirs = normed(), normed()
    torch.manual_seed(1)
    history = ours.fit(
        X, epochs=5, batch_size=40, lr=3e-3, validation_split=0, seed=3, precision="float64", progress=False
    )
    generator = torch.Generator().manual_seed(3)
    batches = [X[rows] for _ in range(5) for rows in torch.randperm(96, generator=generator).split(40)]
    torch.manual_seed(1)
    losses = plain_loop(theirs, batches)
    assert_same(ours, theirs)
    last = sum(loss.item() * n for loss, n in zip(losses[-3:], (40, 40, 16), strict=True)) / 96
    assert history.loss[-1] == pytest.approx(last, rel=1e-12)


def test_val_loss_is_measured_in_eval_mode_and_the_mode_restored() -> None:
    ae = normed().eval()
    modes: list[bool] = []

    class Look(fastae.Callback):
        def on_epoch_end(self, run: object) -> None:
            modes.append(run.model.training)  # type: ignore[attr-defined]
            self.val = run.model.eval().loss(X[:9]).item()  # type: ignore[attr-defined]
            run.model.train()  # type: ignore[attr-defined]

    look = Look()
    history = ae.fit(X, epochs=2, validation_data=X[:9], precision="float64", callbacks=[look], progress=False,
                     batch_size=32)  # fmt: skip
    assert modes == [True, True]
    assert history.val_loss[-1] == pytest.approx(look.val, rel=1e-12)
    assert not ae.training
    assert torch.equal(ae.score(X), ae.score(X))


def test_the_mode_is_the_models_own() -> None:
    """A step neither trains nor evaluates: an island runs in the mode that it is in, and that may change."""
    ours, theirs = normed(), normed()
    step, optimizer = fastae.TrainStep(ours, adam(ours), 64), adam(theirs)
    for mode in (False, True, False):
        for ae in (ours, theirs):
            ae.train(mode)
            torch.manual_seed(2)
            if ae is ours:
                step(X[:64])
            else:
                optimizer.zero_grad()
                F.mse_loss(ae(X[:64]), X[:64]).backward()
                optimizer.step()
    assert_same(ours, theirs)


# ---------------------------------------------------------------- every other kind


class Skip(fastae.DenseAutoencoder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * x


class Noisy(fastae.DenseAutoencoder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x) if self.training else x)


class Doubled(nn.Module):
    """In place, as people write it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def _sigmoid_appended(ae: fastae.DenseAutoencoder) -> None:
    ae.decoder.append(nn.Sigmoid())


def _first_is_foreign(ae: fastae.DenseAutoencoder) -> None:
    ae.encoder.insert(0, nn.BatchNorm1d(30, dtype=torch.float64))


def _linear_replaced(ae: fastae.DenseAutoencoder) -> None:
    ae.encoder[1] = nn.Sequential(
        nn.Linear(64, 48, dtype=torch.float64), nn.GELU(), nn.Linear(48, 32, dtype=torch.float64)
    )


def _weight_norm(ae: fastae.DenseAutoencoder) -> None:
    nn.utils.parametrizations.weight_norm(ae.encoder[1])


def _spectral_norm(ae: fastae.DenseAutoencoder) -> None:
    nn.utils.parametrizations.spectral_norm(ae.encoder[0])


def _in_place(ae: fastae.DenseAutoencoder) -> None:
    ae.encoder.append(Doubled())
    ae.decoder.append(nn.ELU(inplace=True))


def _unflatten_conv(ae: fastae.DenseAutoencoder) -> None:
    ae.decoder.insert(1, nn.Unflatten(1, (1, 64)))
    ae.decoder.insert(2, nn.Conv1d(1, 1, 3, padding=1, dtype=torch.float64))
    ae.decoder.insert(3, nn.Flatten())


def _module_hook(ae: fastae.DenseAutoencoder) -> None:
    ae.decoder[0].register_forward_hook(lambda _m, _a, y: y * 1.5)


def _model_hook(ae: fastae.DenseAutoencoder) -> None:
    ae.register_forward_hook(lambda _m, _a, y: y + 1)


def _parameter_hook(ae: fastae.DenseAutoencoder) -> None:
    ae.encoder[0].weight.register_hook(lambda g: g * (g.abs() < 0.01))


def _parameter_hook_on_a_shared_weight(ae: fastae.DenseAutoencoder) -> None:
    ae.decoder[0].bias = ae.encoder[0].bias
    ae.encoder[0].bias.register_hook(lambda g: g.clamp(-1e-3, 1e-3))  # of the sum, once


def _instance_forward(ae: fastae.DenseAutoencoder) -> None:
    own = ae.forward
    ae.forward = lambda v: own(v) + 1  # type: ignore[method-assign]


def _encoder_forward(ae: fastae.DenseAutoencoder) -> None:
    own = ae.encoder.forward
    ae.encoder.forward = lambda v: own(v) * 0.5  # type: ignore[method-assign]


def _unused_parameter(ae: fastae.DenseAutoencoder) -> None:
    ae.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))


def _island_shares_a_weight(ae: fastae.DenseAutoencoder) -> None:
    head = nn.Linear(32, 32, dtype=torch.float64)
    head.bias = ae.encoder[1].bias
    ae.encoder.append(head)


CHANGES = [
    _sigmoid_appended, _first_is_foreign, _linear_replaced, _weight_norm, _spectral_norm, _in_place, _unflatten_conv,
    _module_hook, _model_hook, _parameter_hook, _parameter_hook_on_a_shared_weight, _instance_forward, _encoder_forward,
    _unused_parameter, _island_shares_a_weight,
]  # fmt: skip


def changed(change: Callable[[fastae.DenseAutoencoder], None], **options: object) -> fastae.DenseAutoencoder:
    ae = model(**options)
    change(ae)
    return ae


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("tied", [False, True], ids=["plain", "tied"])
def test_trains_as_a_plain_loop_does(change: Callable[[fastae.DenseAutoencoder], None], tied: bool) -> None:
    if tied and change is _linear_replaced:
        pytest.skip("the layer that the decoder is tied to would be gone")
    options = {"activation": "tanh", "tied": tied}
    ours, theirs = changed(change, **options), changed(change, **options)
    step = fastae.TrainStep(ours, adam(ours), 64)
    batches = [X[:64], X[20:84], X[:17], X[32:]] * 3
    torch.manual_seed(1)
    mine = [step(x) for x in batches]
    torch.manual_seed(1)
    wanted = plain_loop(theirs, [x.clone() for x in batches])
    torch.testing.assert_close(torch.stack(mine), torch.stack(wanted), rtol=1e-9, atol=0)
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", [Skip, Noisy])
def test_a_forward_of_ones_own_is_one_island(kind: type) -> None:
    ours, theirs = model(kind), model(kind)
    step = fastae.TrainStep(ours, adam(ours), 64)
    assert len(step.static.program.stages) == 1
    batches = [X[:64], X[20:84]] * 4
    torch.manual_seed(1)
    mine = [step(x) for x in batches]
    torch.manual_seed(1)
    wanted = plain_loop(theirs, batches)
    assert_same(ours, theirs)
    torch.testing.assert_close(torch.stack(mine), torch.stack(wanted), rtol=1e-12, atol=0)


@pytest.mark.parametrize("likelihood", ["mae", "huber:delta=0.5"])
@pytest.mark.parametrize("island", [False, True])
def test_other_losses(likelihood: str, island: bool) -> None:
    ours, theirs = (changed(_sigmoid_appended if island else lambda _: None, likelihood=likelihood) for _ in range(2))
    loss = F.l1_loss if likelihood == "mae" else lambda y, t: F.huber_loss(y, t, delta=0.5)
    step = fastae.TrainStep(ours, adam(ours), 64)
    batches = [X[:64], X[20:84], X[:17]] * 4
    mine = [step(x) for x in batches]
    wanted = plain_loop(theirs, batches, loss)
    torch.testing.assert_close(torch.stack(mine), torch.stack(wanted), rtol=1e-9, atol=0)
    assert step.static.repeats
    value = loss(theirs(X), X).item()
    assert ours.loss(X).item() == pytest.approx(value, rel=1e-6)
    assert ours.score(X).mean().item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    "change", [_sigmoid_appended, _first_is_foreign, _module_hook, _model_hook], ids=lambda f: f.__name__[1:]
)
def test_in_bfloat16_an_island_is_cast_as_autocast_casts_it(change: Callable[[fastae.DenseAutoencoder], None]) -> None:
    ours, theirs = changed(change).float(), changed(change).float()
    x = X.float()
    step, optimizer = fastae.TrainStep(ours, adam(ours), 64, "bfloat16"), adam(theirs)
    for rows in (x[:64], x[20:84]) * 5:
        mine = step(rows)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = theirs(rows)
        loss = F.mse_loss(y.float(), rows)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(mine, loss.detach(), rtol=3e-2, atol=0)


def test_a_target_and_an_island() -> None:
    ours, theirs = normed(), normed()
    step, optimizer = fastae.TrainStep(ours, adam(ours), 64), adam(theirs)
    for ae in (ours, theirs):
        torch.manual_seed(4)
        for _ in range(3):
            if ae is ours:
                step(X[:64], target=1 - X[:64])
            else:
                optimizer.zero_grad()
                F.mse_loss(ae(X[:64]), 1 - X[:64]).backward()
                optimizer.step()
    assert_same(ours, theirs)


def test_an_island_of_another_width_is_named() -> None:
    ae = model()
    ae.decoder.append(nn.Linear(30, 29, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^TrainStep: decoder\.2 must give a tensor \[64, 30\]; got \[64, 29\]$"):
        fastae.TrainStep(ae, adam(ae), 64)(X[:64])


def test_non_finite_losses_bring_back_buffers_too() -> None:
    ae = normed()
    before = copy.deepcopy(ae.state_dict())
    with pytest.raises(FloatingPointError, match="The model is back at the end of epoch 0"):
        ae.fit(X * 1e150, epochs=3, batch_size=32, precision="float64", progress=False, validation_split=0, lr=1e300)
    for name, t in ae.state_dict().items():
        assert torch.equal(t, before[name]), name
