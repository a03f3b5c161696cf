# ruff: noqa: E501 - lines of PTX are kept whole
"""Products and their fragments, against numpy; the layouts are spelled out here once more, from the PTX ISA."""

import numpy as np
import pytest
from fastae_emulator.ptx.errors import InFlightError, RaceError, UninitialisedError, UnsynchronisedError
from fastae_emulator.ptx.scalars import bf16_to_f32, f32_to_bf16, f32_to_tf32
from ptx_programs import run

BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1, "f64": 8}


def operand(kind: str, rows: int, cols: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(bits, values) of a matrix."""
    rng = np.random.default_rng(seed)
    if kind in ("s8", "u8"):
        bits = rng.integers(0, 256, (rows, cols), dtype=np.uint8).view("i1" if kind == "s8" else "u1")
        return bits, bits.astype(np.float64)
    values = rng.standard_normal((rows, cols))
    if kind == "bf16":
        bits = f32_to_bf16(values.astype(np.float32))
        return bits, bf16_to_f32(bits).astype(np.float64)
    if kind == "tf32":
        bits = f32_to_tf32(values.astype(np.float32))
        return bits + np.uint32(0x1234 & 0x1FFF), bits.view(np.float32).astype(np.float64)  # low bits are ignored
    bits = values.astype({"f16": np.float16, "f64": np.float64}[kind])
    return bits, bits.astype(np.float64)


def words(matrix: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrix).view(np.uint32)


SHAPES = [
    ("m16n8k8", "f32", "f16"), ("m16n8k16", "f32", "f16"), ("m16n8k8", "f32", "bf16"), ("m16n8k16", "f32", "bf16"),
    ("m16n8k4", "f32", "tf32"), ("m16n8k8", "f32", "tf32"), ("m16n8k16", "s32", "s8"), ("m16n8k32", "s32", "s8"),
    ("m16n8k32", "s32", "u8"), ("m16n8k8", "f16", "f16"), ("m16n8k16", "f16", "f16"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "kind_c", "kind"), SHAPES)
def test_mma(shape: str, kind_c: str, kind: str) -> None:
    """Fragments (PTX ISA 9.7.14.5): lane = 4 g + t holds of A rows g and g + 8, of B column g, of C columns 2 t and 2 t + 1."""
    m, n, k = 16, 8, int(shape.split("k")[1])
    a, va = operand(kind, m, k, 1)
    b, vb = operand(kind, n, k, 2)  # column by column
    dtype = {"f32": np.float32, "s32": np.int32, "f16": np.float16}[kind_c]
    c = (np.random.default_rng(3).standard_normal((m, n)) * 10).astype(dtype)
    wa, wb = words(a), words(b)  # [row, 32-bit word]
    lanes_a = [
        [wa[4 * 0 + lane // 4 + 8 * (i % 2), lane % 4 + 4 * (i // 2)] for i in range(wa.shape[1] // 2)]
        for lane in range(32)
    ]
    lanes_b = [[wb[lane // 4, lane % 4 + 4 * i] for i in range(wb.shape[1] // 4)] for lane in range(32)]
    wc = words(c.reshape(m, n)) if kind_c == "f16" else c.view(np.uint32)
    if kind_c == "f16":
        lanes_c = [[wc[lane // 4 + 8 * i, lane % 4] for i in range(2)] for lane in range(32)]
    else:
        lanes_c = [[wc[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] for i in range(4)] for lane in range(32)]
    ra, rb, rc = (np.array(x, np.uint32) for x in (lanes_a, lanes_b, lanes_c))
    out = np.zeros_like(rc)

    def load(base: int, first: int, rows: np.ndarray) -> str:
        lines = [f"mad.wide.u32 %d1, %r70, {4 * rows.shape[1]}, %d{base};"]
        return "".join(lines + [f"ld.global.b32 %r{first + i}, [%d1 + {4 * i}];" for i in range(rows.shape[1])])

    def names(first: int, rows: np.ndarray) -> str:
        return "{" + ", ".join(f"%r{first + i}" for i in range(rows.shape[1])) + "}"

    counters = run(
        load(30, 1, ra) + load(31, 10, rb) + load(32, 20, rc)
        + f"mma.sync.aligned.{shape}.row.col.{kind_c}.{kind}.{kind}.{kind_c} {names(30, rc)}, {names(1, ra)}, {names(10, rb)}, {names(20, rc)};"
        + f"mad.wide.u32 %d2, %r70, {4 * rc.shape[1]}, %d33;" + "".join(f"st.global.b32 [%d2 + {4 * i}], %r{30 + i};" for i in range(rc.shape[1])),
        ra, rb, rc, out,
    )  # fmt: skip
    expected = (va @ vb.T + c.astype(np.float64)).astype(dtype)
    got = np.zeros((m, n), dtype)
    for lane in range(32):
        for i in range(rc.shape[1]):
            if kind_c == "f16":
                got[lane // 4 + 8 * i, 2 * (lane % 4) : 2 * (lane % 4) + 2] = out[lane, i : i + 1].view(np.float16)
            else:
                got[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] = out[lane, i : i + 1].view(dtype)[0]
    assert np.array_equal(got, expected)
    assert counters.tensor_core_ops == {f"mma.sync {kind}": 1}
    assert counters.tensor_core_flops == 2 * m * n * k


@pytest.mark.parametrize("saturates", [False, True])
def test_mma_of_bytes_at_the_end_of_its_range(saturates: bool) -> None:
    out = np.zeros(32, np.int32)
    mode = ".satfinite" if saturates else ""
    run(
        "mov.b32 %r1, 0x01010101; mov.b32 %r2, 0x7fffffff;"
        f"mma.sync.aligned.m16n8k32.row.col{mode}.s32.s8.s8.s32 {{%r3, %r4, %r5, %r6}}, {{%r1, %r1, %r1, %r1}}, {{%r1, %r1}}, {{%r2, %r2, %r2, %r2}};"
        "mad.wide.u32 %d1, %r70, 4, %d30; st.global.b32 [%d1], %r3;",
        out,
    )  # fmt: skip
    assert (out == (2**31 - 1 if saturates else -(2**31) + 31)).all()


@pytest.mark.parametrize("shape", ["m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16"])
def test_mma_f64(shape: str) -> None:
    """One element a register: a[i] is row g + 8 (i mod m / 8), column t + 4 (i div m / 8)."""
    m, n, k = int(shape[1 : shape.index("n")]), 8, int(shape.split("k")[1])
    (a, va), (b, vb), (c, vc) = operand("f64", m, k, 1), operand("f64", n, k, 2), operand("f64", m, n, 3)
    half = m // 8
    ra = np.array(
        [[a[q // 4 + 8 * (i % half), q % 4 + 4 * (i // half)] for i in range(m * k // 32)] for q in range(32)]
    )
    rb = np.array([[b[q // 4, q % 4 + 4 * i] for i in range(k // 4)] for q in range(32)])
    rc = np.array([[c[q // 4 + 8 * (i // 2), 2 * (q % 4) + i % 2] for i in range(m // 4)] for q in range(32)])
    out = np.zeros_like(rc)
    body = ""
    for base, first, rows in ((30, 1, ra), (31, 10, rb), (32, 20, rc)):
        body += f"mad.wide.u32 %d29, %r70, {8 * rows.shape[1]}, %d{base};"
        body += "".join(f"ld.global.b64 %d{first + i}, [%d29 + {8 * i}];" for i in range(rows.shape[1]))
    names = [
        "{" + ", ".join(f"%d{first + i}" for i in range(rows.shape[1])) + "}"
        for first, rows in ((1, ra), (10, rb), (20, rc))
    ]
    body += f"mma.sync.aligned.{shape}.row.col.f64.f64.f64.f64 {names[2]}, {', '.join(names)}; mad.wide.u32 %d29, %r70, {8 * rc.shape[1]}, %d33;"
    run(body + "".join(f"st.global.b64 [%d29 + {8 * i}], %d{20 + i};" for i in range(rc.shape[1])), ra, rb, rc, out)
    got = np.zeros((m, n))
    for q in range(32):
        for i in range(m // 4):
            got[q // 4 + 8 * (i // 2), 2 * (q % 4) + i % 2] = out[q, i]
    assert np.allclose(got, va @ vb.T + vc, rtol=0, atol=64 * 2.0**-53)


@pytest.mark.parametrize("many", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(many: int, trans: str) -> None:
    """Row r of matrix i lies at the address of lane 8 i + r; lane 4 g + t gets elements 2 t, 2 t + 1 of row g."""
    source = np.random.default_rng(0).integers(0, 65536, (many, 8, 8), dtype=np.uint16)
    fragments, back = np.zeros((32, many), np.uint32), np.zeros((many, 8, 8), np.uint16)
    registers = "{" + ", ".join(f"%r{i}" for i in range(1, many + 1)) + "}"
    row = f"setp.lt.u32 %p1, %r70, {8 * many}; mul.lo.u32 %r60, %r70, 16; rem.u32 %r60, %r60, {128 * many}; cvt.u64.u32 %d9, %r60;"
    run(
        f"{row} add.s64 %d1, %d30, %d9; ld.global.v2.b64 {{%d5, %d6}}, [%d1]; @%p1 st.shared.v2.b64 [%r60], {{%d5, %d6}};"
        f"ldmatrix.sync.aligned.m8n8.x{many}{trans}.shared.b16 {registers}, [%r60]; mad.wide.u32 %d2, %r70, {4 * many}, %d31;"
        + "".join(f"st.global.b32 [%d2 + {4 * i}], %r{i + 1};" for i in range(many))
        + f"stmatrix.sync.aligned.m8n8.x{many}{trans}.shared.b16 [%r60], {registers}; add.s64 %d3, %d32, %d9;"
        "ld.shared.v2.b64 {%d5, %d6}, [%r60]; st.global.v2.b64 [%d3], {%d5, %d6};",
        source, fragments, back, shared=512,
    )  # fmt: skip
    rows = source.transpose(0, 2, 1) if trans else source
    for lane in range(32):
        for i in range(many):
            assert (
                fragments[lane, i : i + 1].view(np.uint16).tolist() == rows[i, lane // 4, 2 * (lane % 4) :][:2].tolist()
            )
    assert np.array_equal(back, source)


# ---------------------------------------------------------------- wgmma


def swizzled(matrix: np.ndarray, width: int) -> np.ndarray:
    """K-major rows of `width` bytes, 8 rows an atom: bits 4 to 6 of the address are xored with bits 7 to 9."""
    octets = np.ascontiguousarray(matrix).view(np.uint8)
    assert octets.shape[1] == width
    out = np.zeros(octets.size, np.uint8)
    for r in range(octets.shape[0]):
        for byte in range(width):
            linear = r * width + byte
            out[linear ^ ((linear >> 7 & (width // 16 - 1)) << 4)] = octets[r, byte]
    return out


FILL = """
mul.lo.u32 %r1, %r70, 16;
$FILL: cvt.u64.u32 %d1, %r1; add.s64 %d2, %d30, %d1; ld.global.v2.b64 {%d5, %d6}, [%d2];
st.shared.v2.b64 [%r1], {%d5, %d6}; add.s32 %r1, %r1, 2048; setp.lt.u32 %p1, %r1, SIZE; @%p1 bra $FILL;
"""
ENTER = "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"
LEAVE = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
STORE = "mad.wide.u32 %d7, %r70, 16, %d31; st.global.v4.b32 [%d7], {%r10, %r11, %r12, %r13};"


def descriptor(start: int, width: int, leading: int = 16, mode: int | None = None) -> int:
    code = {128: 1, 64: 2, 32: 3}[width] if mode is None else mode
    return start >> 4 | leading >> 4 << 16 | (8 * width) >> 4 << 32 | code << 62


def wgmma_body(
    kind: str, width: int, accumulator: str = "f32", steps: int = 1, order: str = FILL + "ENTER MMA LEAVE STORE"
) -> tuple[str, np.ndarray, np.ndarray]:
    """A [64, K] in atoms from byte 0, B [8, K] behind it; K is as many elements as a swizzled row has."""
    a, va = operand(kind, 64, width // BYTES[kind], 1)
    b, vb = operand(kind, 8, width // BYTES[kind], 2)
    memory = np.concatenate([swizzled(a, width), swizzled(b, width)])
    mma = ""
    immediate = "" if accumulator == "s32" else ", 1, 1" + (", 0, 0" if BYTES[kind] == 2 else "")
    for step in range(width // 32):
        left, right = descriptor(32 * step, width), descriptor(64 * width + 32 * step, width)
        mma += f"mov.b64 %d10, {left}; mov.b64 %d11, {right};"
        mma += f"wgmma.mma_async.sync.aligned.m64n8k{32 // BYTES[kind]}.{accumulator}.{kind}.{kind} {{%r10, %r11, %r12, %r13}}, %d10, %d11, {int(step > 0)}{immediate};"
    body = order.replace("SIZE", str(memory.size)).replace("ENTER", ENTER).replace("MMA", mma)
    return body.replace("LEAVE", LEAVE).replace("STORE", STORE), memory, va @ vb.T


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize(
    ("kind", "accumulator"), [("f16", "f32"), ("bf16", "f32"), ("tf32", "f32"), ("s8", "s32"), ("u8", "s32")]
)
def test_wgmma(kind: str, accumulator: str, width: int) -> None:
    body, memory, expected = wgmma_body(kind, width, accumulator)
    out = np.zeros((128, 4), np.uint32)
    counters = run(body, memory, out, threads=128, shared=memory.size)
    got = np.zeros((64, 8))
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(4):
            value = out[thread, i : i + 1].view(np.int32 if accumulator == "s32" else np.float32)[0]
            got[16 * warp + lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] = value
    bound = 0 if accumulator == "s32" else width // 32 * 2.0**-24 * np.abs(expected).max()  # one rounding a step
    assert np.abs(got - expected).max() <= bound
    assert counters.tensor_core_ops == {f"wgmma {kind}": width // 32}
    assert counters.tensor_core_flops == 2 * 64 * 8 * width // BYTES[kind]


WGMMA_MISTAKES = [
    ("no wait", FILL + "ENTER MMA STORE", InFlightError, "reads register %r10 of a wgmma that has not been waited for"),
    ("no commit", FILL + "ENTER MMA wgmma.wait_group.sync.aligned 0; STORE", InFlightError, "of a wgmma that has not been waited for"),
    ("waits too little", FILL + "ENTER MMA wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1; STORE", InFlightError, "of a wgmma"),
    ("no barrier", FILL + "fence.proxy.async; wgmma.fence.sync.aligned; MMA LEAVE STORE", RaceError, "a tensor core reads the 16 bytes at 2048 of shared memory: written since the last barrier"),
    ("no proxy fence", FILL + "bar.sync 0; wgmma.fence.sync.aligned; MMA LEAVE STORE", UnsynchronisedError, "written with no fence.proxy.async since"),
    ("no fence", FILL + "fence.proxy.async; bar.sync 0; mov.u32 %r10, 0; MMA LEAVE STORE", UnsynchronisedError, "register %r10 was written with no wgmma.fence since"),
    ("accumulator written", FILL + "mov.u32 %r10, 0; ENTER mov.u32 %r10, 1; MMA LEAVE STORE", UnsynchronisedError, "register %r10 was written"),
    ("operand overwritten", FILL + "ENTER MMA " + FILL.replace("$FILL", "$MORE") + "LEAVE STORE", InFlightError, "writes byte 0 of shared memory: a tensor-core product that reads it has not been waited for"),
    ("overwritten after wait, no barrier", FILL + "ENTER MMA LEAVE STORE" + FILL.replace("$FILL", "$MORE"), RaceError, "read by several warps since the last barrier"),
    ("nothing there", "wgmma.fence.sync.aligned; MMA LEAVE STORE", UninitialisedError, "nothing was written there"),
    ("result overwritten", FILL + "ENTER MMA mov.u32 %r11, 0; LEAVE STORE", InFlightError, "writes register %r11 of a wgmma"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("order", "kind", "message"), [m[1:] for m in WGMMA_MISTAKES], ids=[m[0] for m in WGMMA_MISTAKES]
)
def test_wgmma_misused(order: str, kind: type[Exception], message: str) -> None:
    body, memory, _ = wgmma_body("bf16", 32, order=order)
    with pytest.raises(kind, match=message.replace("(", r"\(")):
        run(body, memory, np.zeros((128, 4), np.uint32), threads=128, shared=memory.size)


def test_a_descriptor_without_swizzle_is_refused() -> None:
    body, memory, _ = wgmma_body("bf16", 32)
    plain = body.replace(str(descriptor(0, 32)), str(descriptor(0, 32, mode=0)))
    with pytest.raises(NotImplementedError, match="a layout without swizzle"):
        run(plain, memory, np.zeros((128, 4), np.uint32), threads=128, shared=memory.size)


# ---------------------------------------------------------------- tcgen05

SETUP = """
setp.lt.u32 %p5, %r70, 32; setp.eq.u32 %p6, %r70, 0; mov.u32 %r50, MBARRIER; mov.u32 %r51, SLOT;
@%p5 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r51], 32;
@%p6 mbarrier.init.shared::cta.b64 [%r50], 1;
bar.sync 0; ld.shared.b32 %r52, [%r51]; shr.u32 %r53, %r70, 5; shl.b32 %r53, %r53, 21; add.s32 %r54, %r52, %r53;
"""
WAIT = "$W: mbarrier.try_wait.parity.shared::cta.b64 %p7, [%r50], 0; @!%p7 bra $W;"
COMMIT = "@%p6 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r50];"
READ = "tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r10, %r11, %r12, %r13}, [%r54]; WAITLD"
WAIT_LD = "tcgen05.wait::ld.sync.aligned;"
FREE = "bar.sync 0; @%p5 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r52, 32;"
RIGHT = SETUP + FILL + "fence.proxy.async; bar.sync 0; MMA" + COMMIT + WAIT + READ + STORE + FREE


def tcgen05_body(kind: str, order: str = RIGHT) -> tuple[str, np.ndarray, np.ndarray]:
    """D [128, 8] = A [128, K] B [8, K], of which the first four columns are read."""
    width = 128
    a, va = operand(kind, 128, width // BYTES[kind], 1)
    b, vb = operand(kind, 8, width // BYTES[kind], 2)
    memory = np.concatenate([swizzled(a, width), swizzled(b, width)])
    formats = {"f16": (1, 0, "f16"), "bf16": (1, 1, "f16"), "tf32": (1, 2, "tf32"), "s8": (2, 1, "i8")}[kind]
    shape = formats[0] << 4 | formats[1] << 7 | formats[1] << 10 | 8 >> 3 << 17 | 128 >> 4 << 24
    mma = f"mov.u32 %r55, {shape}; setp.ne.u32 %p8, %r55, %r55; setp.eq.u32 %p9, %r55, %r55;"
    for step in range(width // 32):
        words = [
            d & ~(3 << 62) | 2 << 61 for d in (descriptor(32 * step, width), descriptor(128 * width + 32 * step, width))
        ]
        mma += f"mov.b64 %d10, {words[0]}; mov.b64 %d11, {words[1]};"
        mma += f"@%p6 tcgen05.mma.cta_group::1.kind::{formats[2]} [%r52 + 0], %d10, %d11, %r55, {'%p9' if step else '%p8'};"
    body = order.replace("MMA", mma).replace("SIZE", str(memory.size)).replace("MBARRIER", str(memory.size))
    return body.replace("SLOT", str(memory.size + 8)).replace("WAITLD", WAIT_LD), memory, (va @ vb.T)[:, :4]


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32", "s8"])
def test_tcgen05(kind: str) -> None:
    body, memory, expected = tcgen05_body(kind)
    out = np.zeros((128, 4), np.int32 if kind == "s8" else np.float32)
    counters = run(body, memory, out, threads=128, shared=memory.size + 16)
    assert np.abs(out - expected).max() <= (0 if kind == "s8" else 4 * 2.0**-24 * np.abs(expected).max() * 2)
    assert counters.tensor_core_ops == {f"tcgen05.mma {kind}": 4}


TCGEN05_MISTAKES = [
    ("no wait", RIGHT.replace(WAIT, ""), InFlightError, "reads tensor memory at row 0, column 480: a product that writes it"),
    ("no wait::ld", RIGHT.replace("WAITLD", ""), InFlightError, "reads register %r10 of a tcgen05.ld that has not been waited for"),
    ("no commit", RIGHT.replace(COMMIT, ""), UnsynchronisedError, "waits for an mbarrier phase that nothing completes"),
    ("no proxy fence", RIGHT.replace("fence.proxy.async; ", ""), UnsynchronisedError, "with no fence.proxy.async since"),
    ("no barrier", RIGHT.replace("fence.proxy.async; bar.sync 0;", "fence.proxy.async;"), RaceError, "written since the last barrier"),
    ("one look is no wait", RIGHT.replace("@!%p7 bra $W;", ""), InFlightError, "reads tensor memory at row 0, column 480: a product"),
    ("freed while others read", RIGHT.replace(FREE, FREE.replace("bar.sync 0;", "")), RaceError, "frees tensor memory that another warp used since the last barrier"),
    ("not freed", RIGHT.replace(FREE, ""), Exception, "the kernel ends with tensor memory allocated"),
    ("operand overwritten", RIGHT.replace(WAIT, FILL.replace("$FILL", "$MORE") + WAIT), InFlightError, "a tensor-core product that reads it has not been waited for"),
    ("address not waited for", RIGHT.replace("bar.sync 0; ld.shared.b32 %r52", "ld.shared.b32 %r52"), RaceError, "written by warp 0 since the last barrier"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("order", "kind", "message"), [m[1:] for m in TCGEN05_MISTAKES], ids=[m[0] for m in TCGEN05_MISTAKES]
)
def test_tcgen05_misused(order: str, kind: type[Exception], message: str) -> None:
    body, memory, _ = tcgen05_body("bf16", order)
    with pytest.raises(kind, match=message):
        run(body, memory, np.zeros((128, 4), np.float32), threads=128, shared=memory.size + 16)
