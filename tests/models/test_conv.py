"""ConvAutoencoder against the same network in plain torch.nn: loss, gradients, training; shapes, files, errors."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastae_kernels.elementwise import ACTIVATIONS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastae
from fastae import ConvAutoencoder
from fastae.data import arrays
from fastae.engine.program import Dense
from fastae.nn.activation_modules import MODULES, activation_module, name_of

# Even, odd, not square, colours, one pixel; with and without a dense code
SHAPES = [
    ((1, 8, 8), [4, 3], None), ((1, 8, 8), [4, 3], 5), ((3, 25, 25), [4, 5, 6], 7), ((2, 7, 5), [3, 2], None),
    ((1, 7, 5), [3], 2), ((3, 6, 33), [2, 3, 2, 2, 2], None), ((2, 1, 1), [3], None), ((1, 1, 9), [2, 2], 4),
]  # fmt: skip
shaped = pytest.mark.parametrize(("image", "channels", "code"), SHAPES, ids=str)


class Plain(nn.Module):
    """The network as people write it: odd sizes by `output_size`, images in the usual memory format."""

    def __init__(self, image: tuple[int, int, int], channels: list[int], code: int | None) -> None:
        super().__init__()
        down, mirrored = [image[0], *channels], channels[::-1]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(down, channels, strict=False))
        up = zip([mirrored[0], *mirrored], mirrored, strict=False)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 3, stride=2, padding=1) for a, b in up)
        self.last = nn.Conv2d(channels[0], image[0], 3, padding=1)
        self.code = self.back = None
        if code is not None:
            height, width = image[1:]
            for _ in channels:
                height, width = -(-height // 2), -(-width // 2)
            flat = channels[-1] * height * width
            self.code, self.back = nn.Linear(flat, code), nn.Linear(code, flat)

    def ordered(self) -> list[nn.Parameter]:
        dense = [] if self.code is None else [*self.code.parameters(), *self.back.parameters()]
        return [*self.convs.parameters(), *dense, *self.ups.parameters(), *self.last.parameters()]

    def forward(self, x: Tensor) -> Tensor:
        sizes = []
        for conv in self.convs:
            sizes.append(x.shape[2:])
            x = F.max_pool2d(F.relu(conv(x)), 2, ceil_mode=True)
        if self.code is not None:
            x = F.relu(self.back(self.code(x.flatten(1)))).view(x.shape)
        for up, size in zip(self.ups, reversed(sizes), strict=True):
            x = F.relu(up(x, output_size=size))
        return self.last(x)


def loss_of(likelihood: str, p: Tensor, x: Tensor) -> Tensor:
    if likelihood == "mse":
        return F.mse_loss(p, x)
    return F.binary_cross_entropy_with_logits(p, x, reduction="sum") / len(x)


def both(
    image: tuple[int, int, int],
    channels: list[int],
    code: int | None,
    dtype: torch.dtype,
    likelihood: str = "bernoulli",
) -> tuple[ConvAutoencoder, Plain]:
    torch.manual_seed(0)
    ours = ConvAutoencoder(image, channels, code, likelihood=likelihood, dtype=dtype)
    theirs = Plain(image, channels, code).to(dtype)
    with torch.no_grad():
        for p, q in zip(theirs.ordered(), ours.parameters(), strict=True):
            p.copy_(q)
    return ours, theirs


def images(count: int, image: tuple[int, int, int], dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.rand(count, *image, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def small(code: int | None = 5, **options: Any) -> ConvAutoencoder:
    torch.manual_seed(0)
    return ConvAutoencoder((1, 9, 7), [4, 3], code, **options)


# ---------------------------------------------------------------- the same numbers as torch.nn


@pytest.mark.parametrize("likelihood", ["bernoulli", "mse"])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@shaped
def test_loss_and_gradients(image: Any, channels: Any, code: Any, dtype: Any, allowed: float, likelihood: str) -> None:
    ours, theirs = both(image, channels, code, dtype, likelihood)
    x = images(6, image, dtype)
    p = theirs(x)
    loss, wanted = ours.loss(x), loss_of(likelihood, p, x)
    assert loss.item() == pytest.approx(wanted.item(), rel=allowed)
    torch.testing.assert_close(ours.logits(x), p, rtol=10 * allowed, atol=allowed)
    loss.backward()
    wanted.backward()
    for p, q in zip(ours.parameters(), theirs.ordered(), strict=True):
        # the gradient of a single bias is a sum of terms near 1 that may cancel: 0.004 of it were 1.5e-5 off
        assert float((p.grad - q.grad).norm()) < allowed * max(float(q.grad.norm()), 0.01)
        assert p.grad.stride() == p.stride()
    rows = F.mse_loss(theirs(x), x, reduction="none").flatten(1).mean(1)
    if likelihood == "bernoulli":
        rows = F.binary_cross_entropy_with_logits(theirs(x), x, reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(ours.score(x), rows.detach(), rtol=10 * allowed, atol=0)


@pytest.mark.parametrize("likelihood", ["bernoulli", "mse"])
@shaped
def test_twenty_steps_are_the_plain_loops(image: Any, channels: Any, code: Any, likelihood: str) -> None:
    ours, theirs = both(image, channels, code, torch.float64, likelihood)
    optimizers = [torch.optim.Adam(m.parameters(), 3e-3, fused=True) for m in (ours, theirs)]
    step, x = fastae.TrainStep(ours, optimizers[0], 8), images(30, image, torch.float64)
    order = torch.Generator().manual_seed(0)
    for number in range(20):
        rows = torch.randperm(30, generator=order)[: 8 if number % 4 else 5]  # unequal batches too
        found = step(x, rows) if number % 2 else step(x.flatten(1)[rows])
        loss = loss_of(likelihood, theirs(x[rows]), x[rows])
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        assert found.item() == pytest.approx(loss.item(), rel=1e-10)
    for p, q in zip(ours.parameters(), theirs.ordered(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_the_code_layers_are_the_kernels_and_the_rest_is_islands() -> None:
    kinds = [isinstance(stage, Dense) for stage in small().program().stages]
    assert kinds == [False, True, True, False]
    assert [stage.name for stage in small(None).program().stages] == ["encoder.0 to decoder.6"]
    ae = small()
    step = fastae.TrainStep(ae, torch.optim.Adam(ae.parameters(), fused=True), 4)
    step(images(4, ae.image))
    assert step.static.repeats


@pytest.mark.parametrize("activation", MODULES)
def test_every_activation_is_the_kernels(activation: str) -> None:
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    module = activation_module(activation)
    torch.testing.assert_close(module(x.clone()), ACTIVATIONS[activation].differentiable(x))
    assert name_of(module) == activation
    ae = ConvAutoencoder((1, 4, 4), [2], 3, activation=activation, likelihood="mse", output_activation=activation)
    assert ae.encoder[5].activation == "identity"
    assert ae.decoder[0].activation == activation
    assert ae.loss(images(3, (1, 4, 4))).isfinite()


def test_logit_alone_has_no_module() -> None:
    assert set(ACTIVATIONS) - set(MODULES) == {"logit"}
    assert name_of(nn.Dropout()) is None


def test_bfloat16_trains_as_autocast_does() -> None:
    ours, theirs = both((1, 12, 12), [8, 8], 6, torch.float32)
    x = images(64, (1, 12, 12))
    step = fastae.TrainStep(ours, torch.optim.Adam(ours.parameters(), fused=True), 32, "bfloat16")
    optimizer = torch.optim.Adam(theirs.parameters(), fused=True)
    for rows in x.split(32) * 5:
        found = step(rows)
        with torch.autocast("cpu", torch.bfloat16):
            p = theirs(rows)
        loss = loss_of("bernoulli", p.float(), rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert found.item() == pytest.approx(loss.item(), rel=1e-2)
    history = ours.fit(x, epochs=3, batch_size=24, precision="bfloat16", progress=False)
    assert history.loss[-1] < history.loss[0]


# ---------------------------------------------------------------- shapes


@shaped
@pytest.mark.parametrize("count", [0, 1, 3])
def test_images_and_rows_give_the_same(image: Any, channels: Any, code: Any, count: int) -> None:
    torch.manual_seed(0)
    ae = ConvAutoencoder(image, channels, code)
    x = images(count, image)
    given = [x, x.reshape(count, -1) if count else x.reshape(0, ae.in_features)]
    given += [x[:, 0]] if image[0] == 1 else []
    given += [x.contiguous(memory_format=torch.channels_last)]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            results = [(ae(v), ae.encode(v), ae.score(v), ae.loss(v), ae.decode(ae.encode(v))) for v in given]
    for v, (y, z, score, loss, again) in zip(given, results, strict=True):
        assert (y.shape, z.shape, score.shape) == (v.shape, (count, ae.features[-1]), (count,))
        assert again.shape == x.shape
        for found, wanted in ((y.reshape(x.shape), results[0][0]), (z, results[0][1]), (score, results[0][2])):
            torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(loss, results[0][3], equal_nan=True)
        array = v.numpy()
        for found, wanted in ((ae(array), y), (ae.encode(array), z), (ae.score(array), score)):
            assert isinstance(found, np.ndarray)
            np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)
        assert ae.decode(z.detach().numpy()).shape == x.shape


def test_what_comes_out_is_a_probability() -> None:
    ae, x = small(), images(5, (1, 9, 7))
    torch.testing.assert_close(ae(x), torch.sigmoid(ae.logits(x)))
    torch.testing.assert_close(ae.decode(ae.encode(x)), ae(x))


def test_a_target_in_any_of_the_shapes() -> None:
    ae, x, target = small(), images(6, (1, 9, 7)), images(6, (1, 9, 7), seed=2)
    wanted = loss_of("bernoulli", ae.logits(x), target)
    for t in (target, target.flatten(1), target[:, 0]):
        torch.testing.assert_close(ae.loss(x, t), wanted)
        own = copy.deepcopy(ae)
        step = fastae.TrainStep(own, torch.optim.SGD(own.parameters(), 1e-9), 6)
        torch.testing.assert_close(step(x, target=t), wanted.detach())


def test_score_and_encode_take_as_many_rows_as_the_widest_map_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    ae, x = small(), images(50, (1, 9, 7))
    assert ae.widest == 4 * 9 * 7
    whole = ae.score(x), ae.encode(x), ae(x), ae(x.numpy())
    seen: list[int] = []
    ae.encoder.register_forward_hook(lambda _m, given, _y: seen.append(len(given[0])))
    monkeypatch.setattr(arrays, "CHUNK_VALUES", 7 * ae.widest)
    with torch.no_grad():
        parts = ae.score(x), ae.encode(x), ae(x), ae(x.numpy())
    assert max(seen) == 7
    for part, all_at_once in zip(parts, whole, strict=True):
        np.testing.assert_allclose(np.asarray(part), np.asarray(torch.as_tensor(all_at_once).detach()), rtol=1e-5)


# ---------------------------------------------------------------- fit, files


@pytest.mark.parametrize("kind", ["images", "rows", "without channel", "array", "float64 array", "memory map"])
def test_fit_takes_images_and_rows_alike(kind: str, tmp_path: Path) -> None:
    x = images(50, (1, 9, 7))
    np.save(tmp_path / "x.npy", x.numpy())
    given: Any = {
        "images": x, "rows": x.flatten(1), "without channel": x[:, 0], "array": x.numpy(),
        "float64 array": x.double().numpy(), "memory map": np.load(tmp_path / "x.npy", mmap_mode="r"),
    }[kind]  # fmt: skip
    wanted, ae = small(), small()
    options: Any = {"epochs": 3, "batch_size": 16, "progress": False, "validation_data": given[:9]}
    history = ae.fit(given, callbacks=[fastae.EarlyStopping(2)], **options)
    again = wanted.fit(x, **options)
    assert history.loss == again.loss
    assert history.val_loss[-1] == pytest.approx(ae.loss(x[:9]).item(), rel=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(ae.parameters(), wanted.parameters(), strict=True))


@pytest.mark.parametrize("code", [None, 5])
def test_a_resumed_run_has_the_bits_of_one_go(code: int | None, tmp_path: Path) -> None:
    x, whole, parts = images(60, (1, 9, 7)), small(code), small(code)
    options: Any = {"batch_size": 16, "progress": False, "lr": 1e-2}
    whole.fit(x, epochs=6, callbacks=[fastae.EarlyStopping(9)], **options)
    parts.fit(x, epochs=3, callbacks=[fastae.Checkpoint(tmp_path), fastae.EarlyStopping(9)], **options)
    again = small(code)
    again.fit(x, epochs=6, callbacks=[fastae.Checkpoint(tmp_path, resume=True), fastae.EarlyStopping(9)], **options)
    for p, q in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.stride() == q.stride()


def test_a_resumed_optimizer_of_parameters_in_another_order_of_axes(tmp_path: Path) -> None:
    """A checkpoint has no strides, and fused Adam goes through memory: averages must lie as their parameters do."""

    def turned() -> fastae.DenseAutoencoder:
        torch.manual_seed(0)
        ae = fastae.DenseAutoencoder([12, 8, 3])
        for p in ae.parameters():
            p.data = p.data.t().contiguous().t() if p.dim() == 2 else p.data
        return ae

    x, whole, again = torch.rand(40, 12), turned(), turned()
    options: Any = {"batch_size": 16, "progress": False, "lr": 1e-2}
    whole.fit(x, epochs=4, **options)
    turned().fit(x, epochs=2, callbacks=[fastae.Checkpoint(tmp_path)], **options)
    again.fit(x, epochs=4, callbacks=[fastae.Checkpoint(tmp_path, resume=True)], **options)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), whole.parameters(), strict=True))


@shaped
def test_save_and_load(image: Any, channels: Any, code: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"activation": "tanh", "likelihood": "huber:delta=2.0", "output_activation": "sigmoid"}
    for given in ({}, options):
        ae, x = ConvAutoencoder(image, channels, code, **given), images(3, image)
        ae.fit(x, epochs=1, validation_split=0, progress=False)
        ae.save(tmp_path / "m")
        same = fastae.load(tmp_path / "m")
        assert (repr(same), same.config()) == (repr(ae), ae.config())
        assert torch.equal(same(x), ae(x))
        assert torch.equal(same.score(x), ae.score(x))
        for p, q in zip(same.parameters(), ae.parameters(), strict=True):
            assert torch.equal(p, q)
            assert p.stride() == q.stride(), "channels_last is not in the file"
    assert ConvAutoencoder(**ae.config()).config() == ae.config()


def test_a_scaler_is_saved_with_it(tmp_path: Path) -> None:
    x = images(20, (1, 9, 7)).flatten(1).numpy()
    ae = small(likelihood="mse")
    ae.scaler = fastae.Scaler.fit(x, "standard")
    ae.save(tmp_path / "m")
    np.testing.assert_array_equal(fastae.load(tmp_path / "m").scaler.transform(x), ae.scaler.transform(x))


# ---------------------------------------------------------------- what looks at a model


@shaped
def test_the_summary_counts_what_pytorch_counts(image: Any, channels: Any, code: Any) -> None:
    ae = ConvAutoencoder(image, channels, code)
    with FlopCounterMode(display=False) as counter:
        ae.decoder(ae.encoder(images(1, image).flatten(1)))
    total = f"{sum(p.numel() for p in ae.parameters()):,}", f"{counter.get_total_flops():,}"
    assert ["total", *total] in [line.split() for line in ae.summary().splitlines()]


def test_the_summary_of_the_tutorials_network() -> None:
    text = ConvAutoencoder((1, 28, 28), [32, 32]).summary()
    assert "9,031,680" in text
    assert " encoder.1   1x28x28 -> 32x28x28 Conv2d " in text
    assert "784 values become 1568: compression ratio 0.5 to 1" in text
    ae = small()
    ae.encoder.insert(1, Strange())
    assert "1x9x7 -> ? Strange" in ae.summary()


class Strange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.mean())


@pytest.mark.parametrize("code", [None, 5])
def test_explain_and_profile(code: int | None) -> None:
    ae, x = small(code), images(8, (1, 9, 7))
    assert {row.phase for row in fastae.explain(ae, 64).rows} >= {"island", "around"}
    found = fastae.profile(ae, x, steps=2, progress=False)
    assert found.us["convolutions"] > 0
    assert found.profiled_us == pytest.approx(sum(found.us.values()))
    if code is None:
        with pytest.raises(ValueError, match=r"^explain: gpu must be None for a model that is all islands, whose"):
            fastae.explain(ae, 64, gpu="h100")


@pytest.mark.parametrize("code", [None, 5])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does so to a Function
def test_compiled_exported_and_by_torch_func(code: int | None) -> None:
    ae, x = small(code), images(6, (1, 9, 7))
    compiled = torch.compile(ae.loss, backend="aot_eager")
    for v in (x, x[:3]):
        torch.testing.assert_close(compiled(v), ae.loss(v))
    program = torch.export.export(ae, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.testing.assert_close(program.module()(x[:4]), ae(x[:4]))

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        p = torch.func.functional_call(ae, parameters, (image[None],))
        return F.binary_cross_entropy(p, image[None], reduction="sum")

    parameters = {name: p.detach() for name, p in ae.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    ae.loss(x).backward()
    for name, p in ae.named_parameters():
        torch.testing.assert_close(each[name].mean(0), p.grad, rtol=1e-4, atol=1e-5)


def test_a_forward_of_ones_own_and_modules_among_the_layers() -> None:
    class Own(ConvAutoencoder):
        def forward(self, x: Any) -> Any:
            return super().forward(x * 0.9)

    def normed(ae: ConvAutoencoder) -> ConvAutoencoder:
        ae.encoder.insert(2, nn.BatchNorm2d(4))
        return ae

    x = images(8, (1, 9, 7))
    for make in (lambda: Own((1, 9, 7), [4, 3], 5), lambda: normed(small())):
        torch.manual_seed(0)
        ours = make()
        theirs = copy.deepcopy(ours)
        optimizers = [torch.optim.Adam(m.parameters(), fused=True) for m in (ours, theirs)]
        step = fastae.TrainStep(ours, optimizers[0], 8)
        for _ in range(3):
            found, loss = step(x), theirs.loss(x)
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()
            torch.testing.assert_close(found, loss.detach(), rtol=1e-5, atol=0)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (((1, 28), [2]), "image must be three positive whole numbers, like (1, 28, 28); got (1, 28)"),
        (((1, 0, 3), [2]), "image must be three positive whole numbers, like (1, 28, 28); got (1, 0, 3)"),
        ((784, [2]), "image must be three positive whole numbers, like (1, 28, 28); got 784"),
        (((1, 28, 28), []), "channels must be one or more positive whole numbers, like [32, 32]; got []"),
        (((1, 28, 28), [32, -2]), "channels must be one or more positive whole numbers, like [32, 32]; got [32, -2]"),
        (((1, 28, 28), [2.5]), "channels must be one or more positive whole numbers, like [32, 32]; got [2.5]"),
        (((1, 28, 28), 32), "channels must be one or more positive whole numbers, like [32, 32]; got 32"),
        (((1, 28, 28), [2], 0), "code must be None or a positive whole number; got 0"),
        (((1, 28, 28), [2], "8"), "code must be None or a positive whole number; got '8'"),
        (
            ((1, 7, 5), [2] * 4),
            "channels must be at most 3 for an image of 7 x 5, of which 3 poolings make one pixel; got 4",
        ),
        (((1, 1, 1), [2, 2]), "channels must be at most 1 for an image of 1 x 1"),
    ],
)
def test_numbers_that_make_no_model(arguments: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('ConvAutoencoder: ' + text)}"):
        ConvAutoencoder(*arguments)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"activation": "logit"}, "activation must be one of identity, relu, "),
        ({"activation": "rel"}, "activation must be one of identity, relu, "),
        ({"code_activation": "tanhh"}, "code_activation must be one of identity, relu, "),
        ({"output_activation": "sigmoid"}, "output_activation must be 'identity' beside likelihood 'bernoulli'"),
        ({"likelihood": "bernouli"}, "likelihood must be one of mse, mae, "),
    ],
)
def test_options_that_do_not_fit(options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"^ConvAutoencoder: {re.escape(text)}"):
        ConvAutoencoder((1, 8, 8), [2], **options)


@pytest.mark.parametrize("kind", ["tensor", "array"])
@pytest.mark.parametrize("call", ["forward", "encode", "score", "loss", "fit", "step"])
def test_data_that_does_not_fit(call: str, kind: str) -> None:
    ae = small()
    step = fastae.TrainStep(ae, torch.optim.Adam(ae.parameters()), 8)
    who = {"fit": "fit: x", "step": "TrainStep: x"}.get(call, "ConvAutoencoder: x")
    function: Any = {"fit": lambda x: ae.fit(x, progress=False), "step": step}.get(call, getattr(ae, call, None))
    if kind == "array" and call in ("loss", "step"):
        pytest.skip("takes tensors")
    for shape in ((3, 1, 7, 9), (3, 2, 9, 7), (3, 62), (63,), (3, 1, 1, 63)):
        x: Any = torch.zeros(shape)
        text = f"{who} must be images [n, 1, 9, 7] [n, 9, 7] or rows [n, 63]; got {list(shape)}"
        if call == "step" and len(shape) < 3:
            text = f"TrainStep: x must be [rows, 63]; got {list(shape)}"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            function(x.numpy() if kind == "array" else x)
    pixels: Any = torch.zeros(3, 9, 7, dtype=torch.uint8)
    convert = "x.float()" if kind == "tensor" else "x.astype('float32')"
    text = f"{who} must be floating point; got uint8, convert it: {convert} / 255"
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        function(pixels.numpy() if kind == "array" else pixels)


def test_more_that_does_not_fit() -> None:
    ae = small()
    with pytest.raises(ValueError, match=r"^fit: x must be between 0 and 1 for likelihood 'bernoulli'; got 3 at row"):
        ae.fit(3 * torch.ones(4, 1, 9, 7), progress=False)
    with pytest.raises(TypeError, match=r"^ConvAutoencoder: x must be a numpy array or a torch.Tensor; got list$"):
        ae.score([[0.0] * 63])  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"^ConvAutoencoder: x must have no mask"):
        ae.score(np.ma.zeros((3, 9, 7), dtype="float32"))
    for z in (torch.zeros(3, 4), torch.zeros(2, 3, 5), torch.zeros(5)):
        with pytest.raises(ValueError, match=r"^ConvAutoencoder: z must be \[n, 5\]; got "):
            ae.decode(z)


# ---------------------------------------------------------------- with parts


def test_a_variational_code_and_noise_between_convolutions(tmp_path: Any) -> None:
    options: dict[str, Any] = {"corrupt": "gaussian:0.4,low=0,high=1", "bottleneck": "variational:beta=0.5"}
    torch.manual_seed(0)
    ae = ConvAutoencoder((1, 9, 7), [4, 6], 3, **options)
    x = torch.rand(40, 1, 9, 7)
    history = ae.fit(x, epochs=3, batch_size=16, progress=False)
    for loss, nll, kl in zip(history.loss, history.nll, history.kl, strict=True):
        assert loss == pytest.approx(nll + 0.5 * kl, rel=1e-5)
    assert ae.encode(x).shape == (40, 3)
    assert ae.sample(5).shape == (5, 1, 9, 7)
    assert torch.equal(ae.score(x), ae.score(x))
    assert ae.elbo(x, samples=3).shape == (40,)
    ae.save(tmp_path)
    again = fastae.load(tmp_path)
    assert again.config() == ae.config()
    assert torch.equal(again.score(x), ae.score(x))
    with pytest.raises(ValueError, match="code must be a width beside a variational code; got None"):
        ConvAutoencoder((1, 9, 7), [4], bottleneck="variational")
