"""`fastae verify` as a user meets it: parts, processes, what it prints and writes, exit codes, errors in one line."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from fastae_emulator import resources

from fastae.cli import main as cli
from fastae.verify import command
from fastae.verify.findings import VERIFY_PARTS, Finding, announce, announced, emit, named, parse

ROOT = Path(__file__).parents[2]
GOOD = Finding("numerics", "loss", "float32", "M=3 N=5 K=7, dinput", "", "interpreter", "1.0e-07", "6.0e-07", True)
BAD = replace(GOOD, op="act_bwd", figure="2.0e-03", ok=False, detail="result 0: Frobenius error 2.00e-03")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`fastae verify ARGS` in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["fastae", "verify", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.fixture
def children(monkeypatch):
    """Instead of the parts: what each child prints, and then executes."""
    prints: dict[str, list[Finding]] = {part: [replace(GOOD, part=part)] for part in VERIFY_PARTS}
    then: dict[str, str] = {}

    def arguments(part, options):
        text = "\n".join(json.dumps(asdict(f)) for f in prints[part])
        return [sys.executable, "-c", f"print({text!r}, flush=True)\n" + then.get(part, "")]

    monkeypatch.setattr(command, "_arguments", arguments)
    monkeypatch.setattr(command, "BY_TARGET", ())
    return prints, then


# ---------------------------------------------------------------- what is printed, written and returned


def test_all_parts_hold(run, children) -> None:
    code, out, err = run("--seed", 7, "--json", "found.json")
    assert (code, err) == (0, "")
    *parts, verdict = out.splitlines()[-6:]
    assert [line.split()[0] for line in parts] == list(VERIFY_PARTS)
    assert all("1 of 1 checks hold" in line for line in parts)
    assert verdict.startswith("verified: all 5 checks hold; seed 7, ")
    document = json.loads(Path("found.json").read_text())
    assert document["ok"] is True
    assert document["seed"] == 7
    assert document["command"] == "fastae verify --seed 7 --json found.json"
    assert set(document["versions"]) == {"fastae", "torch", "triton", "numpy", "python"}
    assert "cores" in document["machine"]
    assert [f["part"] for f in document["findings"]] == list(VERIFY_PARTS)
    assert Finding(**document["findings"][0]) == GOOD


def test_a_failure_is_printed_in_full(run, children) -> None:
    children[0]["numerics"] += [BAD]
    code, out, _ = run("--numerics", "--json", "found.json")
    assert code == 1
    row = next(line for line in out.splitlines() if "FAILED" in line)
    assert row.split() == ["numerics", "act_bwd", "float32", "M=3", "N=5", "K=7,", "dinput", "interpreter", "2.0e-03",
                           "6.0e-07", "FAILED"]  # fmt: skip
    assert "act_bwd: result 0: Frobenius error 2.00e-03" in out
    assert out.splitlines()[-1].startswith("FAILED: 1 of 2 checks: act_bwd; seed ")
    assert json.loads(Path("found.json").read_text())["ok"] is False


def test_one_line_for_each_op(run, children) -> None:
    children[0]["numerics"] += [replace(GOOD, dtype="float64", figure="5.9e-07")] * 3
    _, out, _ = run("--numerics")
    (line,) = [line for line in out.splitlines() if " loss " in line]
    assert " ".join(line.split()) == "numerics loss fp32 fp64 interpreter 5.9e-07 of 6.0e-07 4 0 ok"
    _, out, _ = run("--numerics", "--all")
    assert out.count("M=3 N=5 K=7, dinput") == 4


def test_many_failures(run, children) -> None:
    children[0]["numerics"] += [replace(BAD, shape=f"M={i}") for i in range(50)]
    _, out, _ = run("--numerics")
    assert "... and 10 failures more; --json FILE has them all" in out


@pytest.mark.parametrize("part", VERIFY_PARTS)
def test_each_part_alone(run, children, part) -> None:
    code, out, _ = run(f"--{part}")
    assert code == 0
    assert out.splitlines()[-1].startswith("verified: all 1 checks hold")
    assert not [p for p in VERIFY_PARTS if p != part and p in out]


def test_another_seed_every_time(run, children) -> None:
    seeds = {run("--numerics")[1].splitlines()[-1].split("seed ")[1].split(",")[0] for _ in range(3)}
    assert len(seeds) == 3


# ---------------------------------------------------------------- children that do not finish


def test_a_killed_child_names_itself_and_its_kernel(run, children) -> None:
    then = """
import os, signal
from fastae.verify.findings import announce
announce("linear_wgrad", "float16, M=3")
os.kill(os.getpid(), signal.SIGKILL)
"""
    children[1]["execute"] = then
    code, out, _ = run()
    assert code == 1
    assert "execute   did not finish: execute was killed by SIGKILL while checking linear_wgrad (float16, M=3)" in out
    assert out.splitlines()[-1].startswith("FAILED: 1 of 6 checks: linear_wgrad; ")


def test_a_child_that_raises(run, children) -> None:
    children[1]["compile"] = "raise KeyError('tile')"
    code, out, _ = run("--compile")
    assert code == 1
    assert "compile   did not finish: compile ended with exit code 1: KeyError: 'tile'" in out
    assert out.splitlines()[-1].startswith("FAILED: 0 of 1 checks: compile; ")


def test_nothing_found_is_no_proof(run, children) -> None:
    children[0]["traffic"].clear()
    code, out, _ = run("--traffic", "--only", "loss")
    assert code == 1
    assert "traffic   did not finish: traffic reported nothing about 'loss'" in out


def test_children_have_an_environment_of_their_own_and_come_two_at_a_time(run, children, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    note = """
import os, sys, time
def note(what):
    with open("notes", "a") as file:
        file.write(what + chr(10))
note(f"+ {part} {os.environ.get('TRITON_INTERPRET')} {os.environ['OMP_NUM_THREADS']}")
time.sleep(0.3)
note("-")
"""
    for part in VERIFY_PARTS:
        children[1][part] = f"part = {part!r}\n{note}"
    run()
    lines = (tmp_path / "notes").read_text().split("\n")[:-1]
    assert {line[2:] for line in lines if line[0] == "+"} == {
        "numerics 1 1", "compile None 1", "execute None 1", "traffic None 1", "statistics None 1",
    }  # fmt: skip
    depth = [sum(1 if line[0] == "+" else -1 for line in lines[: i + 1]) for i in range(len(lines))]
    assert max(depth) == 2
    assert command.environment("numerics", "cuda").get("TRITON_INTERPRET") is None


def test_arguments_of_the_children() -> None:
    options = command.VerifyOptions(VERIFY_PARTS, True, 5, ("sm_90",), "loss")
    assert command._arguments("numerics", options)[1:] == [
        "-m", "fastae.verify.numerics", "--seed", "5", "--quick", "--only", "loss",
    ]  # fmt: skip
    assert command._arguments("compile", options)[1:] == [
        "-m", "fastae.verify.compilation", "--seed", "5", "--quick", "--only", "loss", "--target", "sm_90",
    ]  # fmt: skip
    assert command._arguments("numerics", command.VerifyOptions(device="cuda"))[-2:] == ["--device", "cuda"]


def test_a_process_for_each_target(run, children, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(command, "BY_TARGET", ("compile", "execute", "traffic"))
    monkeypatch.setattr(command, "run_child", lambda part, options, _: seen.append((part, options.targets))
                        or command.Outcome(part, [GOOD]))  # fmt: skip
    assert run("--compile", "--execute", "--target", "sm_80, gfx942")[0] == 0
    assert sorted(seen) == [("compile", ("gfx942",)), ("compile", ("sm_80",)), ("execute", ("sm_80",))]
    seen.clear()
    assert run("--traffic", "--quick")[0] == 0
    assert seen == [("traffic", ("sm_90",))]
    assert run("--traffic")[0] == 0
    assert sorted(seen[1:]) == [("traffic", (target,)) for target in ("sm_100", "sm_80", "sm_90")]


@pytest.mark.parametrize(("code", "ok"), [(0, True), (9, False)])
def test_compute_sanitizer_where_it_is_installed(run, children, monkeypatch, tmp_path, code: int, ok: bool) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!/bin/sh\necho '========= Invalid read'\necho '========= ERROR SUMMARY: {code} errors'\nexit {code}\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    returned, _, _ = run("--numerics", "--device", "cuda", "--json", "found.json")
    assert returned == (not ok)
    found = [Finding(**f) for f in json.loads(Path("found.json").read_text())["findings"]][1:]
    assert [(f.op, f.target, f.figure, f.ok) for f in found] == [
        (name, "cuda", f"ERROR SUMMARY: {code} errors", ok) for name in ("memcheck", "racecheck")
    ]


# ---------------------------------------------------------------- errors: one line, exit code 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--target", "sm_70"],
         "fastae: --target must be one of sm_80, sm_90, sm_100, gfx942, or several with commas between; got 'sm_70'"),
        (["--execute", "--target", "gfx942"], "fastae: --execute knows the targets sm_80, sm_90, sm_100; got gfx942"),
        (["--seed", "-1"], "fastae: Invalid value for '--seed': -1 is not in the range x>=0."),
        (["--speed"], "fastae: No such option '--speed'."),
    ],
)  # fmt: skip
def test_errors(run, args, message) -> None:
    code, out, err = run(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.strip().startswith(message)


def test_without_a_gpu(run, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = run("--device", "cuda")
    assert (code, err) == (2, "fastae: --device cuda needs a GPU and a PyTorch built for it: "
                              "torch.cuda.is_available() is false; leave it out to run without one\n")  # fmt: skip


def test_without_triton(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    code, _, err = run("--quick")
    assert (code, err) == (
        2,
        "fastae: fastae verify needs Triton, which is not installed; pip install triton (Linux)\n",
    )


@pytest.mark.parametrize("tool", ["nvdisasm", "cuobjdump"])
def test_without_the_disassembler(run, monkeypatch, tool: str) -> None:
    monkeypatch.setattr(resources.Path, "exists", lambda path: path.name != tool)
    code, _, err = run("--compile")
    assert code == 2
    assert err.endswith(f"{tool} is missing; reinstall it with pip install --force-reinstall triton (Linux)\n")
    assert err.count("\n") == 1


def test_a_folder_that_cannot_be_written(run, children) -> None:
    Path("file").write_text("")
    assert run("--numerics", "--json", "file/found.json")[0] == 2


# ---------------------------------------------------------------- findings across processes


def test_findings_and_announcements_cross(capsys) -> None:
    emit(BAD)
    announce("loss", "float32, M=3")
    first, second = capsys.readouterr().out.splitlines()
    assert parse(first) == BAD
    assert announced(first) is None
    assert parse(second) is None
    assert announced(second) == ("loss", "float32, M=3")
    for line in ("", "warning: something", "[]", "3", '{"part": "numerics"}'):
        assert parse(line) is None
        assert announced(line) is None


def test_one_name_for_a_kernel_and_its_launcher() -> None:
    assert named("_loss_kernel", "loss")
    assert named("loss", "_loss_kernel")
    assert named("loss", None)
    assert not named("loss", "linear_act_loss")


# ---------------------------------------------------------------- the real thing


def fastae(*args: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "fastae", "verify", *map(str, args)], cwd=ROOT, env=environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip


@pytest.mark.thorough
def test_for_real(tmp_path) -> None:
    """One op, from the command to the file; the same seed gives the same findings."""
    runs = []
    for number in range(2):
        file = tmp_path / f"{number}.json"
        done = fastae("--numerics", "--quick", "--only", "_loss_kernel", "--seed", 11, "--json", file)
        assert done.returncode == 0, done.stdout + done.stderr
        runs.append(json.loads(file.read_text())["findings"])
    assert runs[0] == runs[1]
    assert {f["op"] for f in runs[0]} == {"loss", "_loss_kernel"}
    assert {f["dtype"] for f in runs[0]} >= {"float32", "float16", "bfloat16", "float64"}


def test_kernels_of_your_own() -> None:
    """The example for users: a kernel as compiled for three GPUs, from pytest. The interpreter of this session would be
    in its way."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    example = ROOT / "tests" / "verify" / "examples" / "user_kernel.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", example], cwd=ROOT,
        env=environment, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("......")
