"""Parser of PTX text, and the refusal of instructions outside the table."""

import pytest
from fastae_emulator.ptx import PtxError, assemble
from fastae_emulator.ptx.errors import UnknownInstructionError
from fastae_emulator.ptx.text import parse, split_operands
from ptx_programs import text


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
        (
            "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%d1, {%r2, %r3}], [%r4];",
            "`cp.async.bulk.tensor.2d",
        ),
        (
            "cp.async.bulk.tensor.2d.shared::cta.global.tile [%r1], [%d1, {%r2, %r3}], [%r4];",
            "`cp.async.bulk.tensor.2d",
        ),
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
