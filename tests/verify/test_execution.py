"""Compiled kernels, executed and compared. What compiles runs in children: the interpreter of the other tests
excludes it."""

import json

import torch
from children import child
from fastae_kernels.elementwise import ACTIVATIONS, LOSSES

from fastae.verify.cases import OPS
from fastae.verify.execution import TARGETS, cases


def test_every_op_and_activation_has_its_turn() -> None:
    seen = {
        (target, precision, case.op, case.activation)
        for target in TARGETS
        for precision, case in cases(target, False, 0)
    }
    ops = {op for _, _, op, _ in seen}
    assert ops == set(OPS)
    for op in ops:
        activations = {a for _, _, name, a in seen if name == op}
        assert activations >= (set(ACTIVATIONS) if OPS[op].activated else {"identity"})
        wide = {"float64"} if torch.float64 in OPS[op].dtypes else set()
        assert {precision for _, precision, name, _ in seen if name == op} == {
            "bfloat16", "float16", "tf32", "float32", *wide,
        }  # fmt: skip
    losses = {(target, case.op, case.loss) for target in TARGETS for _, case in cases(target, False, 0)}
    assert {(op, loss) for _, op, loss in losses} >= {
        (op, loss) for op in ("loss", "linear_act_loss", "decoder_loss", "stack_score") for loss in LOSSES
    }
    for op in ("linear_act_fwd", "linear_dgrad_act", "linear_act_loss", "decoder_loss"):
        for target in TARGETS:
            for precision in ("bfloat16", "float32"):
                own = {a for t, p, name, a in seen if (t, p, name) == (target, precision, op)}
                assert own >= set(ACTIVATIONS)


def test_one_op_on_one_gpu() -> None:
    lines = child(
        "-m", "fastae.verify.execution", "--quick", "--target", "sm_90", "--only", "linear_wgrad"
    ).splitlines()  # fmt: skip
    findings = [found for found in map(json.loads, lines) if "next" not in found]
    assert findings
    assert all(found["ok"] for found in findings), findings
    assert {(found["part"], found["op"], found["target"]) for found in findings} == {
        ("execute", "linear_wgrad", "sm_90")
    }


STEP = """
import torch
from fastae.verify import execution
from fastae.verify.cases import Case

for target, precision in (("sm_80", "bfloat16"), ("sm_90", "bfloat16"), ("sm_100", "float32")):
    found = execution.step_finding((24, 16, 8), 20, "relu", precision, target, 3)
    print(found.ok, found.op, found.detail)

options = (("bias", True), ("keep_p", False), ("dropout", True))
case = Case("linear_act_fwd", torch.float32, (33, 17, 20), "relu", options)
right = execution.implementation

def wrong(backend, name):
    launcher = right(backend, name)
    if backend == "torch":
        return launcher
    def off(*arguments):
        y, p = launcher(*arguments)
        return y * 1.001, p
    return off

execution.implementation = wrong
found = execution.measure(case, "float32", "sm_80")
print(found.problem[:23])
"""


def test_a_training_step_and_a_wrong_result() -> None:
    assert child("-c", STEP).splitlines() == [
        "True training step ",
        "True training step ",
        "True training step ",
        "result 0: Frobenius err",
    ]
