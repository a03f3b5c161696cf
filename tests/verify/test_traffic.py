"""What a training step moves, compiled and executed in a child, and what eager PyTorch moves for it."""

from collections import Counter

import torch
from children import child

from fastae.analysis.cost import OpCounter, distinct_bytes
from fastae.models.dense import DenseAutoencoder
from fastae.verify.eager import eager_step, fewest_bytes


def test_bytes_and_launches_of_ops() -> None:
    x = torch.ones(8, 4)
    with OpCounter() as ran:
        y = x.t().contiguous().view(32)  # one copy among the views
        torch.mm(x, x.t())
        y[:4].add_(1)
    assert [k.name for k in ran.kernels] == ["clone", "mm", "add_"]
    assert sum(k.bytes for k in ran.kernels) == 2 * 128 + (128 + 128 + 256) + 2 * 16
    assert distinct_bytes(x[:1].expand(100, 4)) == 16
    assert distinct_bytes(x[:, :2]) == 64


def test_an_eager_step_is_counted_op_by_op() -> None:
    model, x = DenseAutoencoder([6, 4, 2]), torch.randn(10, 6)
    ran = eager_step(model, x)
    launches = Counter(k.name for k in ran.kernels)
    assert launches["addmm"] == 4
    assert launches["mm"] == 7  # dw of four layers, dx of three
    assert launches["threshold_backward"] == 2
    assert launches["mse_loss"] == launches["mse_loss_backward"] == 1
    parameters = sum(p.numel() for p in model.parameters())
    assert fewest_bytes(model, x) == 4 * (60 + 2 * parameters + 1)
    assert sum(k.bytes for k in ran.kernels) > fewest_bytes(model, x)
    assert all(p.grad is None for p in model.parameters())


LEDGER = """
from fastae.verify.models import Model
from fastae.verify.traffic import _ledger, training_traffic

model = Model("small", (32, 16, 16), (64,))
launches, optimizer, x, step = training_traffic(model, 64, "bfloat16", "sm_80")
print(*[found.launch.name for found in launches])
first = launches[0]
print(first.read, first.written, first.sampled, first.counters.sector_use > 0.9)
for row in _ledger(launches, optimizer, x, step, ("small", 64, "bfloat16"), "sm_80"):
    print(row.op, row.figure.split()[0].rstrip(";"), row.limit, row.ok, sep=", ")

wide = Model("many blocks", (16, 16), (4096,))
launches, *_ = training_traffic(wide, 4096, "bfloat16", "sm_80")
first = launches[0]
print(first.sampled, first.counters.blocks, first.read, first.written)
"""


def test_a_step_is_counted_from_its_executed_code() -> None:
    names, first, launches, optimizer, moved, sampled = child("-c", LEDGER).splitlines()
    assert names.split()[:4] == ["_linear_act_fwd_kernel"] * 3 + ["_decoder_loss_kernel"]
    x, w, b, y = 64 * 32, 16 * 32, 16, 64 * 16
    assert first == f"{2 * (x + w + b)} {2 * y} False True"
    count = len(names.split())
    assert launches == f"launches of a step, {count}, 11, True"
    assert count <= 11
    assert optimizer == "launches of the optimizer, 2, 2, True"
    assert moved.startswith("bytes of a step, ")
    x, w, b, y = 4096 * 16, 16 * 16, 16, 4096 * 16
    assert sampled == f"True 3 {2 * (x + w + b)} {2 * y}"
