"""PTX text to a program; and `run`, with which the other tests of the machine execute a few lines."""

from collections.abc import Sequence

import numpy as np
import pytest

from fastae.verify.ptx import Counters, GlobalMemory, PtxError, assemble, launch
from fastae.verify.ptx.errors import UnknownInstructionError
from fastae.verify.ptx.text import parse, split_operands

HEADER = """
.version 9.1
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel({parameters})
.reqntid {threads}
{{
  .reg .pred %p<16>;
  .reg .b16 %h<40>;
  .reg .b32 %r<80>;
  .reg .b64 %d<40>;
  .loc 1 7 3 // tile.py:7:3 @[ op.py:42:9 ]
  ld.param.u64 %d30, [k0];
  ld.param.u64 %d31, [k1];
  ld.param.u64 %d32, [k2];
  ld.param.u64 %d33, [k3];
  mov.u32 %r70, %tid.x;
{body}
  ret;
}}
.file 1 "/somewhere/tile.py"
"""
PARAMETERS = ", ".join(f".param .u64 k{i}" for i in range(4))


def text(body: str, threads: int = 32) -> str:
    """A kernel whose arguments 0 to 3 lie in %d30 to %d33 and whose thread number lies in %r70."""
    return HEADER.format(parameters=PARAMETERS, threads=threads, body=body)


def run(
    body: str, *arrays: np.ndarray, threads: int = 32, shared: int = 0, blocks: int = 1,
    only: Sequence[int] | None = None, count: bool = False,
) -> Counters:  # fmt: skip
    """Execute a body on arrays, in place."""
    memory = GlobalMemory()
    addresses = [memory.add(f"tensor{i}", a.reshape(-1).view(np.uint8)) for i, a in enumerate(arrays)]
    return launch(assemble(text(body, threads)), (blocks,), memory, addresses, shared, only, count)


def test_operands_are_split_outside_brackets() -> None:
    assert split_operands("{%r1, %r2}, [%d1 + 4], %r3|%p1, 5") == ("{%r1, %r2}", "[%d1 + 4]", "%r3|%p1", "5")


def test_a_program() -> None:
    program = parse(text("@!%p1 bra $L1;\n $L0: add.s32 %r1, %r2, 0;\n $L1: bra.uni $L0;"))
    assert (program.name, program.threads, program.registers["%r79"]) == ("kernel", 32, 32)
    assert program.parameters == tuple((f"k{i}", "u64") for i in range(4))
    branch, add, back = program.instructions[5:8]
    assert (branch.predicate, branch.negated, branch.target) == ("%p1", True, 7)
    assert (add.opcode, add.qualifiers, add.operands) == ("add", ("s32",), ("%r1", "%r2", "0"))
    assert back.target == 6
    assert add.where == "tile.py:7, called from op.py:42"


def test_a_line_without_its_comment_is_found_in_the_file_table() -> None:
    program = parse(text(".loc 1 99 0\n add.s32 %r1, %r2, 0;"))
    assert program.instructions[5].where == "tile.py:99"


def test_scopes_have_their_own_registers_and_labels() -> None:
    scope = "{\n .reg .pred done;\n wait:\n setp.ne.s32 done, %r1, 0;\n @done bra.uni wait;\n }\n"
    program = parse(text("mov.u32 %r1, 0;\n" + scope + scope))
    first, second = (i for i in program.instructions if i.opcode == "setp")
    assert first.operands[0] != second.operands[0]
    assert {first.operands[0], second.operands[0]} <= set(program.registers)
    assert [i.target for i in program.instructions if i.opcode == "bra"] == [6, 8]


def test_a_vector_operand_is_no_scope() -> None:
    program = parse(text("mov.b64 %d1, {%r1, %r2};"))
    assert program.instructions[5].operands == ("%d1", "{%r1, %r2}")


@pytest.mark.parametrize(
    ("ptx", "message"),
    [
        ("", "no .entry"),
        (text("bra $L7;"), r"kernel, tile.py:7, called from op.py:42: no label for bra \$L7"),
        (text("").replace(".reqntid 32", ".reqntid 8, 8, 1"), "one-dimensional blocks"),
        (text(".shared .b8 x[4];"), "directive not implemented: .shared"),
    ],
)
def test_what_cannot_be_read(ptx: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        parse(ptx)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "frob.s32 %r1, %r2;",
            "this opcode of `frob.s32` not implemented, in `frob.s32 %r1, %r2`; implemented: no form",
        ),
        ("add.rz.f32 %r1, %r2, %r3;", "these qualifiers of `add.rz.f32` not implemented.*implemented: add u16"),
        ("cvt.rn.satfinite.f16.f32 %h1, %r1;", "these qualifiers of `cvt.rn.satfinite.f16.f32`"),
        ("cp.async.bulk.tensor.2d.shared::cta.global.tile [%r1], [%d1, {%r2, %r3}], [%r4];", "`cp.async.bulk.tensor"),
        ("bar.sync 1, 64;", "only barrier 0 of the whole block"),
        ("ld.global.b32 %r1, [symbol];", "operand 'symbol' not implemented"),
        ("mov.b64 %d1, %r1;", "%r1 has 32 bits, 64 are read"),
        ("mov.b32 %h1, %r1;", "%h1 has 16 bits, 32 are written"),
        ("ld.global.v2.b32 {%r1}, [%d1];", "2 registers needed"),
        ("cp.async.cg.shared.global [%r1], [%d1], 8;", "cp.async of this size"),
    ],
)
def test_what_is_not_implemented_is_refused_before_anything_runs(line: str, message: str) -> None:
    with pytest.raises(UnknownInstructionError, match=message) as caught:
        assemble(text(line))
    assert str(caught.value).startswith("kernel, tile.py:7, called from op.py:42: ")
    assert line.rstrip(";") in str(caught.value)
