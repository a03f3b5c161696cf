"""Ten ways to break a kernel, one at a time: each time `fastae verify` must name it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "fastae_kernels"
Finding = dict[str, object]


def failures(part: str, kernel: str, *options: str, front: Path | None = None, code: str = "") -> list[Finding]:
    """What a part of `fastae verify --quick` has against a kernel; `front` stands before the library on the path."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_INTERPRET": "1"} if part == "numerics" else {}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, (front, ROOT, ROOT / "kernels"))))
    start = ["-c", code] if code else ["-m", f"fastae.verify.{part}"]
    done = subprocess.run(
        [sys.executable, *start, "--quick", "--only", kernel, *options],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    findings = [line for line in found if "part" in line]
    assert findings, done.stderr
    return [f for f in findings if not f["ok"]]


def names(found: Sequence[Finding]) -> set[object]:
    return {str(f["op"]).strip("_").removesuffix("_kernel") for f in found}


# ---------------------------------------------------------------- in the source


@pytest.fixture
def mutate(tmp_path: Path) -> object:
    """A copy of the kernels, with one pattern of one file replaced."""

    def change(file: str, pattern: str, replacement: str) -> Path:
        shutil.copytree(KERNELS, tmp_path / "fastae_kernels", ignore=shutil.ignore_patterns("__pycache__"))
        path = tmp_path / "fastae_kernels" / "jit" / file
        text, count = re.subn(
            pattern, replacement, path.read_text(), count=1, flags=re.DOTALL if "DECODER" in pattern else 0
        )
        assert count == 1, f"{file} has no {pattern}: choose another way to break it"
        path.write_text(text)
        return tmp_path

    return change


def test_a_dropped_mask(mutate) -> None:
    front = mutate("losses.py", r"(tl\.store\(dinput_ptr .*), mask=mask\)", r"\1)")
    found = failures("numerics", "loss", front=front)
    assert names(found) == {"loss"}
    assert any("elements written outside a buffer" in str(f["detail"]) for f in found)


def test_a_swapped_stride(mutate) -> None:
    front = mutate("linear_act.py", r"offs_m\[:, None\] \* stride_ym \+ offs_n\[None, :\] \* stride_yn",
                   "offs_m[:, None] * stride_yn + offs_n[None, :] * stride_ym")  # fmt: skip
    found = failures("numerics", "act_bwd", front=front)
    assert names(found) == {"act_bwd"}
    assert any("Frobenius error" in str(f["detail"]) or "NaN" in str(f["detail"]) for f in found)


def test_noise_that_knows_no_step(mutate) -> None:
    front = mutate("random.py", r"step = tl\.load\(state_ptr \+ 1\)", "step = tl.load(state_ptr)")
    found = failures("statistics", "gather", front=front)
    assert {f["shape"] for f in found} == {"gaussian", "mask"}  # which compare two steps
    assert all(str(f["figure"]).startswith("steps ") for f in found)


def test_a_load_without_other(mutate) -> None:
    """In the interpreter the numbers are right."""
    front = mutate("losses.py", r"(input = tl\.load\(.*), other=0\.0\)", r"\1)")
    (found,) = failures("numerics", "loss", front=front)
    assert (found["part"], found["op"], found["figure"]) == ("lint", "_loss_kernel", "other")
    assert str(found["detail"]).startswith("losses.py:")


def test_an_fp16_accumulator(mutate) -> None:
    front = mutate("tile_ops.py", r"acc = tl\.dot\(a, b, acc, (.*), out_dtype=ACC\)",
                   r"acc = tl.dot(a, b, acc.to(tl.float16), \1, out_dtype=tl.float16).to(ACC)")  # fmt: skip
    found = failures("numerics", "linear_act_fwd", front=front)
    assert names(found) == {"linear_act_fwd"}
    # In fp16 itself a sum of a few terms comes out as well; of 20,000 it does not
    assert any(f["dtype"] == "float16" and "K=20000" in str(f["shape"]) for f in found)
    assert any(f["dtype"] == "float32" for f in found)


def test_an_int32_offset(mutate) -> None:
    """By the source, and by the numbers of rows that lie 2^30 elements apart."""
    front = mutate("tile_ops.py", r"pid\.to\(tl\.int64\) \* BLOCK", "pid * BLOCK")
    found = failures("numerics", "loss", front=front)
    assert names(found) == {"loss"}
    assert {f["figure"] for f in found if f["part"] == "lint"} == {"int32"}
    assert any("far apart" in str(f["shape"]) for f in found)


def test_a_tile_that_spills(mutate) -> None:
    front = mutate("tiles.py", r'(DECODER_TILES.*?\("ampere", "half"\): )Tile\([^)]*\)', r"\1Tile(64, 128, 256, 4, 1)")
    found = failures("compilation", "decoder_loss", "--target", "sm_80", front=front)
    assert names(found) == {"decoder_loss"}
    assert any("spills" in str(f["detail"]) for f in found)


# ---------------------------------------------------------------- in the compiled code

BREAK = """
import re
from fastae.verify import execution
from fastae_emulator import launches
from fastae_emulator import ptx

def broken(text):
    # The last one: of barriers that follow each other the first may be one too many
    found = list(re.finditer({pattern!r}, text))
    assert found, "the code has none"
    return ptx.assemble(text[:found[-1].start()] + text[found[-1].end():])

launches.assemble = broken
execution.main()
"""


@pytest.mark.parametrize(
    ("target", "pattern", "error"),
    [
        pytest.param("sm_80", r"bar\.sync[^;]*;", "RaceError", id="a barrier"),
        pytest.param("sm_80", r"cp\.async\.wait_group[^;]*;", "InFlightError", id="a wait for copies"),
        pytest.param("sm_90", r"wgmma\.wait_group[^;]*;", "InFlightError", id="a wait for products"),
        pytest.param("sm_80", r"@%p\d+ (?=st\.global)", "OutOfBoundsError", id="a bounds test"),
    ],
)
def test_without(target: str, pattern: str, error: str) -> None:
    found = failures("execution", "linear_act_fwd", "--target", target, code=BREAK.format(pattern=pattern))
    assert names(found) == {"linear_act_fwd"}
    assert any(f"{error}: _linear_act_fwd_kernel, " in str(f["detail"]) for f in found), found
    assert any(re.search(r"\w+\.py:\d+", str(f["detail"])) for f in found)


def test_nothing_is_held_against_kernels_that_are_whole() -> None:
    """The same runs, with nothing broken."""
    assert failures("numerics", "loss") == []
    assert failures("execution", "linear_act_fwd", "--target", "sm_80") == []
