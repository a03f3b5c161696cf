"""ONNX export of `DenseAutoencoder` and of a patched model, run by onnxruntime and compared with PyTorch."""

import warnings
from pathlib import Path

import pytest
import torch
from cases import ACTIVATIONS, uniform
from kinds import KINDS, WIDTH, X, make
from torch import nn

import fastae
from fastae import DenseAutoencoder

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the exporter's own and onnxscript's
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def exported(model: nn.Module, path: Path) -> object:
    import onnxruntime

    rows = torch.export.Dim("rows")
    program = torch.onnx.export(model, (uniform(5, 12, low=0, high=1),), dynamic_shapes=({0: rows},), verbose=False)
    program.save(path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def check(model: nn.Module, path: Path) -> None:
    session = exported(model, path)
    (given,) = session.get_inputs()
    assert given.shape == ["rows", 12]
    for rows in (1, 5, 64):
        x = uniform(rows, 12, low=0, high=1, seed=rows)
        (y,) = session.run(None, {given.name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)


# logit alone last: within its clamp, where its slope is a million, nothing can be compared
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "logit"])
def test_every_activation(activation: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(DenseAutoencoder([12, 8, 4], activation=activation), tmp_path / "model.onnx")


def test_logit_undoes_sigmoid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DenseAutoencoder([12, 4], code_activation="sigmoid", output_activation="logit")
    with torch.no_grad():
        model.decoder[0].weight.abs_().div_(12)
        model.decoder[0].bias.fill_(0.2)  # its argument in (0.2, 0.6)
    check(model, tmp_path / "model.onnx")


def test_tied_weights_and_a_patched_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(DenseAutoencoder([12, 8, 4], tied=True), tmp_path / "tied.onnx")
    patched = nn.Sequential(nn.Linear(12, 4), nn.GELU(), nn.Linear(4, 12), nn.Sigmoid())
    assert len(fastae.patch(patched).replaced) == 2
    check(patched, tmp_path / "patched.onnx")


@pytest.mark.parametrize("code", [None, 5])
def test_convolutions_of_any_number_of_images(code: int | None, tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    model = fastae.ConvAutoencoder((1, 9, 7), [4, 3], code).eval()
    images = torch.export.Dim("images")
    program = torch.onnx.export(model, (torch.rand(5, 1, 9, 7),), dynamic_shapes=({0: images},), verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.shape == ["images", 1, 9, 7]
    for count in (1, 5, 33):
        x = torch.rand(count, 1, 9, 7)
        (y,) = session.run(None, {given.name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, tmp_path: Path) -> None:
    """Trained a little; what is exported is the reconstruction."""
    import onnxruntime

    model = make(kind)
    model.fit(X, epochs=1, progress=False)
    model.eval()
    rows = torch.export.Dim("rows")
    torch.onnx.export(model, (X,), dynamic_shapes=({0: rows},), verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.shape == ["rows", WIDTH]
    for count in (1, len(X)):
        (y,) = session.run(None, {given.name: X[:count].numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), model(X[:count]), rtol=1e-4, atol=1e-5)


def test_the_exporter_on_torchscript_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"^linear_act: the caller must not be TorchScript"):
            torch.onnx.export(
                DenseAutoencoder([12, 4]), (uniform(5, 12, low=0, high=1),), tmp_path / "m.onnx", dynamo=False
            )
