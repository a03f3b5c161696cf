"""Noise, dropout and variational codes in a model: the step against autograd on the same random numbers."""

import copy
import logging
import math
from typing import Any

import pytest
import torch
from cases import uniform
from torch import Tensor, nn

import fastae
from fastae import DenseAutoencoder, TrainStep
from fastae.bottlenecks import Variational
from fastae.models import objective as objectives
from fastae.nn.dropout import HiddenDropout
from fastae.noise import Drop, Gaussian, Mask, SaltPepper, Swap

X = uniform(40, 9, low=0.05, high=0.95)
BATCHES = [*torch.randperm(40, generator=torch.Generator().manual_seed(1)).split(16)] * 2  # 16, 16, 8
NOISES = [
    Gaussian(0.3), Gaussian(0.5, 0.0, 1.0), Mask(0.3), Mask(0.4, "masked"), SaltPepper(0.3), Swap(0.3),
    Swap(0.3, ((0, 3), (5, 6, 7))), Drop(0.4),
]  # fmt: skip
CODES = [Variational(), Variational(0.3, warmup_steps=4), Variational(2.0, capacity=1.5), Variational(free_bits=0.2)]


def model(dtype: torch.dtype = torch.float64, **options: Any) -> DenseAutoencoder:
    torch.manual_seed(0)
    return DenseAutoencoder([9, 7, 3], **options).to(dtype)


def sgd(ae: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(ae.parameters(), lr=0.1)


def drawn_by(step: TrainStep) -> dict[str, list[Tensor]]:
    """The random numbers of the step just taken, as autograd's ops want them."""
    memory, static = step._last, step.static
    found: dict[str, list[Tensor]] = {"dropout": [], "sample": []}
    for stage, place in zip(static.program.stages, memory.places, strict=True):
        if place.key is not None:
            kind = "sample" if hasattr(stage, "part") else "dropout"
            if place.key.drawn:
                found[kind].append(place.key.drawn[0].clone())
            else:
                from fastae_kernels.noise import kept, normals, uniforms

                width = stage.width if kind == "sample" else stage.widths[1]  # type: ignore[union-attr]
                if kind == "sample":
                    found[kind].append(normals(place.key, memory.count, width).to(memory.x.dtype))
                else:
                    u = uniforms(place.key, memory.count, width)
                    q = stage.dropout  # type: ignore[union-attr]
                    found[kind].append(kept(u, q, torch.empty_like(memory.x[:1, :1]).expand(u.shape).clone()) / (1 - q))
    found["x"] = [memory.given.clone()]
    has_target = memory.variant[0]
    found["target"] = [
        memory.target()[:, : static.program.out_features].clone() if has_target else memory.given.clone()
    ]
    return found


def plain_objective(ae: DenseAutoencoder, numbers: dict[str, list[Tensor]], beta: float) -> Tensor:
    """The objective on those numbers, by PyTorch's own ops."""
    masks, (x,), (target,) = iter(numbers["dropout"]), numbers["x"], numbers["target"]

    def through(stack: nn.Sequential, h: Tensor) -> Tensor:
        for layer in stack:
            h = h * next(masks) if isinstance(layer, HiddenDropout) else layer(h)
        return h

    p, kl = through(ae.encoder, x), None
    part = ae.bottleneck
    if part is not None:
        mu, log_var = objectives.halves(p)
        p = mu + (log_var / 2).exp() * numbers["sample"][0]
        kl = objectives.divergence(mu, log_var)
    y = through(ae.decoder, p)
    keep = ~target.isnan()
    values = objectives.eager_loss(y, target.nan_to_num(0.5), ae.kind, "none") * keep
    share = ae.corrupt.q if isinstance(ae.corrupt, Mask) and ae.corrupt.loss_on == "masked" else 1.0
    loss = objectives.row_losses(values / share, ae.kind).mean()
    if part is None or kl is None:
        return loss
    return loss + objectives.penalty(Variational(beta, 0, part.capacity, part.free_bits), kl)


def check_steps(ae: DenseAutoencoder, x: Tensor = X) -> None:
    """Six steps, each compared with autograd on the numbers that it drew; a kernel's normal numbers are fp32, and the
    twin's differ in their last bit."""
    x = x.to(next(ae.parameters()).dtype)
    other = copy.deepcopy(ae)
    step, optimizer = TrainStep(ae, sgd(ae), 16, seed=3), sgd(other)
    for number, rows in enumerate(BATCHES):
        loss = step(x, rows).clone()
        beta = 0.0 if ae.bottleneck is None else ae.bottleneck.beta_at(number)
        by_kernel = any(place.key is not None and not place.key.drawn for place in step._last.places)
        loose = 30 if by_kernel and ae.bottleneck is not None else 1
        wanted = plain_objective(other, drawn_by(step), beta)
        optimizer.zero_grad()
        wanted.backward()
        optimizer.step()
        torch.testing.assert_close(loss, wanted.detach(), rtol=loose * 1e-8, atol=1e-12)
        for p, q in zip(ae.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=loose * 1e-7, atol=loose * 5e-9)


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize("part", NOISES, ids=str)
@pytest.mark.parametrize("likelihood", ["mse", "bernoulli"])
def test_a_step_with_noise(part: Any, likelihood: str, backend: str) -> None:
    check_steps(model(corrupt=part, likelihood=likelihood))


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "leaky_relu", "sigmoid"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_with_dropout(activation: str, tied: bool, backend: str) -> None:
    check_steps(model(dropout=0.4, activation=activation, tied=tied))


@pytest.mark.parametrize("part", CODES, ids=str)
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "poisson"])
def test_a_step_with_a_variational_code(part: Variational, likelihood: str, backend: str) -> None:
    check_steps(model(bottleneck=part, likelihood=likelihood))


@pytest.mark.parametrize("features", [[9, 3], [9, 8, 7, 2]])
def test_everything_at_once(features: list[int], backend: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"dropout": 0.2, "corrupt": Mask(0.3), "bottleneck": Variational(0.5)}
    check_steps(DenseAutoencoder(features, "tanh", likelihood="bernoulli", **options).double())


@pytest.mark.parametrize("where", ["encoder", "decoder", "code"])
def test_islands_around_a_variational_code(where: str, backend: str) -> None:
    ae = model(bottleneck=Variational(0.7), likelihood="gaussian")
    if where == "encoder":
        ae.encoder.append(nn.Linear(6, 6).double())
    elif where == "decoder":
        ae.decoder.insert(0, nn.LayerNorm(3).double())
    else:
        ae.encoder.insert(1, nn.Tanh())
    assert any(type(stage).__name__ == "Module" for stage in ae.program().stages)
    check_steps(ae)


def test_weights_weigh_the_divergence_too(backend: str) -> None:
    weight = torch.tensor([0.0, 2.0]).repeat(20)
    ae = model(bottleneck=Variational(3.0), likelihood="gaussian")
    other, x = copy.deepcopy(ae), X.double()
    step = TrainStep(ae, sgd(ae), 40)
    loss = step(x, None, None, weight)
    numbers = {name: [t[1::2] for t in values] for name, values in drawn_by(step).items()}
    wanted = plain_objective(other, numbers, 3.0)
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=3e-7, atol=0)
    for p, q in zip(ae.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=3e-6, atol=3e-8)


@pytest.mark.parametrize("options", [{"corrupt": Mask(0.3)}, {"dropout": 0.3}, {"bottleneck": Variational()}], ids=str)
def test_bfloat16_steps_come_near(options: dict[str, Any], backend: str) -> None:
    ae = model(torch.float32, likelihood="gaussian", **options)
    other = copy.deepcopy(ae)
    losses = [TrainStep(m, sgd(m), 40, p, seed=1)(X).clone() for m, p in ((ae, "bfloat16"), (other, None))]
    torch.testing.assert_close(*losses, rtol=2e-2, atol=1e-2)
    for p, q in zip(ae.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0.1, atol=0.02 * float(q.grad.abs().max()) + 1e-3)


# ---------------------------------------------------------------- keys


def test_noise_is_of_seed_and_step_alone(backend: str) -> None:
    """The same numbers for the same seed and step, whatever was called before; others for another step or seed."""

    def rows(seed: int, steps: int) -> Tensor:
        ae = model(torch.float32, corrupt=Gaussian(1.0))
        step = TrainStep(ae, sgd(ae), 16, seed=seed)
        step.load_state_dict({"seed": seed, "steps": steps})
        torch.rand(steps + 1)
        step(X, torch.arange(16))
        return drawn_by(step)["x"][0]

    assert torch.equal(rows(0, 5), rows(0, 5))
    assert not torch.equal(rows(0, 5), rows(0, 6))
    assert not torch.equal(rows(0, 5), rows(1, 5))


@pytest.mark.parametrize("options", [{"corrupt": p} for p in NOISES[:3]] + [{"dropout": 0.3}], ids=str)
def test_parts_of_a_batch_get_the_noise_of_the_whole(options: dict[str, Any], backend: str) -> None:
    found = []
    for first, rows in ((0, torch.arange(16)), (0, torch.arange(5)), (5, torch.arange(5, 16))):
        ae = model(torch.float32, **options)
        step = TrainStep(ae, sgd(ae), 16)
        step(X, rows, first_row=first)
        numbers = drawn_by(step)
        found.append(numbers["x"] + numbers["dropout"])
    for whole, one, two in zip(*found, strict=True):
        assert torch.equal(whole, torch.cat([one, two]))


def test_eval_mode_draws_nothing() -> None:
    ae = model(torch.float32, corrupt=Mask(0.5), dropout=0.5)
    plain = model(torch.float32)
    step, other = TrainStep(ae.eval(), sgd(ae), 40), TrainStep(plain, sgd(plain), 40)
    assert torch.equal(step(X), other(X))
    ae.train()
    assert not torch.equal(step(X), other(X))  # the mode is part of what the step was built for


# ---------------------------------------------------------------- the model


def test_calls_but_loss_see_clean_rows_and_the_mean_of_the_code() -> None:
    parts: dict[str, Any] = {
        "corrupt": Mask(0.5),
        "dropout": 0.5,
        "bottleneck": Variational(),
        "likelihood": "bernoulli",
    }
    ae = model(torch.float32, **parts)
    code, score, before = ae.encode(X), ae.score(X), ae.loss(X)
    assert torch.equal(code, ae.encode(X))
    assert torch.equal(score, ae.score(X))
    assert not torch.equal(before, ae.loss(X))
    assert ae.training
    torch.testing.assert_close(ae.encode(X.numpy()), code.detach().numpy())
    assert code.shape == (40, 3)
    ae.eval()
    assert torch.equal(ae.loss(X), ae.loss(X))
    y = ae(X)
    assert y.shape == X.shape
    torch.testing.assert_close(y, ae.decode(code))
    nll = -(X * y.log() + (1 - X) * (1 - y).log()).sum(1)
    torch.testing.assert_close(score, nll.detach(), rtol=1e-5, atol=1e-5)


def test_loss_in_eval_mode_is_nll_of_the_mean_and_the_divergence() -> None:
    ae = model(bottleneck=Variational(0.5), likelihood="gaussian").eval()
    x = X.double()
    mu, log_var = ae.encoder(x).chunk(2, 1)
    kl = 0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum(1)
    wanted = 0.5 * (ae(x) - x).square().sum(1).mean() + 0.5 * kl.mean()
    torch.testing.assert_close(ae.loss(x), wanted, rtol=1e-10, atol=0)


def test_loss_in_training_mode_has_the_objectives_mean() -> None:
    """Of 4,000 draws by PyTorch's generator and by steps: the same mean, within its error."""
    options: dict[str, Any] = {
        "corrupt": Mask(0.4),
        "dropout": 0.3,
        "bottleneck": Variational(),
        "likelihood": "gaussian",
    }
    ae = model(torch.float32, **options)
    x = X.repeat(50, 1)
    torch.manual_seed(5)
    one = torch.stack([ae.loss(x).detach() for _ in range(60)])
    step = TrainStep(ae, torch.optim.SGD(ae.parameters(), lr=1e-30), len(x))
    two = torch.stack([step(x).clone() for _ in range(60)])
    error = float((one.var() / 60 + two.var() / 60).sqrt())
    assert abs(float(one.mean() - two.mean())) < 5 * error
    assert float(one.std()) > 0.3 * float(two.std()) > 0


@pytest.mark.parametrize("part", [*NOISES, *CODES, None], ids=str)
def test_save_and_load(part: Any, tmp_path: Any) -> None:
    options: dict[str, Any] = {"corrupt": part} if part in NOISES else {"bottleneck": part}
    ae = model(torch.float32, likelihood="gaussian", dropout=0.25, **options)
    ae.save(tmp_path / "m")
    again = fastae.load(tmp_path / "m")
    assert isinstance(again, DenseAutoencoder)
    assert (again.corrupt, again.bottleneck, again.dropout) == (ae.corrupt, ae.bottleneck, 0.25)
    assert again.config() == ae.config()
    torch.testing.assert_close(again.score(X), ae.score(X), rtol=0, atol=0)


def test_defaults_leave_files_and_keys_as_they_were() -> None:
    assert "dropout" not in model().config()
    assert "corrupt" not in model().config()
    assert [*model(dropout=0.5).state_dict()] == [*model().state_dict()]


FULL: dict[str, Any] = {"corrupt": Mask(0.3), "dropout": 0.2, "bottleneck": Variational(), "likelihood": "bernoulli"}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_resumes_to_the_same_bits(precision: str, tmp_path: Any) -> None:
    options: dict[str, Any] = {"progress": False, "batch_size": 16, "precision": precision, "lr": 1e-2}
    ae, other = model(torch.float32, **FULL), model(torch.float32, **FULL)
    whole = ae.fit(X, epochs=4, **options)
    other.fit(X, epochs=2, callbacks=[fastae.Checkpoint(tmp_path)], **options)
    other = model(torch.float32, **FULL)
    resumed = other.fit(X, epochs=4, callbacks=[fastae.Checkpoint(tmp_path, resume=True)], **options)
    assert resumed.loss == whole.loss
    assert resumed.kl == whole.kl
    assert all(map(torch.equal, ae.parameters(), other.parameters()))


def test_fit_tells_nll_kl_and_units_apart() -> None:
    ae = model(torch.float32, bottleneck=Variational(0.25), likelihood="bernoulli")
    history = ae.fit(X, epochs=3, progress=False, batch_size=16, lr=1e-2)
    assert len(history.nll) == len(history.kl) == len(history.active_units) == 3
    for loss, nll, kl in zip(history.loss, history.nll, history.kl, strict=True):
        assert loss == pytest.approx(nll + 0.25 * kl, rel=1e-5)
    assert fastae.History(**history.to_dict()) == history
    assert model(torch.float32).fit(X, epochs=1, progress=False).kl == []


def test_collapse_and_a_warm_up_that_does_not_end_are_named(caplog: pytest.LogCaptureFixture) -> None:
    ae = model(torch.float32, bottleneck=Variational(1e4, warmup_steps=100), likelihood="gaussian")
    with caplog.at_level(logging.WARNING, logger="fastae"):
        ae.fit(X * 0.01, epochs=60, progress=False, lr=5e-2, validation_split=0)
    text = caplog.text
    assert "beta rises over 100 steps and training takes 60: it will not reach 10000" in text
    assert "the code has collapsed: none of its 3 latents varies with the rows" in text


# ---------------------------------------------------------------- samples and bounds


def test_sample_and_elbo() -> None:
    ae = model(torch.float32, bottleneck=Variational(), likelihood="bernoulli")
    drawn = ae.sample(16, seed=1)
    assert drawn.shape == (16, 9)
    assert torch.equal(drawn, ae.sample(16, seed=1))
    assert not torch.equal(drawn, ae.sample(16, seed=2))
    assert bool(((drawn > 0) & (drawn < 1)).all())
    bound = ae.elbo(X, samples=200)
    assert bound.shape == (40,)
    mean = bound.mean()
    weighted = [
        sum(float(ae.elbo(X, samples=k, importance=True, seed=s).mean()) for s in range(400 // k)) / (400 // k)
        for k in (1, 5, 50)
    ]
    assert float(mean) == pytest.approx(weighted[0], abs=0.05)  # of one sample it is the bound itself
    assert weighted[0] < weighted[1] < weighted[2]
    torch.testing.assert_close(torch.from_numpy(ae.elbo(X.numpy(), samples=200)), bound)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "poisson"])
def test_importance_weighted_bounds_near_the_likelihood(likelihood: str) -> None:
    """log p(x) by numerical integration over a code of one latent."""
    torch.manual_seed(0)
    ae = DenseAutoencoder([9, 4, 1], "tanh", likelihood=likelihood, bottleneck=Variational()).double()
    x = (X.double() * 3).round() if likelihood == "poisson" else X.double().round()
    z = torch.linspace(-9, 9, 4001).double().unsqueeze(1)
    with torch.no_grad():
        y = ae.decoder(z)
    from fastae.nn.log_likelihood import log_likelihood

    constants = log_likelihood(likelihood).constants
    log_p = -objectives.eager_loss(y[:, None].expand(-1, 40, -1), x[None].expand(4001, -1, -1), ae.kind, "none").sum(-1)
    log_p = log_p - (0 if constants is None else constants(x, ae.kind.setting))
    prior = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    truth = torch.logsumexp(log_p + prior, 0) + math.log(18 / 4000)
    torch.testing.assert_close(ae.elbo(x, samples=20000, importance=True), truth, rtol=0, atol=0.02)
    assert bool((ae.elbo(x, samples=4000) < truth + 0.05).all())


# ---------------------------------------------------------------- bad input

BAD = [
    ({"corrupt": "mask"}, "corrupt: mask needs q; got 'mask'"),
    ({"corrupt": "musk:0.3"}, "corrupt must be one of gaussian, mask, .*; got 'musk:0.3'; did you mean 'mask'"),
    ({"corrupt": "mask:1"}, "corrupt: Mask: q must be a number between 0 and 1, 1 excluded; got 1"),
    ({"corrupt": "mask:q=0.3,p=1"}, "corrupt: mask has q, loss_on; got 'p=1'"),
    ({"corrupt": "mask:0.3,some"}, "loss_on must be 'all' or 'masked'; got 'some'"),
    ({"corrupt": Swap(0.1, ((3, 9),))}, "corrupt: groups must hold columns below 9; got 9"),
    ({"corrupt": "swap:0.1,groups=a"}, r"Swap: groups must be tuples of columns, .*; got 'a'"),
    ({"dropout": -0.1}, "dropout must be a number between 0 and 1"),
    ({"corrupt": "gaussian:inf"}, "Gaussian: std must be a number at least 0; got inf"),
    ({"bottleneck": "variational:beta=inf"}, "Variational: beta must be a number at least 0; got inf"),
    ({"dropout": 1.0}, "dropout must be a number between 0 and 1, 1 excluded; got 1.0"),
    ({"bottleneck": "variational:beta=-1"}, "bottleneck: Variational: beta must be a number at least 0; got -1"),
    ({"bottleneck": Variational()}, "likelihood must be one of gaussian, .* beside a variational code; got 'mse'"),
    ({"bottleneck": Variational(), "likelihood": "gaussian", "tied": True}, "tied must be False beside a variational"),
    (
        {"bottleneck": Variational(), "likelihood": "gaussian", "code_activation": "tanh"},
        "code_activation must be 'identity' beside a variational code; got 'tanh'",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_parts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_what_takes_no_code_says_so() -> None:
    with pytest.raises(ValueError, match="sample: bottleneck must be Variational; got a model without one"):
        model().sample(3)
    with pytest.raises(ValueError, match="elbo: bottleneck must be Variational; got a model without one"):
        model().elbo(X.double())
    with pytest.raises(TypeError, match=r"corrupt must be a part of fastae.noise or its name; got 0.3"):
        model(corrupt=0.3)
    step = TrainStep(ae := model(), sgd(ae), 40)
    with pytest.raises(ValueError, match="divergence is that of a variational code"):
        step.divergence()
    masked = model(corrupt=Mask(0.3, "masked"))
    with pytest.raises(ValueError, match="target must be None where the loss is on masked values"):
        TrainStep(masked, sgd(masked), 40)(X.double(), None, X.double())
    with pytest.raises(ValueError, match="x must not require a gradient where it is corrupted"):
        masked.loss(X.double().requires_grad_())


@pytest.mark.parametrize("first", ["torch", "triton"])
def test_layers_of_two_backends_have_the_same_mask(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel counts its numbers out, a twin has them drawn: whichever is below decides."""
    from fastae.engine import static_step

    def alternating(program: Any, like: Any, rows: int) -> list[tuple[str, str]]:
        names = ["torch", "triton"] if first == "torch" else ["triton", "torch"]
        return [(names[i % 2], "") for i, _ in enumerate(program.stages)]

    monkeypatch.setattr(static_step, "choices", alternating)
    check_steps(model(dropout=0.4, activation="tanh"))
    check_steps(model(dropout=0.4, corrupt=Mask(0.2), bottleneck=Variational(), likelihood="gaussian"))
