"""`admit`: what every public function says to arguments it cannot take, which go to kernels, and what autocast does."""

import re
from collections.abc import Callable

import pytest
import torch
from cases import normal, short
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastae.nn.arguments import admit, nearest

NAMES, OPTIONAL = ("x", "weight", "bias"), ("bias",)
x, w, b = normal(2, 3), normal(4, 3), normal(4)
FLOATS = "float32, float16, bfloat16 or float64"


def take(*tensors: object) -> tuple[list[Tensor | None], bool]:
    given, supported = admit("f", NAMES, tensors, OPTIONAL)
    return list(given), supported


class Named(Tensor):
    pass


class Sharded(Tensor):
    """As much of a DTensor as `admit` looks at."""

    device_mesh = None


# ---------------------------------------------------------------- errors

ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no tensor": (lambda: take([[1.0]], w, b), TypeError, "f: x must be a torch.Tensor; got list"),
    "no tensor, later": (lambda: take(x, 1.0, b), TypeError, "f: weight must be a torch.Tensor; got float"),
    "optional, no tensor": (lambda: take(x, w, "b"), TypeError, "f: bias must be a torch.Tensor; got str"),
    "missing": (lambda: take(x, None, b), TypeError, "f: weight must be a torch.Tensor; got NoneType"),
    "the first missing": (lambda: take(None, w, b), TypeError, "f: x must be a torch.Tensor; got NoneType"),
    "whole numbers": (lambda: take(x.int(), w.int(), None), TypeError, f"f: x must be {FLOATS}; got int32"),
    "complex": (lambda: take(x + 0j, w, b), TypeError, f"f: x must be {FLOATS}; got complex64"),
    "float8": (
        lambda: take(x.to(torch.float8_e4m3fn), w, b), TypeError, f"f: x must be {FLOATS}; got float8_e4m3fn",
    ),
    "mixed dtypes": (lambda: take(x, w.half(), b), TypeError, "f: weight must be float32 as x is; got float16"),
    "mixed dtypes, last": (lambda: take(x, w, b.double()), TypeError, "f: bias must be float32 as x is; got float64"),
    "mixed devices": (lambda: take(x, w.to("meta"), b), ValueError, "f: weight must be on cpu as x is; got meta"),
    "meta first": (lambda: take(x.to("meta"), w, b), ValueError, "f: weight must be on meta as x is; got cpu"),
    "DTensors among plain ones": (
        lambda: take(x, w.as_subclass(Sharded), b),
        TypeError,
        "f: weight must be plain as x is; got a DTensor: call the module that fully_shard was given (for its other "
        "methods, register_fsdp_forward_method), or gather the tensor with .full_tensor()",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_error(case: str) -> None:
    call, kind, text = ERRORS[case]
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        call()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_is_refused() -> None:
    text = (
        "f: the caller must not be TorchScript (torch.jit.trace, torch.jit.script, torch.onnx.export(dynamo=False)), "
        "which fastae does not support; use torch.compile, torch.export.export or torch.onnx.export(dynamo=True), or "
        "undo fastae.patch by fastae.unpatch(model)"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
        torch.jit.trace(lambda t: take(t, w, b)[0][0], (x,))


def test_nearest() -> None:
    valid = ("mean", "sum", "none")
    assert nearest("men", valid) == "; did you mean 'mean'?"
    assert nearest("None", valid) == "; did you mean 'none'?"
    assert nearest(None, valid) == "; did you mean 'none'?"  # type: ignore[arg-type]
    assert nearest("", valid) == nearest("zzz", valid) == ""


# ---------------------------------------------------------------- what kernels support


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=short)
def test_plain_tensors_go_to_kernels_as_they_are(dtype: torch.dtype) -> None:
    for tensors in (
        (x.to(dtype), w.to(dtype), b.to(dtype)),
        (x.to(dtype), w.to(dtype), None),
        (nn.Parameter(x.to(dtype)), w.to(dtype, copy=True).requires_grad_(), nn.Parameter(b.to(dtype))),
        (normal(3, 2, dtype=dtype).t(), normal(4, 6, dtype=dtype)[:, ::2], normal(1, dtype=dtype).expand(4)),
        (torch.empty(0, 3, dtype=dtype), torch.empty(4, 3, dtype=dtype), None),
        tuple(t.to("meta", dtype) for t in (x, w, b)),
    ):
        given, supported = take(*tensors)
        assert supported
        assert all(mine is theirs for mine, theirs in zip(given, tensors, strict=True))
    with torch.no_grad():
        assert take(x, w, b)[1]
    with torch.inference_mode():
        assert take(x, w.clone(), b)[1]


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("place", [0, 1, 2])
def test_subclasses_and_other_layouts_do_not(place: int) -> None:
    nested = torch.nested.nested_tensor([normal(2, 3), normal(1, 3)], layout=torch.jagged)
    for other in (x.as_subclass(Named), x.to_sparse(), nested, x.to_mkldnn()):
        tensors: list[Tensor] = [x, w, b]
        tensors[place] = other
        given, supported = take(*tensors)
        assert not supported
        assert given[place] is other
    all_sharded = [t.as_subclass(Sharded) for t in (x, w, b)]
    assert not take(*all_sharded)[1]
    assert not take(*all_sharded[:2], None)[1]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_transforms_do_not() -> None:
    seen: list[bool] = []

    def note(t: Tensor) -> Tensor:
        seen.append(take(t, w, b)[1])
        return t.sum()

    torch.func.vmap(note)(x)
    torch.func.grad(note)(x)
    torch.func.jvp(note, (x,), (x,))
    with forward_ad.dual_level():
        note(forward_ad.make_dual(x, x))
        note(x)
    assert seen == [False] * 5
    note(x)
    torch.utils.checkpoint.checkpoint(note, x.clone().requires_grad_(), use_reentrant=False)
    assert seen[5:] == [True] * 2, "and they are over"


def test_export_does_not_compile_does() -> None:
    class Scaled(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return t * (2 if take(t, w, b)[1] else 3)

    exported = torch.export.export(Scaled(), (x,)).module()
    assert torch.equal(exported(x), 3 * x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(Scaled(), backend="eager", fullgraph=True)(x), 2 * x)


# ---------------------------------------------------------------- autocast


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=short)
def test_autocast_casts_as_for_linear(cast: torch.dtype) -> None:
    """All to its dtype, whatever they were, and back through autograd; fp64 stays, and then all must be fp64."""
    with torch.autocast("cpu", dtype=cast):
        leaf = w.clone().requires_grad_()
        given, supported = take(x, leaf, b.half())
        assert supported
        assert [t.dtype for t in given] == [cast] * 3
        torch.testing.assert_close(given[0], x.to(cast))
        given[1].sum().backward()
        assert leaf.grad.dtype == torch.float32
        assert take(x, w, None)[0][2] is None
        already = x.to(cast)
        assert take(already, w, None)[0][0] is already
        wide = x.double(), w.double(), b.double()
        given, supported = take(*wide)
        assert supported
        assert all(mine is theirs for mine, theirs in zip(given, wide, strict=True))
        with pytest.raises(TypeError, match=r"^f: weight must be float64 as x is; got float32$"):
            take(x.double(), w, None)
        with pytest.raises(TypeError, match=rf"^f: weight must be {short(cast)} as x is; got float64$"):
            take(x, w.double(), None)
        with pytest.raises(TypeError, match=r"^f: x must be float32, .*; got int64$"):
            take(x.long(), w, None)
        with torch.autocast("cpu", enabled=False):
            assert take(x, w, b)[0][0] is x


def test_autocast_of_another_device_is_not_this_ones() -> None:
    with torch.autocast("cuda" if torch.cuda.is_available() else "xla", dtype=torch.bfloat16):
        given, supported = take(x, w, b)
    assert supported
    assert given[0] is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        meta = [t.to("meta") for t in (x, w, b)]
        assert take(*meta)[0][0].dtype == torch.float32, "meta has no autocast"
