"""The kernels that llmq compiles for the CPU.

Bit equality, not tolerances: scales are powers of two and activations are integers whose largest in
each group is 127, so their scale is 1 and every product and sum of the kernels is an integer times
a power of two below 2^24. Whatever the order of additions, float32 is exact then, and the result
has to be equal to integer arithmetic. Tests with arbitrary scales follow, with a tolerance from the
number of groups."""

import dataclasses
import os
import re

import pytest
import torch
from packed_weights import make_weight, relative_error

from llmq_kernels import BACKENDS, CODES, PackedWeight, PreparedWeight, pack, select_backend, unpack
from llmq_kernels.compiled import bf16_backends, int8_backend, jit, threads
from llmq_kernels.compiled.layout import Layout, arrange, restore_codes
from llmq_kernels.compiled.prepared import prepare, restore
from llmq_kernels.core.reference import (
    EXACT_COLUMNS,
    activation_group,
    fake_quantize_groups,
    fake_quantize_static,
    fake_quantize_tokens,
    quantize_groups,
    quantize_tokens,
)

CPU = torch.device("cpu")
BY_NAME = {backend.name: backend for backend in BACKENDS}
FORMS = ("avx512vnni", "avxvnni", "avx2")
# code, columns per group (None: one scale per row), rows, columns, zero points. Rows and columns
# that fill neither bands nor blocks; as few kernels as cover all of their parts.
CASES = [
    ("int4", 128, 80, 512, False),
    ("int4", 96, 37, 192, True),
    ("int3", 64, 33, 300, True),
    ("int3", 128, 16, 512, False),
    ("ternary", None, 40, 330, False),
    ("int8", None, 37, 300, False),
]
IDS = [
    f"{code}-{group}-{'asymmetric' if asymmetric else 'symmetric'}"
    for code, group, _, _, asymmetric in CASES
]


def need(form):
    if reason := jit.missing():
        pytest.skip(reason)
    if not jit.supports(form):
        pytest.skip(f"this CPU or system cannot run {form}")


def power_of_two_weight(code_name, group, n, k, asymmetric, activations="none"):
    code = CODES[code_name]
    n_groups = -(-k // (group or k))
    codes = torch.randint(0, code.levels, (n, k), dtype=torch.uint8)
    scale = 2.0 ** -torch.randint(3, 6, (n, n_groups)).half()
    zero = torch.randint(0, code.levels, (n, n_groups), dtype=torch.uint8) if asymmetric else None
    return PackedWeight(
        pack(codes, code.bits), scale, zero, None, code, group or k, (n, k), activations
    )


def integers(m, k, group, largest):
    """float32 integers with the largest magnitude in the first column of each group."""
    x = torch.randint(-largest, largest + 1, (m, k)).float()
    x[:, ::group] = largest * torch.where(torch.rand(m, -(-k // group)) < 0.5, -1.0, 1.0)
    return x


def group_of(weight):
    return activation_group(
        weight.code.bits, weight.group_size if weight.scale.shape[1] > 1 else weight.shape[1]
    )


# --- layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 256), (33, 257), (70, 511)])
def test_layout_is_inverted_exactly(bits, n, k):
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    stored = arrange(codes, bits)
    layout = Layout(bits, n, k)
    assert stored.shape == (layout.n_bands, layout.n_blocks, layout.block_bytes)
    assert torch.equal(restore_codes(stored, bits, n, k), codes)


@pytest.mark.parametrize(
    ("code", "group", "n", "k", "asymmetric"),
    [*CASES, ("int4", 0, 20, 100, True), ("ternary", 0, 20, 100, False)],
)
def test_canonical_words_come_back(code, group, n, k, asymmetric):
    weight = make_weight(code, -1 if group is None else group, n, k, asymmetric=asymmetric)
    assert torch.equal(restore(weight, prepare(weight, torch.bfloat16)), weight.packed)


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_integer_kernels_are_exact(case, form):
    need(form)
    for activations in ("int8-group", "int8-token"):
        weight = power_of_two_weight(*case, activations)
        state = prepare(weight, torch.float32)
        for m in (1, 6):  # more tokens than the register block holds, and not a multiple
            x = integers(m, weight.shape[1], group_of(weight), 127)
            expected = x.double() @ weight.dequantize().double().T
            assert torch.equal(
                int8_backend.product(x, weight, state, form, unit="rows").double(), expected
            ), (activations, m)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize(("form", "unit"), [("amx", "amx"), ("avx512vnni", "avx512")])
def test_integer_tiles_are_exact(form, unit, case):
    need(form)
    for activations in ("int8-group", "int8-token"):
        weight = power_of_two_weight(*case, activations)
        if group_of(weight) < 64:
            continue  # the vector kernels do these
        state = prepare(weight, torch.float32)
        for m in (
            1,
            49,
            70,
            # one token tile, two pairs of which the last is half filled, and more than a kernel
            # without a tile unit takes at a time
        ):
            x = integers(m, weight.shape[1], group_of(weight), 127)
            expected = x.double() @ weight.dequantize().double().T
            assert torch.equal(
                int8_backend.product(x, weight, state, "avx512vnni", unit=unit).double(), expected
            ), (activations, m)


@pytest.mark.parametrize(
    "case", [*CASES, ("int2", 32, 40, 320, False)], ids=[*IDS, "int2-32-symmetric"]
)
@pytest.mark.parametrize(
    ("form", "linear"),
    [("amx", bf16_backends.amx_linear), ("avx512bf16", bf16_backends.avx512_linear)],
)
def test_bfloat16_kernels_are_exact(form, linear, case):
    need(form)
    weight = power_of_two_weight(*case)
    state = prepare(weight, torch.bfloat16)
    for m in (1, 2, 3, 7, 33, 70):
        x = integers(m, weight.shape[1], 32, 31)
        expected = (x.double() @ weight.dequantize().double().T).float().bfloat16()
        assert torch.equal(linear(x.bfloat16(), weight, state), expected), m


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_activations_are_quantized_as_the_reference_does(form, group):
    need(form)
    x = torch.randn(3, 512) * torch.logspace(-4, 4, 3)[:, None]
    x[1, :group] = 0
    codes, scale, total = int8_backend.quantize(x, group, group, form)
    expected_codes, expected_scale = quantize_groups(x, group)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(total, expected_codes.view(3, -1, group).sum(-1).float())


# --- any scales -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["int8-group", "int8-token"])
@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("group", [128, 0])
def test_any_scales(activations, m, group):
    """Each group adds at most three roundings to float32 (factor, product, sum), of 2^-24 each."""
    if reason := jit.missing():
        pytest.skip(reason)
    weight = make_weight("int4", group, 80, 512, asymmetric=not group, activations=activations)
    x = torch.randn(m, 512)
    prepared = PreparedWeight(weight, torch.float32, CPU)
    assert prepared.backend.name == "cpu-vnni"
    quantized = (
        fake_quantize_tokens(x) if activations == "int8-token" else fake_quantize_groups(x, 128)
    )
    assert (
        relative_error(prepared.linear(x), quantized.double() @ weight.dequantize().double().T)
        < 3 * 4 * 2.0**-24
    )
    assert torch.equal(prepared.canonical_packed(), weight.packed)
    # Quantization moves each activation by at most half a step.
    half_step = (
        quantize_tokens(x)[1]
        if activations == "int8-token"
        else quantize_groups(x, 128)[1].repeat_interleave(128, 1)
    ) / 2
    bound = half_step.double().expand_as(x) @ weight.dequantize().double().abs().T
    assert torch.all(
        (prepared.linear(x).double() - x.double() @ weight.dequantize().double().T).abs()
        <= bound * (1 + 1e-4)
    )


@pytest.mark.parametrize("unit", ["rows", "tiles"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_static_ranges(case, form, unit):
    """Codes of x down to -128, zero points of both sides and padded columns. Beyond the roundings
    of `test_any_scales` the shift adds two, of a term that may be as large as the result."""
    need(form)
    code, group, n, k, asymmetric = case
    weight = make_weight(
        code, -1 if group is None else group, n, k, asymmetric=asymmetric, activations="int8-static"
    )
    if unit == "tiles" and (form != "avx512vnni" or group_of(weight) < 64):
        pytest.skip("tiles are for one form, and groups of 64 columns and more")
    x = torch.randn(40, k)
    state = prepare(weight, torch.float32)
    out = (
        int8_backend.product(x, weight, state, form, unit="avx512" if unit == "tiles" else "rows")
        + state["shift"]
    )
    expected = fake_quantize_static(x, weight.input_range).double() @ weight.dequantize().double().T
    assert relative_error(out, expected) < (3 * 8 + 4) * 2.0**-24
    if form == int8_backend.widest_form():
        prepared = PreparedWeight(weight, torch.float32, CPU)
        assert prepared.backend.name == "cpu-vnni"
        assert relative_error(prepared.linear(x), expected) < (3 * 8 + 4) * 2.0**-24


def test_bias_and_leading_dimensions():
    need("avx512bf16")
    weight, bias, x = (
        make_weight("int4", 128, 64, 256),
        torch.randn(64),
        torch.randn(2, 3, 256).bfloat16(),
    )
    prepared = PreparedWeight(weight, torch.bfloat16, CPU)
    assert prepared.backend.name == ("cpu-amx" if jit.supports("amx") else "cpu-avx512")
    expected = x.double() @ weight.dequantize().double().T + bias.double()
    out = prepared.linear(x, bias)
    assert out.shape == (2, 3, 64)
    assert relative_error(out, expected) < 2 * 2.0**-8


def test_sums_of_very_long_rows_do_not_overflow():
    if reason := jit.missing() or int8_backend.machine_refusal():
        pytest.skip(reason)
    k = 2 * EXACT_COLUMNS
    weight = make_weight("int8", -1, 4, k, activations="int8-token")
    weight = dataclasses.replace(weight, packed=pack(torch.full((4, k), 255, dtype=torch.uint8), 8))
    out = int8_backend.product(
        torch.ones(1, k), weight, prepare(weight, torch.float32), int8_backend.widest_form()
    )
    assert relative_error(out, torch.ones(1, k).double() @ weight.dequantize().double().T) < 1e-4


# --- who is asked ---------------------------------------------------------------------------------


def test_sixteen_bit_activations_are_never_quantized():
    for code in CODES:
        weight = make_weight(code, 128, 64, 128)
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            assert "INT8 activations" in BY_NAME["cpu-vnni"].refusal(weight, dtype, CPU)
            assert select_backend(weight, dtype, CPU).name not in ("cpu-vnni", "cpu-w8a8")


def test_without_avx512_onednn_does_what_it_can(monkeypatch):
    weight = make_weight("int8", -1, 64, 128, activations="int8-token")
    if reason := jit.missing() or next(
        backend for backend in BACKENDS if backend.name == "cpu-w8a8"
    ).refusal(weight, torch.float32, CPU):
        pytest.skip(reason)
    supports = jit.supports
    monkeypatch.setattr(
        jit, "supports", lambda form: form not in ("amx", "avx512vnni") and supports(form)
    )
    assert select_backend(weight, torch.float32, CPU).name == "cpu-w8a8"
    assert (
        select_backend(
            dataclasses.replace(weight, activations="int8-group"), torch.float32, CPU
        ).name
        == "cpu-vnni"
    )


def test_refusals():
    weight = make_weight("int4", 128, 64, 128)
    assert "act-order" in BY_NAME["cpu-amx"].refusal(
        dataclasses.replace(weight, g_idx=torch.zeros(128, dtype=torch.int32)), torch.bfloat16, CPU
    )
    assert "multiples of 32" in BY_NAME["cpu-amx"].refusal(
        make_weight("int4", 40, 64, 120), torch.bfloat16, CPU
    )
    assert "float16" in BY_NAME["cpu-amx"].refusal(weight, torch.float16, CPU)
    assert "not on cuda" in BY_NAME["cpu-amx"].refusal(weight, torch.bfloat16, torch.device("cuda"))
    assert "zero points" in BY_NAME["cpu-amx"].refusal(
        make_weight("int8", 128, 64, 128, asymmetric=True), torch.bfloat16, CPU
    )


# --- compiling ------------------------------------------------------------------------------------

# form, module, parameters -> instructions that must and must not be there
ASSEMBLY = [
    ("avx512vnni", "vnni", ("avx512vnni", 4, 128, False, 8, True), ["vpdpbusd", "%zmm"], []),
    ("avxvnni", "vnni", ("avxvnni", 4, 128, False, 8, True), ["vpdpbusd", "%ymm"], ["%zmm"]),
    (
        "avx2",
        "vnni",
        ("avx2", 4, 128, False, 8, True),
        ["vpmaddubsw", "vpmaddwd", "%ymm"],
        ["vpdpbusd", "%zmm"],
    ),
    ("avx512vnni", "avx512_int8", (4, 128, False), ["vpdpbusd", "%zmm"], []),
    ("avx512bf16", "avx512", (4, 128, False, 8), ["vdpbf16ps", "{1to16}", "vpermw"], []),
    ("amx", "amx", (4, 128, False, 8), ["tdpbf16ps", "vpermw", "vcvtneps2bf16"], []),
    ("amx", "amx_int8", (4, 128, False), ["tdpbusd"], []),
]


@pytest.mark.parametrize(
    ("form", "module", "parameters", "present", "absent"),
    ASSEMBLY,
    ids=[f"{row[1]}-{row[0]}" for row in ASSEMBLY],
)
def test_every_form_compiles_whatever_this_cpu_is(form, module, parameters, present, absent):
    if reason := jit.missing():
        pytest.skip(reason)
    text = jit.assembly(jit.kernel_text(module, "gemm_kernel", *parameters), form)
    assert all(name in text for name in present)
    assert not [name for name in absent if name in text]
    assert set(re.findall(r"\$(\w+)@GOT\b", text)) <= {
        "memcpy",
        "memset",
    }  # all that would have to be linked


def test_any_number_and_kind_of_threads(monkeypatch):
    need("avx2")
    weight = make_weight("int4", 128, 300, 512, activations="int8-group")
    state, x, n_threads = (
        prepare(weight, torch.float32),
        torch.randn(6, 512),
        torch.get_num_threads(),
    )
    expected = int8_backend.product(x, weight, state, "avx2", unit="rows")
    try:
        torch.set_num_threads(3)
        assert torch.equal(int8_backend.product(x, weight, state, "avx2", unit="rows"), expected)
        monkeypatch.setattr(threads, "_gomp_parallel", lambda: None)
        jit.kernel.cache_clear()
        assert threads.threads_of() == "Python threads"
        assert torch.equal(int8_backend.product(x, weight, state, "avx2", unit="rows"), expected)
    finally:
        torch.set_num_threads(n_threads)
        jit.kernel.cache_clear()


def test_nothing_works_without_llvmlite_but_says_so(monkeypatch):
    monkeypatch.setattr(
        jit,
        "missing",
        lambda: "llvmlite is not installed (pip install '.[cpu]' in a clone of llmq)",
    )
    weight = make_weight("int4", 128, 64, 128)
    assert "'.[cpu]'" in BY_NAME["cpu-amx"].refusal(weight, torch.bfloat16, CPU)
    assert select_backend(weight, torch.bfloat16, CPU).name in ("cpu-int4", "reference")


def test_kernels_on_this_machine_are_used():
    """What doctor reports and what is selected agree."""
    weight = make_weight("int4", 128, 64, 128)
    expected = next(
        (
            name
            for form, name in (("amx", "cpu-amx"), ("avx512bf16", "cpu-avx512"))
            if jit.supports(form)
        ),
        "cpu-int4",
    )
    assert select_backend(weight, torch.bfloat16, CPU).name == expected
    assert os.environ.get("LLMQ_BACKEND") is None
    assert torch.equal(
        unpack(weight.packed, 4, 128),
        restore_codes(arrange(unpack(weight.packed, 4, 128), 4), 4, 64, 128),
    )
