"""What the numerics of `fastae verify` look at, and that they see what is wrong with a launcher or a number."""

import itertools
import json

import pytest
import torch
from cases import ACTIVATIONS
from fastae_emulator import poison
from fastae_emulator.accuracy import FLOOR, check, check_all, compare, errors
from fastae_emulator.poison import FENCE, poisoned
from fastae_kernels.ops import Ops
from torch import Tensor

from fastae.verify import numerics
from fastae.verify.cases import OPS, SHAPES, Case, drawn, grid
from fastae.verify.inputs import EAGER, FAR, VIEWS, Draw

# ---------------------------------------------------------------- the grid


def test_every_op_is_looked_at() -> None:
    # sum_partials writes into its arguments: test_sums.py, and all that leave parts to be summed; gather is ATen's
    others = {"sum_partials", "gather", "fits_decoder", "fits_stack"}
    assert set(OPS) | others == {name for name in vars(Ops) if not name.startswith("_")}


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_the_grid_covers_everything(name: str, quick: bool) -> None:
    cases, op = list(grid(name, quick)), OPS[name]
    assert cases == list(grid(name, quick)), "the same every time"
    pairs = {(c.dtype, c.activation) for c in cases}
    assert pairs >= set(itertools.product(op.dtypes, ACTIVATIONS if op.activated else ["identity"]))
    assert {c.shape for c in cases} >= set(SHAPES)
    assert any(0 in c.shape for c in cases)
    assert {pair for c in cases for pair in c.options} >= {(o, v) for o, vs in (op.options or {}).items() for v in vs}
    views = {pair for c in cases for pair in c.views}
    for argument in op.tensors:
        flat = argument in ("b", "biases", "row_weight")
        wanted = {"unaligned", "strided", "expanded"} if flat else set(VIEWS) - {"contiguous"}
        if argument == "weights":
            wanted = {view for view in wanted if "expanded" not in view}
        elif not flat:
            wanted |= set(FAR)
        assert {view for a, view in views if a == argument} == wanted, argument


def test_fresh_cases_follow_from_the_seed() -> None:
    for name in OPS:
        assert list(drawn(name, 3, 9)) == list(drawn(name, 3, 9))
        assert list(drawn(name, 3, 9))[:4] == list(drawn(name, 3, 4))
        assert list(drawn(name, 3, 9)) != list(drawn(name, 4, 9))
    many = list(drawn("linear_act_loss", 0, 300))
    assert {c.dtype for c in many} == set(OPS[name].dtypes)
    assert {c.activation for c in many} == set(ACTIVATIONS)
    assert {view for c in many for _, view in c.views} == set(VIEWS)


def test_a_case_gives_the_same_numbers_each_time() -> None:
    case = next(drawn("linear_act_loss", 5, 1))
    flat = [list(numerics._flat(list(case.arguments("cpu")))) for _ in range(2)]
    for first, again in zip(*flat, strict=True):
        # of bits: a target may have NaN
        same = torch.allclose(first, again, 0, 0, True) if isinstance(first, Tensor) else first == again
        assert same
    other = Case(case.op, case.dtype, case.shape, case.activation, case.options, case.views, case.seed + 1)
    assert not torch.equal(case.arguments("cpu")[0], other.arguments("cpu")[0])


def test_describe() -> None:
    options = (("bias", True), ("keep_p", False), ("reduction", "sum"))
    case = Case("linear_act_fwd", torch.float32, (3, 5, 7), "relu", options, (("x", "strided"), ("w", "contiguous")))
    assert case.describe() == "M=3 N=5 K=7, x: strided, bias, reduction=sum"


# ---------------------------------------------------------------- numbers and views


@pytest.mark.parametrize("name", VIEWS)
def test_views_lie_between_nan(name: str) -> None:
    t = Draw(0).normal(5, 4)
    view = VIEWS[name](t)
    assert torch.equal(view[0, 0], t[0, 0])
    assert view.shape == t.shape
    if not name.startswith("expanded"):
        assert torch.equal(view, t)
    storage = view.new_empty(0).set_(view.untyped_storage())
    assert storage.isnan().sum() == storage.numel() - len(set(_offsets(view)))
    assert (view.data_ptr() % 16 == 0) != (name == "unaligned") or name not in ("contiguous", "unaligned")


def _offsets(t: Tensor) -> list[int]:
    return [
        t.storage_offset() + i * t.stride(0) + j * t.stride(1) for i in range(t.shape[0]) for j in range(t.shape[1])
    ]


def test_far_views_pass_2_to_the_31() -> None:
    for dim, view in enumerate(FAR.values()):
        far = view(torch.ones(3, 3, dtype=torch.float16))
        assert 2 * far.stride(dim) >= 2**31 > far.stride(dim)
        assert far.sum() == 9


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numbers_suit_the_activation(activation: str) -> None:
    """p of order one; logit on both sides of its bounds and between."""
    x, w, b = Draw(1).layer(activation, 40, 30, 20, torch.float64)
    p = torch.nn.functional.linear(x, w, b)
    assert EAGER[activation](p).isfinite().all()
    if activation == "logit":
        inside = p[:, ::3]
        assert (inside > 0.01).all()
        assert (inside < 0.99).all()
        assert (p[:, 1::3] < 0).all()
        assert (p[:, 2::3] > 1).all()
    else:
        assert 1 < p.std() < 4


# ---------------------------------------------------------------- what is seen

CASE = Case("act_bwd", torch.float32, (33, 17, 1), "identity", (("db", True),))


def _honest(dy: Tensor) -> tuple[Tensor, Tensor]:
    dp, db = dy.new_empty(dy.shape), dy.new_empty(dy.shape[1])
    dp.copy_(dy)
    db.copy_(dy.sum(0))
    return dp, db


def _unwritten(dy: Tensor) -> tuple[Tensor, Tensor]:
    dp, db = _honest(dy)
    poison.fill(dp[5:6])
    return dp, db


def _scratch(dy: Tensor) -> tuple[Tensor, Tensor]:
    dy.new_empty(4)[:3] = 0
    return _honest(dy)


def _beside(dy: Tensor) -> tuple[Tensor, Tensor]:
    dp, db = _honest(dy)
    dp.as_strided((1,), (1,), dp.storage_offset() + dp.numel() + 7).fill_(0)
    return dp, db


def _before(dy: Tensor) -> tuple[Tensor, Tensor]:
    dp, db = _honest(dy)
    dp.as_strided((1,), (1,), dp.storage_offset() - 2).fill_(float("nan"))  # another NaN than the fence's
    return dp, db


def _wrong(dy: Tensor) -> tuple[Tensor, Tensor]:
    dp, db = _honest(dy)
    dp[3, 4] += 0.01
    return dp, db


def _nan(dy: Tensor) -> tuple[Tensor, Tensor]:
    dp, db = _honest(dy)
    dp[3, 4] = float("nan")
    return dp, db


def _greedy(dy: Tensor) -> tuple[Tensor, Tensor]:
    results = _honest(dy)
    dy[0, 0] += 1
    return results


def _raises(dy: Tensor) -> tuple[Tensor, Tensor]:
    raise ValueError("no such tile")


@pytest.mark.parametrize(
    ("launcher", "problem"),
    [
        (_honest, ""),
        (_unwritten, "17 elements of a buffer [33, 17] of float32 never written, as at [5, 0]"),
        (_scratch, "1 elements of a buffer [4] of float32 never written, as at [3]"),
        (_beside, "AssertionError: 1 elements written outside a buffer [33, 17] of float32, one 7 after"),
        (_before, "AssertionError: 1 elements written outside a buffer [33, 17] of float32, one 2 before"),
        (_wrong, "result 0: Frobenius error 4."),
        (_nan, "result 0: NaN or inf at other places than PyTorch's: 1 of 561, the first at [3, 4]"),
        (_greedy, "argument 0 was changed"),
        (lambda dy: (_honest(dy)[0], None), "result 1: there, or PyTorch's is, and not the other"),
        (lambda dy: (_honest(dy)[0].half(), dy.sum(0)), "result 0: the result is torch.float16, PyTorch's torch.float"),
        (_raises, "ValueError: no such tile"),
    ],
)
def test_what_is_seen(monkeypatch: pytest.MonkeyPatch, launcher, problem: str) -> None:
    real = numerics.implementation
    monkeypatch.setattr(
        numerics,
        "implementation",
        lambda backend, name: (lambda *a: launcher(a[0])) if backend == "triton" else real(backend, name),
    )
    found = numerics.measure(CASE)
    assert found.problem.startswith(problem)
    assert bool(found.problem) == bool(problem)
    assert (found.figure <= found.limit) == (not problem) or problem.startswith(("17", "1 el", "arg", "result 1"))


def test_a_failure_can_be_repeated(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Its finding has the command, and the command the same case."""
    monkeypatch.setattr(numerics, "measure", lambda case, device: compare(*[torch.zeros(2, dtype=torch.float64)] * 3))
    bad = compare(torch.ones(2), torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    fresh = list(drawn("loss", 77, numerics.FRESH[True]))
    monkeypatch.setattr(numerics, "measure", lambda case, device: bad if case in fresh else compare(
        *[torch.zeros(2, dtype=torch.float64)] * 3))  # fmt: skip
    numerics.run(True, 77, "loss")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    failed = [line for line in lines if line.get("ok") is False]
    assert [f["shape"] for f in failed] == [case.describe() for case in fresh]
    assert failed[0]["detail"].endswith("; again: fastae verify --numerics --quick --seed 77 --only loss")
    assert [line["next"][0] for line in lines if "next" in line] == ["loss"] * (len(lines) // 2)


# ---------------------------------------------------------------- poison


def test_poisoned_buffers() -> None:
    like = torch.zeros(2, 3, dtype=torch.bfloat16)
    with poisoned() as buffers:
        made = [torch.empty(2, 3), torch.empty((2, 3)), like.new_empty(2, 3), like.new_empty([2, 3]),
                torch.empty_like(like), like.new_empty((2, 3), dtype=torch.float64), torch.empty(0, 3)]  # fmt: skip
        whole = torch.empty(4, dtype=torch.int64), like.new_empty(3, dtype=torch.bool)
    assert all(t.isnan().all() and t.is_contiguous() for t in made)
    assert [tuple(t.shape) for t in made] == [(2, 3)] * 6 + [(0, 3)]
    assert [t.dtype for t in made[2:6]] == [torch.bfloat16] * 3 + [torch.float64]
    assert [t.dtype for t in whole] == [torch.int64, torch.bool]
    assert len(buffers.buffers) == 7
    assert made[0].untyped_storage().nbytes() == (6 + 2 * FENCE) * 4
    assert torch.empty(3).untyped_storage().nbytes() == 12, "over"


def test_poisoned_complete() -> None:
    with poisoned(complete=True):
        torch.empty(3).fill_(float("nan"))  # written, if with NaN
    message = r"^2 elements of a buffer \[3\] of float16 never written, as at \[1\]$"
    with pytest.raises(AssertionError, match=message), poisoned(complete=True):
        torch.empty(3, dtype=torch.float16)[:1] = 0
    with pytest.raises(KeyError), poisoned(complete=True):
        {}[torch.empty(3)]  # which is what went wrong, not the buffer
    with pytest.raises(AssertionError, match="written outside"), poisoned():
        torch.empty(3).as_strided((5,), (1,), FENCE).zero_()


# ---------------------------------------------------------------- the three-way rule


def test_the_rule() -> None:
    truth = torch.linspace(1, 2, 9, dtype=torch.float64)
    same = truth.float()
    check(same, same, truth)
    found = compare(same * (1 + 1e-6), same, truth)
    assert found.problem.startswith("Frobenius error 9.5")
    assert found.figure == pytest.approx(1e-6, rel=0.1)
    assert found.limit == 2 * errors(same, truth)[0] + FLOOR[torch.float32]
    check(same * (1 + 1e-6), same * (1 + 1e-6), truth)
    check(same * (1 + 1e-6), same, truth, floor=1e-5)
    with pytest.raises(AssertionError, match=r"^Frobenius error .*; PyTorch .*, floor 4\.77e-07$"):
        check(same * (1 + 1e-6), same, truth)
    one = same.clone()
    one[0] += 3e-6
    with pytest.raises(AssertionError, match=r"^(Frobenius|max) error"):
        check(one, same, truth)


def test_what_cannot_be_compared() -> None:
    a, truth = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)
    for wrong, message in (
        ((a, a, a), "the truth must be float64"),
        ((a.half(), a, truth), r"the result is torch\.float16, PyTorch's torch\.float32"),
        ((a.t(), a, truth), r"the result is \[3, 2\], PyTorch's \[2, 3\], the truth \[2, 3\]"),
    ):
        with pytest.raises(AssertionError, match=message):
            check(*wrong)
    with pytest.raises(AssertionError, match="result 1 is missing, PyTorch's is not"):
        check_all([a, None], [a, a], [truth, truth])
    with pytest.raises(AssertionError, match="result 0 is there"):
        check_all([a], [None], [None])


# ---------------------------------------------------------------- what only a GPU is asked, as far as a CPU can show it


def test_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    numerics._on_the_gpu(CASE, "cpu", "--seed 0", False)
    fair = json.loads(capsys.readouterr().out)
    assert (fair["figure"], fair["limit"], fair["ok"]) == ("3 of 3 alike", "bitwise", True)
    counter = itertools.count()
    monkeypatch.setattr(
        numerics, "implementation", lambda *_: lambda *a: torch.tensor([-0.0, 0.0])[next(counter) % 2].clone()
    )
    numerics._on_the_gpu(CASE, "cpu", "--seed 0", False)
    odd = json.loads(capsys.readouterr().out)
    assert (odd["figure"], odd["ok"]) == ("2 of 3 alike", False)
    assert odd["detail"].startswith(
        "1 of 3 runs gave other bits; again: fastae verify --numerics --seed 0 --only act_bwd"
    )
