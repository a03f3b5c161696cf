"""The wheel and the sdist, built from this checkout and run outside of it: packages, data files and commands."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.integrations
ROOT = Path(__file__).parents[2]
PACKAGES = ("fastae", "fastae_kernels", "fastae_emulator", "fastae_bench")


def run(*command: object, cwd: Path, path: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {} if path is None else {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dist/ with a wheel of the checkout and one of its sdist, and installed/ with the second."""
    folder = tmp_path_factory.mktemp("packages")
    run("-m", "hatchling", "build", "-d", folder / "dist", cwd=ROOT)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    pip = "-m", "pip", "--disable-pip-version-check", "-q"
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder / "again", sdist, cwd=folder)
    (wheel,) = (folder / "again").glob("*.whl")
    run(*pip, "install", "--no-deps", "--target", folder / "installed", wheel, cwd=folder)
    return folder


def test_the_sdists_wheel_is_the_checkouts(built: Path) -> None:
    files = []
    for folder in ("dist", "again"):
        (wheel,) = (built / folder).glob("*.whl")
        files.append(sorted(name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name))
    assert files[0] == files[1]
    assert {name.split("/")[0] for name in files[0]} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(files[0])
    ours = {p.relative_to(ROOT / root).as_posix() for root in (".", "kernels", "bench") for package in PACKAGES
            for p in (ROOT / root / package).rglob("*.py")}  # fmt: skip
    assert {name for name in files[0] if name.endswith(".py")} == ours


def test_the_packages_come_from_the_wheel_and_work(built: Path, tmp_path: Path) -> None:
    code = f"""
import importlib
for name in {PACKAGES!r}:
    file = importlib.import_module(name).__file__
    assert file.startswith({str(built / "installed")!r}), file
import torch, fastae
ae = fastae.DenseAutoencoder([6, 4, 2])
ae.fit(torch.rand(40, 6), epochs=1, batch_size=8, progress=False)
ae.save("model")
print(torch.equal(fastae.load("model").encode(torch.ones(3, 6)), ae.encode(torch.ones(3, 6))))
"""
    assert run("-c", code, cwd=tmp_path, path=built / "installed") == "True\n"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("bench", "--quick", "--only", "op", "--no-compile", "--rounds", 2), "linear_act"),
        (("verify", "--quick", "--seed", 0), "checks hold; seed 0"),
        (("explain", "--features", "30,8", "--batch", 16), "linear_act_fwd"),
    ],
    ids=lambda v: str(v[0]) if isinstance(v, tuple) else "",
)
def test_commands_outside_the_checkout(built: Path, tmp_path: Path, arguments: tuple[object, ...], wanted: str) -> None:
    assert wanted in run("-m", "fastae", *arguments, cwd=tmp_path, path=built / "installed")
