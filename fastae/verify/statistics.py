"""The statistics of `fastae verify`: the laws of noise, dropout and codes, and closed forms, of the compiled kernels.

`python -m fastae.verify.statistics` writes its findings to standard output. Kernels are compiled for a GPU and executed
on this CPU; what they draw is held to its law, and models at the optimum that a book gives to the loss and to the
gradient of 0 that belong there. A figure is the worst of several, in standard errors; 5 is the limit.
That of the divergence, which is not drawn, is in millionths.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator

import torch
from fastae_emulator.driver import on_target
from fastae_emulator.launches import Executor
from fastae_kernels.noise import Corruption, Dropout, Key
from fastae_kernels.ops import Layer
from fastae_kernels.sampling import Sample
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fastae.bottlenecks import Variational
from fastae.engine.randomness import corruption_of
from fastae.engine.train_step import TrainStep
from fastae.models.dense import DenseAutoencoder
from fastae.nn.backend import ops
from fastae.noise import Drop, Gaussian, Mask, Noise, SaltPepper, Swap
from fastae.verify.findings import Finding, announce, emit, named
from fastae.verify.laws import Law, mean, neighbours, normal, share, uncorrelated, uniform_counts
from fastae.verify.models import VERIFY_PRECISIONS, triton_in
from fastae.verify.workers import in_children, one_of, options

TARGETS = ("sm_80", "sm_90", "sm_100")
LIMIT = 5.0
ROWS, COLUMNS = 512, 128  # of what is drawn
STEPS = 16  # of a model at its optimum
BATCH = 256


class Drawn:
    """Noise of the compiled `gather`, by seed, step and stream."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def key(self, step: int = 3, stream: int = 0) -> Key:
        return Key(torch.tensor([self.seed, step, 0]), stream)

    def gather(self, part: Noise, x: Tensor, step: int = 3, stream: int = 0, groups: Tensor | None = None) -> Tensor:
        made: Corruption = corruption_of(part, self.key(step, stream), groups)
        out = torch.empty_like(x)
        ops("triton").gather(x, None, out, made, torch.empty_like(x))
        return out


# ---------------------------------------------------------------- laws


def gaussian_noise(drawn: Drawn) -> Iterator[Law]:
    zeros, part = torch.zeros(ROWS, COLUMNS), Gaussian(0.7)
    z = drawn.gather(part, zeros) / 0.7
    yield from normal(z)
    yield uncorrelated("steps", z, drawn.gather(part, zeros, step=4))
    yield uncorrelated("streams", z, drawn.gather(part, zeros, stream=2))
    yield uncorrelated("seeds", z, Drawn(drawn.seed + 1).gather(part, zeros))


def mask(drawn: Drawn) -> Iterator[Law]:
    hidden = drawn.gather(Mask(0.3), torch.ones(ROWS, COLUMNS)) == 0
    yield share("share", hidden, 0.3)
    yield from neighbours(hidden)
    yield uncorrelated("steps", hidden, drawn.gather(Mask(0.3), torch.ones(ROWS, COLUMNS), step=4) == 0)


def drop(drawn: Drawn) -> Iterator[Law]:
    left = drawn.gather(Drop(0.4), torch.ones(ROWS, COLUMNS))
    yield share("share", left == 0, 0.4)
    yield mean("mean", left, 1.0)


def salt_and_pepper(drawn: Drawn) -> Iterator[Law]:
    made = drawn.gather(SaltPepper(0.5, low=-1.0, high=2.0), torch.zeros(ROWS, COLUMNS))
    yield share("low", made == -1, 0.25)
    yield share("high", made == 2, 0.25)
    yield from neighbours(made)


def swap(drawn: Drawn) -> Iterator[Law]:
    """Each row has its number in all columns, so that a value says where it comes from."""
    x = torch.arange(ROWS, dtype=torch.float32).unsqueeze(1).expand(ROWS, COLUMNS).contiguous()
    made = drawn.gather(Swap(0.5), x)
    other = made != x
    yield share("share", other, 0.5 * (1 - 1 / ROWS))
    yield uniform_counts("where from", torch.bincount(made[other].long(), minlength=ROWS))
    yield from neighbours(other)
    paired = drawn.gather(Swap(0.5), x, groups=torch.arange(COLUMNS) // 2)
    apart = float((paired[:, ::2] != paired[:, 1::2]).sum())
    yield "groups", math.inf if apart else 0.0


def dropout(drawn: Drawn) -> Iterator[Law]:
    x, layer = torch.ones(ROWS, 16), Layer(torch.full((COLUMNS, 16), 1 / 16), torch.zeros(COLUMNS), "identity")
    made = [
        ops("triton").linear_act_fwd(x, *layer, False, None, Dropout(0.3, drawn.key(stream=stream)))[0]
        for stream in (2, 3)
    ]
    yield share("share", made[0] == 0, 0.3)
    yield mean("mean", made[0], 1.0)
    yield from neighbours(made[0])
    yield uncorrelated("layers", *made)


def code(drawn: Drawn) -> Iterator[Law]:
    """A code of known mean and variance, and its divergence, which is a mean of log q(z) - log p(z) too."""
    mu, log_var = torch.linspace(-2, 2, 32), torch.linspace(-3, 2, 32)
    x, w = torch.zeros(2048, 16), torch.zeros(64, 16)
    layer = Layer(w, torch.cat([mu, log_var]), "identity")
    z, _, kl, _ = ops("triton").linear_sample(x, layer, Sample(32, drawn.key(stream=4)))
    law = Normal(mu.double(), (log_var.double() / 2).exp())
    prior = Normal(torch.zeros(32).double(), torch.ones(32).double())
    yield from normal((z.double() - law.mean) / law.stddev)
    truth = float(kl_divergence(law, prior).sum())
    yield "KL", (float(kl.double().sum()) / len(x) / truth - 1) / 1e-6  # of fp32
    yield mean("log q - log p", (law.log_prob(z.double()) - prior.log_prob(z.double())).sum(1), truth)


# ---------------------------------------------------------------- closed forms


def correlated(rows: int, seed: int) -> Tensor:
    """Centred rows of 16 features with a covariance that is not the identity."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator).double() @ torch.randn(4, 16, generator=generator).double()
    x += 0.5 * torch.randn(rows, 16, generator=generator).double()
    return x - x.mean(0)


def at_optimum(ae: DenseAutoencoder, x: Tensor, seed: int, truth: float) -> Iterator[Law]:
    """Steps that change nothing: their losses' mean, and each gradient's, which is 0."""
    step = TrainStep(ae, torch.optim.SGD(ae.parameters(), lr=0.0), len(x), seed=seed)
    losses, gradients = list[Tensor](), list[Tensor]()
    for _ in range(STEPS):
        losses.append(step(x.float()).clone())
        gradients.append(torch.cat([p.grad.flatten() for p in ae.parameters() if p.grad is not None]).double())
    yield mean("loss", torch.stack(losses), truth)
    g = torch.stack(gradients)
    t = g.mean(0) / (g.std(0) / math.sqrt(STEPS)).clamp(min=1e-12)
    # t^2 of Student's law with n degrees has mean n / (n - 2) and variance 2 n^2 (n - 1) / ((n - 2)^2 (n - 4)); the
    # parameters' gradients hang together, as at most as many numbers as one row has gradients for
    n, free = STEPS - 1, ae.in_features
    spread = math.sqrt(2 * n**2 * (n - 1) / ((n - 2) ** 2 * (n - 4)) / free)
    yield "gradient", (float((t * t).mean()) - n / (n - 2)) / spread


def denoiser(part: Noise, seed: int) -> Iterator[Law]:
    """B = Cov(x, x~) Cov(x~)^-1, and the risk that it leaves."""
    x = correlated(BATCH, seed)
    cov = x.T @ x / len(x)
    if isinstance(part, Gaussian):
        cross, spoilt = cov, cov + part.std**2 * torch.eye(16).double()
    else:
        keep = 1 - part.q
        cross, spoilt = keep * cov, keep**2 * cov + keep * part.q * torch.diag(cov.diagonal())
    best = torch.linalg.solve(spoilt, cross).T
    ae = DenseAutoencoder([16, 16], corrupt=part)
    with torch.no_grad():
        for p, value in zip(ae.parameters(), (best, 0.0, torch.eye(16), 0.0), strict=True):
            p.copy_(torch.as_tensor(value))
    yield from at_optimum(ae, x, seed, float(torch.trace(cov - best @ cross.T)) / 16)


def variational(seed: int) -> Iterator[Law]:
    """Probabilistic PCA (Tipping and Bishop 1999): the bound of a linear variational code is log p(x) itself."""
    x = correlated(BATCH, seed)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    noise, values, vectors = values[:-4].mean(), values[-4:], vectors[:, -4:]
    w = vectors * (values - noise).sqrt()
    m = w.T @ w + noise * torch.eye(4).double()  # diagonal
    spoilt = w @ w.T + noise * torch.eye(16).double()
    truth = float((torch.logdet(spoilt) + 16 * math.log(2 * math.pi) + 16) / 2)  # -log p(x), the mean over the rows
    scale = float(noise.sqrt())
    ae = DenseAutoencoder([16, 4], likelihood=f"gaussian:scale={scale}", bottleneck=Variational())
    encoder = torch.cat([torch.linalg.solve(m, w.T), torch.zeros(4, 16).double()])
    bias = torch.cat([torch.zeros(4).double(), (noise / m.diagonal()).log()])
    with torch.no_grad():
        for p, value in zip(ae.parameters(), (encoder, bias, w, torch.zeros(16)), strict=True):
            p.copy_(value)
    constants = 16 * math.log(scale) + 8 * math.log(2 * math.pi)  # which a step leaves out
    yield from at_optimum(ae, x, seed, truth - constants)


CHECKS: dict[str, tuple[str, Callable[[Drawn], Iterator[Law]]]] = {
    "gaussian": ("gather", gaussian_noise),
    "mask": ("gather", mask),
    "drop": ("gather", drop),
    "salt_pepper": ("gather", salt_and_pepper),
    "swap": ("gather", swap),
    "dropout": ("linear_act_fwd", dropout),
    "code": ("linear_sample", code),
    "masked denoiser": ("training step", lambda drawn: denoiser(Mask(0.3), drawn.seed)),
    "Gaussian denoiser": ("training step", lambda drawn: denoiser(Gaussian(1.0), drawn.seed)),
    "probabilistic PCA": ("training step", lambda drawn: variational(drawn.seed)),
}


def run(target: str, quick: bool, seed: int, only: str | None) -> None:
    """Emit a finding for each law and, unless it is to be quick, for each closed form."""
    for name, (op, check) in CHECKS.items():
        if not named(op, only) or (quick and op == "training step"):
            continue
        announce(op, f"{name} on {target}")
        with triton_in(VERIFY_PRECISIONS["float32"]), on_target(target, Executor(), machine_code=False):
            laws = dict(check(Drawn(seed)))
        worst = max(laws, key=lambda law: abs(laws[law]))
        off = abs(laws[worst])
        detail = ", ".join(f"{law} {value:+.1f}" for law, value in laws.items())
        ok = off <= LIMIT
        again = f"; again: fastae verify --statistics --seed {seed}"
        emit(
            Finding(
                "statistics", op, "float32", name, "", target, f"{worst} {off:.1f}", f"{LIMIT:g} standard errors", ok,
                "" if ok else detail + again,
            )
        )  # fmt: skip


def main() -> None:
    given = options("fastae.verify.statistics", __doc__, TARGETS)
    given.target = one_of(given.target) if given.quick else given.target
    if len(given.target) != 1:
        sys.exit(in_children("fastae.verify.statistics", given))
    torch.set_num_threads(1)
    run(given.target[0], given.quick, given.seed, given.only)


if __name__ == "__main__":
    main()
