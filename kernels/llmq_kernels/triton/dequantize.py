"""Device code that turns packed units of eight codes into numbers: the one piece that every
floating-point kernel shares.

A unit is eight codes of one plane: 32, 16 or 8 bits (planes of 4, 2 and 1 bits; see
`triton/layout`). Whatever its width, four codes lie in its lower and four in its upper half. Moving
the upper half to bit 16 gives a word from which `(word >> BITS * t) & mask` takes two codes at
once, one in each 16-bit half, where `mask` is for instance 0x000F000F. That pair becomes two
numbers without a conversion: 0x4300 | q is the bfloat16 number 128 + q, and 0x6400 | q the float16
number 1024 + q, so one `lop3` (and, then or) and one packed `fma` that subtracts 128 + zero make
two exact numbers `q - zero`. `sub.bf16x2` would need sm_90; the fma runs on every chip from sm_80.

A code of two planes is `low + 2^b high`, and so is its zero point: each plane is shifted by its own
part of the zero point, the upper one with an exponent that is b larger, and the two are added. All
intermediate numbers are integers below 2^8 (bfloat16) or 2^11 (float16), so nothing is rounded.
Scales are applied later, in float32, or here: `scaled_values` multiplies a number by its scale and
rounds once. In bfloat16, a scale is the sum of two numbers to 2^-17 of it (a float16 scale
exactly), and `fma(q, high, q * low)` is the product, rounded, to another 2^-17.

Beside the inline PTX stands the same in plain Triton, for AMD and for the interpreter, which has no
inline assembly.

The order of the codes (also in `triton/layout`) makes the eight numbers of a unit those that one
thread of a tensor-core instruction holds. So the values stay in registers from load to
multiplication. The road not taken: `load(words + k // 8) >> (k % 8 * 4)` is shorter, loads each
word eight times, and its result goes through shared memory."""

import triton
import triton.language as tl


@triton.constexpr_function
def _magic(is_bf16, bits=0):
    """Bits of the number 2^bits * 128 (bfloat16) or 2^bits * 1024 (float16), whose lowest mantissa
    bits are free for a code."""
    return 0x4300 + (bits << 7) if is_bf16 else 0x6400 + (bits << 10)


@triton.constexpr_function
def _assembly(is_bf16, low_bits, high_bits, scaled):
    """PTX with operands: $0..$7 numbers, then inputs: $8, $9 the low plane's word and its shift,
    $10, $11 the same of the high plane, $12, $13 the high and the low part of the scale, each twice
    in a word. What is not needed is not read."""
    kind = "bf16x2" if is_bf16 else "f16x2"
    magic = 0x10001 * (0x4300 if is_bf16 else 0x6400)
    one = 0x10001 * (0x3F80 if is_bf16 else 0x3C00)
    weight = 0x10001 * (0x3F80 + (low_bits << 7) if is_bf16 else 0x3C00 + (low_bits << 10))
    lines = [
        f"{{ .reg .b32 a, b, one, weight, nought; mov.b32 one, {one:#x}; "
        f"mov.b32 weight, {weight:#x}; mov.b32 nought, 0x80008000;"
    ]
    for t in range(4):
        lines.append(
            f"shr.u32 a, $8, {low_bits * t}; lop3.b32 a, a, {0x10001 * ((1 << low_bits) - 1):#x}, "
            f"{magic:#x}, 0xEA; fma.rn.{kind} a, a, one, $9;"
        )
        if high_bits:
            lines.append(
                f"shr.u32 b, $10, {high_bits * t}; lop3.b32 b, b, "
                f"{0x10001 * ((1 << high_bits) - 1):#x}, {magic:#x}, 0xEA; fma.rn.{kind} b, b, "
                "weight, $11;"
            )
            lines.append(f"fma.rn.{kind} a, b, one, a;")
        if scaled:
            if is_bf16:
                lines.append(f"fma.rn.{kind} b, a, $13, nought;")
            addend = "b" if is_bf16 else "nought"
            lines.append(f"fma.rn.{kind} a, a, $12, {addend};")
        lines.append(f"mov.b32 {{${2 * t}, ${2 * t + 1}}}, a;")
    return " ".join(lines) + " }"


@triton.jit
def _halves(unit, BITS: tl.constexpr):
    """The unit as int32 with its upper four codes moved to bit 16. Leftovers of the move lie
    outside of every mask."""
    word = unit.to(tl.int32)
    if BITS == 2:
        word = word | (word << 8)
    elif BITS == 1:
        word = word | (word << 12)
    return word


@triton.jit
def _code(
    word, high, t: tl.constexpr, half: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr
):
    code = (word >> (16 * half + LOW_BITS * t)) & ((1 << LOW_BITS) - 1)
    if HIGH_BITS > 0:
        code |= ((high >> (16 * half + HIGH_BITS * t)) & ((1 << HIGH_BITS) - 1)) << LOW_BITS
    return code


@triton.jit
def _pairs(numbers, DTYPE: tl.constexpr):
    """int32 words with the numbers, which are exact or rounded to DTYPE, in both halves."""
    bits = numbers.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (bits * 0x10001).to(tl.int32, bitcast=True)


@triton.jit
def _plain(
    word,
    high,
    zero,
    factor,
    t: tl.constexpr,
    half: tl.constexpr,
    DTYPE: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    SCALED: tl.constexpr,
):
    number = (_code(word, high, t, half, LOW_BITS, HIGH_BITS) - zero).to(tl.float32)
    if SCALED:
        number *= factor
    return number.to(DTYPE)


@triton.jit
def _eight_numbers(
    unit,
    high_unit,
    zero,
    factor,
    DTYPE: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    SCALED: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Eight tensors `[R, U]` in DTYPE with the numbers `code - zero` of units `[R, U]`, in the
    order of the unit: lower half, upper half of pair 0, of pair 1, 2, 3.

    high_unit: the units of the second plane, not read when HIGH_BITS is 0. zero: int32,
    broadcastable to `[R, U]`. factor: float32 of the same shape, multiplied in where SCALED; a
    float16 number where DTYPE is float16."""
    word = _halves(unit, LOW_BITS)
    high = _halves(high_unit, HIGH_BITS)
    if USE_ASM:
        is_bf16: tl.constexpr = DTYPE == tl.bfloat16
        shift = ((zero & ((1 << LOW_BITS) - 1)) | (_magic(is_bf16) | 0x8000)) * 0x10001
        high_shift = ((zero >> LOW_BITS) | (_magic(is_bf16, LOW_BITS) | 0x8000)) * 0x10001
        upper, lower = shift, shift
        if SCALED:
            upper = _pairs(factor, DTYPE)
            lower = _pairs(factor - factor.to(DTYPE).to(tl.float32), DTYPE)
        a0, b0, a1, b1, a2, b2, a3, b3 = tl.inline_asm_elementwise(
            _assembly(is_bf16, LOW_BITS, HIGH_BITS, SCALED),
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r",
            [word, shift, high, high_shift, upper, lower],
            (tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
        a0, b0, a1, b1 = (
            a0.to(DTYPE, bitcast=True),
            b0.to(DTYPE, bitcast=True),
            a1.to(DTYPE, bitcast=True),
            b1.to(DTYPE, bitcast=True),
        )
        a2, b2, a3, b3 = (
            a2.to(DTYPE, bitcast=True),
            b2.to(DTYPE, bitcast=True),
            a3.to(DTYPE, bitcast=True),
            b3.to(DTYPE, bitcast=True),
        )
    else:
        a0 = _plain(word, high, zero, factor, 0, 0, DTYPE, LOW_BITS, HIGH_BITS, SCALED)
        b0 = _plain(word, high, zero, factor, 0, 1, DTYPE, LOW_BITS, HIGH_BITS, SCALED)
        a1 = _plain(word, high, zero, factor, 1, 0, DTYPE, LOW_BITS, HIGH_BITS, SCALED)
        b1 = _plain(word, high, zero, factor, 1, 1, DTYPE, LOW_BITS, HIGH_BITS, SCALED)
        a2 = _plain(word, high, zero, factor, 2, 0, DTYPE, LOW_BITS, HIGH_BITS, SCALED)
        b2 = _plain(word, high, zero, factor, 2, 1, DTYPE, LOW_BITS, HIGH_BITS, SCALED)
        a3 = _plain(word, high, zero, factor, 3, 0, DTYPE, LOW_BITS, HIGH_BITS, SCALED)
        b3 = _plain(word, high, zero, factor, 3, 1, DTYPE, LOW_BITS, HIGH_BITS, SCALED)
    return a0, b0, a1, b1, a2, b2, a3, b3


@triton.jit
def _joined(numbers):
    """Eight tensors `[R, U]` as one, `[R, U, 8]`: index 4 * (pair >> 1) + 2 * (pair & 1) + half. A
    join stays in the registers of a thread."""
    a0, b0, a1, b1, a2, b2, a3, b3 = numbers
    joined = tl.join(
        tl.join(tl.join(a0, a2), tl.join(a1, a3)), tl.join(tl.join(b0, b2), tl.join(b1, b3))
    )  # the last join is the lowest bit
    return joined.reshape(a0.shape[0], a0.shape[1], 8)


@triton.jit
def _in_order(numbers):
    """Eight tensors `[R, U]` in the order of the columns, `[R, 8 U]`, U a multiple of 4."""
    rows: tl.constexpr = numbers[0].shape[0]
    units: tl.constexpr = numbers[0].shape[1]
    # Column in its block of 32: 16 * (pair >> 1) + 8 * (pair & 1) + 2 * (unit in block) + half.
    return (
        _joined(numbers)
        .reshape(rows, units // 4, 4, 4, 2)
        .permute(0, 1, 3, 2, 4)
        .reshape(rows, units * 8)
    )


@triton.jit
def unit_numbers(
    unit,
    high_unit,
    zero,
    DTYPE: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """The numbers `code - zero` of units `[R, U]` as they are stored, `[R, U, 8]`."""
    return _joined(
        _eight_numbers(unit, high_unit, zero, 1.0, DTYPE, LOW_BITS, HIGH_BITS, False, USE_ASM)
    )


@triton.jit
def unit_values(
    unit,
    high_unit,
    zero,
    DTYPE: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """The same numbers in the order of the columns, `[R, 8 U]`, U a multiple of 4."""
    return _in_order(
        _eight_numbers(unit, high_unit, zero, 1.0, DTYPE, LOW_BITS, HIGH_BITS, False, USE_ASM)
    )


@triton.jit
def scaled_values(
    unit,
    high_unit,
    zero,
    factor,
    DTYPE: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """`factor * (code - zero)`, rounded once to DTYPE, in the order of the columns. factor: float32
    `[R, 1]`, a float16 number where DTYPE is float16."""
    return _in_order(
        _eight_numbers(unit, high_unit, zero, factor, DTYPE, LOW_BITS, HIGH_BITS, True, USE_ASM)
    )


@triton.jit
def plane_pointer(packed, row_words, rows, word_offset, BITS: tl.constexpr):
    """Pointers `[R, 1]` to the first unit of each row in a plane that starts `word_offset` words
    into the row."""
    base = packed + rows[:, None].to(tl.int64) * row_words + word_offset
    if BITS == 4:
        return base
    elif BITS == 2:
        return base.to(tl.pointer_type(tl.uint16), bitcast=True)
    else:
        return base.to(tl.pointer_type(tl.uint8), bitcast=True)
