"""Every example runs, prints what it says and leaves its picture."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = {
    "mnist_plain_loop": ["--epochs", "2"],
    "breast_cancer_anomalies": ["--epochs", "100", "--splits", "2"],
    "digits_codes_classifier": ["--epochs", "20", "--draws", "2"],
    "compression_against_error": ["--epochs", "2"],
    "digits_convolutional": ["--epochs", "2"],
    "digits_generated": ["--epochs", "5"],
    "digits_denoised": ["--epochs", "6", "--judged", "100"],
    "medical_slice_denoised": ["--epochs", "2"],
    "speech_restored": ["--epochs", "15"],
}

pytestmark = pytest.mark.integrations


def run(name: str, folder: Path) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *SHORT[name]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"picture: runs/{name}.png"
    assert (folder / "runs" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
    return done.stdout


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+(?:e-?\d+)?", line)]


def lines(text: str, start: str) -> list[list[float]]:
    found = [numbers(line) for line in text.splitlines() if line.startswith(start)]
    assert found, text
    return found


def test_there_is_a_run_for_every_example() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(SHORT)


def test_mnist_before_and_after_patch(tmp_path: Path) -> None:
    told = run("mnist_plain_loop", tmp_path)
    before, after = lines(told, "torch.nn")[0][0], lines(told, "fastae.patch loss")[0][0]
    assert after == pytest.approx(before, rel=1e-4)
    assert after < 0.06
    assert "replaced 2\n" in told


def test_anomalies_beside_pca_and_isolation_forest(tmp_path: Path) -> None:
    told = run("breast_cancer_anomalies", tmp_path)
    for method in ("fastae", "PCA", "IsolationForest"):
        mean, least, most = lines(told, method)[0]
        assert 0.85 < least <= mean <= most < 1  # chance is 0.5


def test_codes_as_features(tmp_path: Path) -> None:
    told = run("digits_codes_classifier", tmp_path)
    for features in ("64 pixels", "16 components", "16 values"):
        accuracies = lines(told, features)[0]
        assert len(accuracies) == 5
        assert accuracies[0] < accuracies[-1] > 0.85  # chance is 0.1


def test_compression_against_error(tmp_path: Path) -> None:
    told = run("compression_against_error", tmp_path)
    table = [numbers(line) for line in told.splitlines() if re.match(r" +\d+ +\d", line)]
    assert [row[0] for row in table] == [392.0, 196.0, 98.0, 49.0, 24.5, 12.2]
    errors, pca = [row[1] for row in table], [row[2] for row in table]
    assert max(errors) < 0.0669  # the mean digit's
    assert pca == sorted(pca, reverse=True)


def test_convolutional_beside_dense_and_pca(tmp_path: Path) -> None:
    told = run("digits_convolutional", tmp_path)
    table = {name: lines(told, name)[0] for name in ("convolutional", "dense", "PCA")}
    assert table["dense"][1] < 0.03  # after its seconds
    assert table["PCA"][0] < 0.02
    assert table["convolutional"][1] < 0.0669  # the mean digit's


def test_generated_digits_are_taken_for_digits(tmp_path: Path) -> None:
    told = run("digits_generated", tmp_path)
    bound, tighter = lines(told, "held-out digits: bound")[0][:2]
    assert -200 < -bound < -tighter < -90
    sure = {name: lines(told, name)[0][1] for name in ("real, held out", "variational")}
    assert 0.1 < sure["variational"] < sure["real, held out"]  # after 5 epochs


def test_denoised_digits_beside_plain_ones(tmp_path: Path) -> None:
    told = run("digits_denoised", tmp_path)
    errors = {name: lines(told, name)[0][-2] for name in ("noisy", "non-local means", "PCA, all", "plain autoencoder")}
    denoised = lines(told, "fastae")[0][-2]
    assert denoised < 0.9 * errors["plain autoencoder"]
    assert denoised < 0.3 * errors["noisy"]
    assert errors["PCA, all"] < errors["non-local means"] < 0.3 * errors["noisy"]


def test_slices_lose_their_noise(tmp_path: Path) -> None:
    told = run("medical_slice_denoised", tmp_path)
    for name, low in (("CT", 10), ("MR", 3)):
        noisy, median, means, fastae, gain = lines(told, name)[0]
        assert 20 < noisy < 21  # dB, of a noise of 10 % of the range
        assert gain == pytest.approx(fastae - noisy, abs=0.011)
        assert gain > low
        assert noisy < median < min(means, fastae)


def test_lost_frames_of_speech(tmp_path: Path) -> None:
    told = run("speech_restored", tmp_path)
    for gap in (1, 3):
        mean, interpolation, ridge, fastae = lines(told, f"gap of {gap}")[0]
        assert 0.8 < mean < 1  # variances
        assert max(ridge, fastae) < 0.95 * interpolation < 0.07
