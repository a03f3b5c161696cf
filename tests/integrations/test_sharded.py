"""Loops of one's own on two processes: DistributedDataParallel, FSDP2 and tensor parallelism around fastae's layers."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pair import Pair
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastae


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    both = Pair(tmp_path_factory.mktemp("pair"))
    yield both
    both.close()


class Loss(nn.Module):
    """`model.loss` as a forward, which is what DistributedDataParallel listens to."""

    def __init__(self, model: fastae.DenseAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.loss(x)


def autoencoder(**options: Any) -> fastae.DenseAutoencoder:
    torch.manual_seed(0)
    return fastae.DenseAutoencoder([17, 12, 5], activation="gelu", **options)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(fastae.LinearAct(17, 12, activation="gelu"), nn.Linear(12, 17))


def rows() -> Tensor:
    return torch.rand(32, 17, generator=torch.Generator().manual_seed(0))


def mine() -> Tensor:
    return rows().tensor_split(2)[dist.get_rank()]


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2,))


def losses(module: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> list[float]:
    """Of five steps, the mean over the processes; ten times the usual learning rate, so that a wrong gradient shows."""
    optimizer, found = torch.optim.Adam(module.parameters(), lr=1e-2), []
    for _ in range(5):
        value = loss(x)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        value = value.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(value)
            value /= dist.get_world_size()
        found.append(value.item())
    return found


def of_one(kind: str) -> list[float]:
    if kind == "layers":
        module = layers()
        return losses(module, lambda x: fastae.mse_loss(module(x), x), rows())
    ae = autoencoder(tied=kind == "tied")
    return losses(ae, ae.loss, rows())


# ---------------------------------------------------------------- DistributedDataParallel


def in_ddp(kind: str) -> list[float]:
    if kind == "layers":
        module = DistributedDataParallel(layers())
        return losses(module, lambda x: fastae.MSELoss()(module(x), x), mine())
    module = DistributedDataParallel(Loss(autoencoder(tied=kind == "tied")))
    return losses(module, module, mine())


@pytest.mark.parametrize("kind", ["layers", "plain", "tied"])
def test_ddp(kind: str, pair: Pair) -> None:
    first, second = pair(in_ddp, kind)
    assert first == second == pytest.approx(of_one(kind), rel=1e-5)


# ---------------------------------------------------------------- FSDP2


def in_fsdp(kind: str, each: bool) -> list[float]:
    module = layers() if kind == "layers" else autoencoder(tied=kind == "tied")
    if each:
        for layer in module if kind == "layers" else (*module.encoder, *module.decoder):
            fully_shard(layer, mesh=mesh())
    fully_shard(module, mesh=mesh())
    assert all(isinstance(p, DTensor) for p in module.parameters())
    if kind == "layers":
        return losses(module, lambda x: fastae.mse_loss(module(x), x), mine())
    return losses(module, module.loss, mine())


@pytest.mark.parametrize(
    ("kind", "each"), [("layers", False), ("layers", True), ("plain", False), ("plain", True), ("tied", False)]
)
def test_fully_shard(kind: str, each: bool, pair: Pair) -> None:
    first, second = pair(in_fsdp, kind, each)
    assert first == second == pytest.approx(of_one(kind), rel=1e-5)


def inferred_in_fsdp() -> list[Tensor]:
    ae = autoencoder()
    fully_shard(ae, mesh=mesh())
    for name in ("encode", "decode", "score"):
        register_fsdp_forward_method(ae, name)
    with torch.no_grad():
        return [ae(rows()), ae.encode(rows()), ae.decode(rows()[:, :5]), ae.score(rows())]


def test_a_sharded_model_encodes_and_scores(pair: Pair) -> None:
    ae = autoencoder()
    with torch.no_grad():
        wanted = [ae(rows()), ae.encode(rows()), ae.decode(rows()[:, :5]), ae.score(rows())]
    for found in pair(inferred_in_fsdp):
        torch.testing.assert_close(found, wanted)


# ---------------------------------------------------------------- tensor parallelism


def in_tensor_parallel() -> list[Tensor]:
    ae = autoencoder()
    plan = {"encoder.0": ColwiseParallel(), "encoder.1": RowwiseParallel(),
            "decoder.0": ColwiseParallel(), "decoder.1": RowwiseParallel()}  # fmt: skip
    parallelize_module(ae, mesh(), plan)
    loss = ae.loss(rows())
    loss.backward()
    return [loss.detach(), *(p.grad.full_tensor() for p in ae.parameters())]


def test_tensor_parallel_layers_go_through_pytorchs_own_ops(pair: Pair) -> None:
    ae = autoencoder()
    loss = ae.loss(rows())
    loss.backward()
    for found in pair(in_tensor_parallel):
        torch.testing.assert_close(found, [loss.detach(), *(p.grad for p in ae.parameters())], rtol=1e-5, atol=1e-7)


def of_dtensors() -> list[Tensor]:
    x, w = (distribute_tensor(t, mesh(), [how]) for t, how in ((rows(), Replicate()), (rows()[:8], Shard(0))))
    y = fastae.linear_act(x, w, activation="softplus")
    loss = fastae.linear_act_mse(x, w, None, 2 * y.detach(), "softplus")
    return [t.full_tensor() for t in (y, fastae.mse_loss(x, 2 * x), fastae.mse_loss(x, 2 * x, "none"), loss)]


def test_functions_of_dtensors(pair: Pair) -> None:
    x = rows()
    y = fastae.linear_act(x, x[:8], activation="softplus")
    wanted = [y, x.square().mean(), x.square(), y.square().mean()]
    for found in pair(of_dtensors):
        torch.testing.assert_close(found, wanted)


# ---------------------------------------------------------------- what is refused


def refused(folder: Path) -> list[str]:
    ae, x = autoencoder(), rows()
    fully_shard(ae, mesh=mesh())
    optimizer, weight = torch.optim.Adam(ae.parameters()), ae.encoder[0].weight
    texts = []
    for call in (
        lambda: fastae.linear_act(x, weight, ae.encoder[0].bias),
        lambda: ae.encode(x),  # outside forward, its parameters are still sharded
        lambda: fastae.mse_loss(x[:12, :], weight),
        lambda: fastae.linear_act_mse(x, weight, None, x[:, :12]),
        lambda: fastae.TrainStep(ae, optimizer, 32),
        lambda: ae.fit(x),
        lambda: ae.save(folder),
    ):
        try:
            call()
            texts.append("no error")
        except (TypeError, ValueError) as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


def test_sharded_weights_outside_their_module_are_refused_with_what_to_do(pair: Pair, tmp_path: Path) -> None:
    call = "call the module that fully_shard was given"
    wanted = [
        f"TypeError: linear_act: weight must be plain as x is; got a DTensor: {call}",
        f"TypeError: linear_act: weight must be plain as x is; got a DTensor: {call}",
        f"TypeError: mse_loss: target must be plain as input is; got a DTensor: {call}",
        f"TypeError: linear_act_mse: weight must be plain as x is; got a DTensor: {call}",
        "TypeError: TrainStep: parameters must be plain tensors; got DTensors: train the sharded model in a loop",
        "TypeError: fit: parameters must be plain tensors; got DTensors: call fit before fully_shard",
        "TypeError: save: parameters must be plain tensors; got DTensors: on every rank, gather them",
    ]
    for texts in pair(refused, tmp_path / "model"):
        for text, start in zip(texts, wanted, strict=True):
            assert re.match(re.escape(start), text), text
    assert not (tmp_path / "model").exists()
