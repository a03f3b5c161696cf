"""The matrix: each kind of model by saving, resuming, two processes, bf16, export, compilation, weights; each cell
holds or is refused in one line. 40 rows in batches of 16: the last of an epoch is shorter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinds import KINDS, OF_A_BATCH, X, flat, make, trained
from pair import Pair

import fastae

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # the compiler's own
]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    both = Pair(tmp_path_factory.mktemp("pair"))
    yield both
    both.close()


@every_kind
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    ae = make(kind)
    ae.fit(X, epochs=1, progress=False)
    ae.save(tmp_path)
    again = fastae.load(tmp_path)
    assert again.config() == ae.config()
    assert again.trained == ae.trained
    for method in ("score", "encode"):
        assert torch.equal(getattr(again, method)(X), getattr(ae, method)(X))
    assert torch.equal(again.eval()(X), ae.eval()(X))


@every_kind
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resume_to_the_same_bits(kind: str, precision: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"precision": precision}
    whole, weights = trained(kind, epochs=4, **options)
    trained(kind, epochs=2, callbacks=[fastae.Checkpoint(tmp_path)], **options)
    resumed, same = trained(kind, epochs=4, callbacks=[fastae.Checkpoint(tmp_path, resume=True)], **options)
    assert resumed == whole
    assert torch.equal(same, weights)


@every_kind
def test_two_processes_are_one(kind: str, pair: Pair) -> None:
    if kind in OF_A_BATCH:
        with pytest.raises(
            AssertionError, match=r"group must be None for a code with (capacity or free_bits|a KLSparse bottleneck)"
        ):
            pair(trained, kind)
        return
    (first, weights), (second, same) = pair(trained, kind)
    alone, _ = trained(kind)
    assert first == second
    assert torch.equal(weights, same)
    for name in ("loss", "val_loss", "nll", "kl"):
        np.testing.assert_allclose(first.get(name, []), alone.get(name, []), rtol=2e-5)


@every_kind
def test_a_step_is_recorded_and_replayed(kind: str) -> None:
    """A step that cannot be repeated call by call is slower without a word."""
    ae = make(kind)
    with fastae.use_backend("torch"):
        step = fastae.TrainStep(ae, torch.optim.Adam(ae.parameters(), fused=True), len(X))
    step(X)
    if kind == "masked alone":  # `isnan` and `masked_fill` make memory of their own
        assert not step.static.repeats
        return
    assert step.static.repeats
    assert len(step.static.memory.recorded) == 1


@every_kind
def test_bfloat16_comes_near(kind: str) -> None:
    exact, _ = trained(kind, lr=1e-3)
    near, _ = trained(kind, lr=1e-3, precision="bfloat16")
    np.testing.assert_allclose(near["loss"], exact["loss"], rtol=0.05, atol=0.02)


@every_kind
def test_export_and_compilation(kind: str) -> None:
    ae = make(kind).eval()
    wanted = ae(X)
    exported = torch.export.export(ae, (X,)).module()
    torch.testing.assert_close(exported(X), wanted, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    compiled = torch.compile(ae, backend="aot_eager")
    torch.testing.assert_close(compiled(X), wanted, rtol=1e-5, atol=1e-6)
    loss = torch.compile(ae.loss, backend="aot_eager")
    torch.testing.assert_close(loss(X), ae.loss(X), rtol=1e-5, atol=1e-6)
    ae.train()
    drawn = loss(X)
    drawn.backward()
    assert bool(drawn.isfinite())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in ae.parameters())


@every_kind
def test_weights(kind: str) -> None:
    """Weights all alike are none; rows of weight 0 are not there, but for `swap`, which hands their values on."""
    plain, weights = trained(kind, validation_split=0)
    alike, same = trained(kind, validation_split=0, sample_weight=np.full(len(X), 3.0))
    np.testing.assert_allclose(alike["loss"], plain["loss"], rtol=1e-4)
    torch.testing.assert_close(same, weights, rtol=1e-2, atol=2e-3)
    if kind == "swap":
        return
    other, some = X.clone(), np.tile([0.0, 1.0], len(X) // 2)
    other[::2] = 1 - other[::2]
    one, two = (trained(kind, x, validation_split=0, sample_weight=some) for x in (X, other))
    assert one[0]["loss"] == two[0]["loss"]
    assert torch.equal(one[1], two[1])


@every_kind
def test_bad_rows_are_refused_in_one_line(kind: str) -> None:
    ae = make(kind)
    before = flat(ae)
    x = X.clone()
    x[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"fit: x must be finite; got 1 NaN, the first at row 3, column 4"):
        ae.fit(x, progress=False)
    x[3, 4] = -1.0
    if ae.kind.name in ("bernoulli", "poisson", "nb"):
        with pytest.raises(ValueError, match=r"fit: x must be .* for likelihood .*; got -1 at row 3, column 4"):
            ae.fit(x, progress=False)
    assert torch.equal(flat(ae), before)
