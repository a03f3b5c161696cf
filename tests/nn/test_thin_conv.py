"""ThinConv2d against nn.Conv2d: parameters, output, every gradient, transforms, and where it is written otherwise."""

import pytest
import torch
from torch import Tensor, nn

from fastae.nn.thin_conv import FEW, ThinConv2d


def pair(out: int, dtype: torch.dtype = torch.float64) -> tuple[ThinConv2d, nn.Conv2d]:
    torch.manual_seed(0)
    thin, plain = ThinConv2d(5, out, None, dtype), nn.Conv2d(5, out, 3, padding=1, dtype=dtype)
    plain.load_state_dict(thin.state_dict())
    return thin, plain


def rows(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(count, 5, 7, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize("out", [1, 3, FEW, FEW + 1])
def test_output_and_gradients_are_conv2ds(out: int, count: int, layout: torch.memory_format) -> None:
    thin, plain = (m.to(memory_format=layout) for m in pair(out))
    results = []
    for m in (thin, plain):
        x = rows(count).requires_grad_()
        y = m(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, m.weight.grad, m.bias.grad))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(thin(rows(count)), plain(rows(count)))


def test_gradients_of_gradients_and_transforms() -> None:
    thin, plain = pair(1)
    x = rows(2).requires_grad_()
    assert torch.autograd.gradgradcheck(thin, (x,))
    parameters = dict(thin.named_parameters())

    def loss(m: nn.Module) -> Tensor:
        def of_one(p: dict[str, Tensor], row: Tensor) -> Tensor:
            return torch.func.functional_call(m, p, (row[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0))(parameters, rows(3))["weight"]

    torch.testing.assert_close(loss(thin), loss(plain))


def test_it_is_the_plain_convolution_where_nothing_is_trained() -> None:
    thin, _ = pair(1, torch.float32)
    x = rows(2, torch.float32)
    exported = torch.export.export(thin, (x,))
    names = [str(node.target) for node in exported.graph.nodes]
    assert any("conv2d" in name for name in names)
    assert not any("transpose" in name for name in names)
    assert "transposed" not in repr(thin)
