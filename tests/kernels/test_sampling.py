"""A variational code: its sample, divergence and gradients, against autograd and `torch.distributions` in fp64."""

import pytest
import torch
from accuracy import check_all
from cases import normal, uniform
from fastae_kernels.jit.backend import TRITON
from fastae_kernels.noise import Key, normals
from fastae_kernels.onednn import ONEDNN
from fastae_kernels.ops import Layer, Ops
from fastae_kernels.reference import TORCH
from fastae_kernels.sampling import Sample, Sampled, sample, sample_bwd
from torch import Tensor
from torch.distributions import Normal, kl_divergence

STATE = torch.tensor([99, 3, 0])
EACH = [TORCH, ONEDNN, TRITON]
NAMES = ["torch", "onednn", "triton"]


def divergence(p: Tensor) -> Tensor:
    """[M, Z], by torch.distributions."""
    mu, log_var = p.double().chunk(2, 1)
    return kl_divergence(Normal(mu, (log_var / 2).exp()), Normal(torch.zeros_like(mu), torch.ones_like(mu)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("ops", EACH, ids=NAMES)
def test_sample_and_divergence(ops: Ops, dtype: torch.dtype) -> None:
    for M, Z, K, bias, weighted in ((37, 5, 70, True, True), (1, 1, 1, False, False), (70, 33, 17, True, False)):
        x, w, b = normal(M, K, dtype=dtype), (normal(2 * Z, K) * K**-0.5).to(dtype), normal(2 * Z, dtype=dtype)
        layer = Layer(w, b if bias else None, "identity")
        r = uniform(M, low=0, high=2, dtype=torch.float32) if weighted else None
        for per_latent in (False, True):
            z, p, kl, _ = ops.linear_sample(x, layer, Sample(Z, Key(STATE, 1), r, per_latent))
            wide = x.double() @ w.double().T + (b.double() if bias else 0)
            check_all([p], [(x @ w.T + (b if bias else 0))], [wide])
            e = normals(Key(STATE, 1), M, Z).double()
            mu, log_var = p.double().chunk(2, 1)  # z and KL are of what was stored
            truth = mu + (log_var / 2).exp() * e
            eps = max(2 * torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps)  # normal numbers are fp32
            torch.testing.assert_close(z.double(), truth, rtol=eps, atol=2e-6)
            terms = divergence(p) * (1 if r is None else r.double()[:, None])
            wanted = terms.sum(0) if per_latent else terms.sum().reshape(())
            assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(kl.double().sum(0), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ops", EACH, ids=NAMES)
def test_gradients_are_autograds(ops: Ops, dtype: torch.dtype) -> None:
    for per_latent, weighted, divisor in ((False, False, 1), (True, True, 4), (False, True, 1)):
        M, N, Z = 23, 19, 6
        dp, w = normal(M, N, dtype=dtype), normal(N, Z, dtype=dtype)
        p = (normal(M, 2 * Z, dtype=dtype) * 2).detach()
        p[3, 2 * Z - 1], p[4, Z] = 25.0, -31.0  # clamped: no gradient
        r = uniform(M, low=0, high=2) if weighted else None
        slope = uniform(Z, low=0, high=1, dtype=dtype) if per_latent else torch.tensor(0.7, dtype=dtype)
        made = ops.linear_dgrad_sample(dp, w, Sampled(Sample(Z, Key(STATE, 2), r), p, slope, divisor))
        leaf = p.double().requires_grad_()
        mu, log_var = leaf.chunk(2, 1)
        log_var = log_var.clamp(-30, 20)
        z = mu + (log_var / 2).exp() * normals(Key(STATE, 2), M, Z).double()
        kl = (mu**2 + log_var.exp() - 1 - log_var) / 2 * slope.double() / divisor
        kl = kl if r is None else kl * r.double()[:, None]
        (((dp.double() @ w.double()) * z).sum() + kl.sum()).backward()
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(made.double(), leaf.grad, **tolerance)
        assert made[3, 2 * Z - 1] == made[4, Z] == 0


@pytest.mark.parametrize("ops", EACH, ids=NAMES)
def test_longer_rows_are_filled_with_0(ops: Ops) -> None:
    M, Z, K = 20, 5, 9
    layer = Layer(normal(32, K), normal(32), "identity")
    layer.w[2 * Z :], layer.b[2 * Z :] = 0, 0  # type: ignore[index]
    out = torch.full((M, 32), 7.0), torch.full((M, 32), 7.0)
    z, p, *_ = ops.linear_sample(normal(M, K), layer, Sample(Z, Key(STATE, 1)), out)
    assert z is out[0]
    assert not z[:, Z:].any()
    assert not p[:, 2 * Z :].any()
    dp, w, sampled = normal(M, 8), normal(8, 32), Sampled(Sample(Z, Key(STATE, 1)), p, torch.tensor(1.0))
    dx = ops.linear_dgrad_sample(dp, w, sampled, torch.full((M, 32), 7.0))
    assert not dx[:, 2 * Z :].any()
    short = ops.linear_dgrad_sample(dp, w[:, :Z], sampled._replace(p=p[:, : 2 * Z]))
    torch.testing.assert_close(dx[:, : 2 * Z], short, rtol=1e-5, atol=1e-5)


def test_near_the_prior_the_divergence_keeps_its_digits() -> None:
    """exp(l) - 1 - l would be 0 in fp32: l^2 / 2 = 5e-9."""
    p = torch.zeros(1, 2)
    p[0, 1] = 1e-4
    kl, _ = sample(p, Sample(1, Key(STATE, 0)), torch.empty(1, 1))
    torch.testing.assert_close(kl.double(), torch.tensor([2.5e-9], dtype=torch.float64), rtol=0.05, atol=0)


def test_what_was_drawn_is_what_is_used() -> None:
    p, e = normal(9, 8), normal(9, 4)
    key, z = Key(STATE, 0, (e,)), torch.empty(9, 4)
    sample(p, Sample(4, key), z)
    torch.testing.assert_close(z, p[:, :4] + (p[:, 4:] / 2).exp() * e)
    dz = normal(9, 4)
    dp = sample_bwd(dz, Sampled(Sample(4, key), p, torch.tensor(0.0)))
    torch.testing.assert_close(dp[:, 4:], dz * e * (p[:, 4:] / 2).exp() / 2)
