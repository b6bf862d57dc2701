"""The default kernels of every chip, compiled for it without a GPU: they fit into its registers and
shared memory and use its tensor cores."""

import os
import re
import subprocess

import machine_code
import pytest

from llmq_kernels import CODES
from llmq_kernels.triton.choices import CHIPS, Choice, Problem, default_choice, shared_bytes
from llmq_kernels.triton.layout import PLANES

triton = pytest.importorskip("triton", reason="needs Triton (pip install '.[triton]')")
pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

POINTERS = {
    "packed": "i32",
    "zero": "u8",
    "codes": "i8",
    "sums": "i32",
    "x_sums": "i32",
    "x_scale": "fp32",
    "workspace": "fp32",
    "scale": "fp16",
    "distances": "i64",
    "source": "i64",
    "tiles": "i32",
}
MATRIX_INSTRUCTION = {
    "sm_80": "HMMA|IMMA",
    "sm_89": "HMMA|IMMA",
    "sm_90": "HGMMA|IGMMA",
    "sm_100": "UTC[A-Z]*MMA",
    "gfx942": "v_mfma",
}


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, chip, constants, warps, stages, **pointers):
    """A kernel as it is launched: pointers and sizes divisible by 16, M not."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    dtypes = POINTERS | {"x": "bf16", "out": "bf16", "bias": "bf16"} | pointers
    signature = {
        name: "constexpr" if name in constants else f"*{dtypes[name]}" if name in dtypes else "i32"
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in ("M", "n_experts", "size", "split_tiles")
    }
    target = (
        GPUTarget("hip", chip.arch, 64)
        if chip.is_amd
        else GPUTarget("cuda", int(chip.arch.removeprefix("sm_")), 32)
    )
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=target,
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )


def disassembled(binary, chip, tmp_path):
    if chip.is_amd:
        return binary.asm["amdgcn"]
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    return subprocess.run(
        [triton.knobs.nvidia.nvdisasm.path, "-c", path], check=True, capture_output=True, text=True
    ).stdout


def check_resources(binary, chip, tmp_path):
    """No spills to memory, shared memory within the chip's limit. Returns the machine code."""
    code = disassembled(binary, chip, tmp_path)
    assert binary.metadata.shared <= chip.shared_bytes
    if chip.is_amd:
        assert set(re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", code)) == {"0"}
    else:
        assert not re.search(r"\b(LDL|STL)\b", code)
    return code


def hold(name, text, bits, choice, chip, tmp_path):
    """Instructions and registers against the table, and wide loads. name: of the kernel and its
    case; text: its machine code."""
    if chip.is_amd:
        return
    words = choice.block_n * choice.block_k * bits // 32 // (32 * choice.warps)
    machine_code.hold(f"{name}, {chip.arch}", text, tmp_path / "kernel.cubin", words)
    assert machine_code.loads_wide(text)


def cases(*all_of_them, fast=()):
    """Parameters with every chip, all but the fast ones in the slow run."""
    return [
        pytest.param(*case, arch, marks=() if (*case, arch) in fast else pytest.mark.slow)
        for case in all_of_them
        for arch in CHIPS
    ]


def early(chip):
    """As on that chip: see `triton/gemm`."""
    return chip.arch in ("sm_90", "sm_100")


def float_constants(code, group, choice, chip, *, zero):
    low, *high = PLANES[CODES[code].bits]
    blocks = {
        "BLOCK_N": choice.block_n,
        "BLOCK_K": choice.block_k,
        "LOW_BITS": low,
        "HIGH_BITS": high[0] if high else 0,
    }
    return {
        "GROUP": group,
        "OFFSET": int(CODES[code].offset),
        "HAS_ZERO": zero,
        "HAS_BIAS": True,
        "USE_ASM": not chip.is_amd,
        "BLOCK_M": choice.block_m,
        **blocks,
    }


FLOAT = [
    ("int4", 128, False, 1, "bf16"),
    ("ternary", 128, False, 4, "fp16"),
    ("int4", 128, False, 16, "bf16"),
    ("int4", 64, True, 64, "fp16"),
    ("int4", 128, False, 128, "bf16"),
    ("ternary", 128, False, 64, "bf16"),
    ("int3", 128, True, 32, "bf16"),
    ("int8", 0, False, 16, "fp16"),
]
INT8 = [
    ("ternary", 0, False, 128),
    ("int4", 128, False, 8),
    ("int4", 128, False, 256),
    ("int4", 128, True, 256),
    ("int8", 0, True, 32),
]


@pytest.mark.parametrize(
    ("code", "group", "zero", "m", "dtype", "arch"),
    cases(*FLOAT, fast=[("int4", 128, False, 16, "bf16", "sm_90")]),
)
def test_float_kernels(code, group, zero, m, dtype, arch, tmp_path):
    from llmq_kernels.triton import gemm, gemv

    chip = CHIPS[arch]
    problem = Problem("float", CODES[code].bits, group, dtype, 4096, 4096, m)
    choice = default_choice(problem, chip)
    constants = float_constants(code, group, choice, chip, zero=zero)
    types = {"x": dtype, "out": dtype, "bias": dtype}
    name = f"{choice.method} {code} g{group}{' with zero points' if zero else ''}, {m} x {dtype}"
    if choice.method == "gemv":
        constants["EVEN_K"] = True
        text = check_resources(
            compiled(gemv.gemv_kernel, chip, constants, choice.warps, choice.stages, **types),
            chip,
            tmp_path,
        )
        hold(name, text, CODES[code].bits, choice, chip, tmp_path)
        return
    constants |= {"IS_SPLIT": choice.split_k > 1, "FOLD": choice.fold}
    constants |= {"EVEN_K": True, "EARLY": early(chip), "UPCAST": False}
    constants["SETTLE"] = chip.arch == "sm_90"
    if choice.split_k > 1:
        types["out"] = "fp32"
    if choice.fold:
        types["scale"] = "fp32"
    binary = compiled(
        gemm.gemm_kernel,
        chip,
        constants,
        choice.warps,
        choice.stages,
        **types,
    )
    text = check_tensor_cores(binary, chip, tmp_path)
    hold(name, text, CODES[code].bits, choice, chip, tmp_path)
    assert binary.metadata.shared <= shared_bytes(problem, choice)


def check_tensor_cores(binary, chip, tmp_path, *, in_registers=True, kind="float"):
    instruction = MATRIX_INSTRUCTION[chip.arch]
    if kind == "int8" and chip.arch == "sm_100":
        instruction += "|IMMA"  # Triton 3.6 has no fifth-generation products of integers
    text = check_resources(binary, chip, tmp_path)
    assert re.search(instruction, text)
    if chip.arch == "sm_90" and in_registers:
        # The weight is the left operand in registers: two lists in braces, the sums and the weight,
        # where a left operand from shared memory would be a descriptor.
        products = re.findall(r"wgmma\.mma_async\S* .*", binary.asm["ptx"])
        assert products
        assert all(line.count("{") == 2 for line in products)
        # The registers of the weight are free again where the next tile is unpacked into them.
        assert set(re.findall(r"wgmma\.wait_group\S* (\d+)", binary.asm["ptx"])) == {"0"}
    return text


@pytest.mark.parametrize(("code", "group", "zero", "m", "arch"), cases(*INT8))
def test_int8_kernels(code, group, zero, m, arch, tmp_path):
    from llmq_kernels.triton import int8

    chip = CHIPS[arch]
    bits = CODES[code].bits
    problem = Problem("int8", bits, group, "bfloat16", 4096, 4096, m)
    choice = default_choice(problem, chip)
    constants = {
        "GROUP": group,
        "OFFSET": int(CODES[code].offset),
        "HAS_ZERO": zero,
        "HAS_BIAS": False,
        "BITS": bits,
        "USE_ASM": not chip.is_amd,
        "IS_SPLIT": choice.split_k > 1,
        "EARLY": early(chip),
    }
    constants |= {"BLOCK_M": choice.block_m, "BLOCK_N": choice.block_n, "BLOCK_K": choice.block_k}
    binary = compiled(
        int8.int8_gemm_kernel,
        chip,
        constants,
        choice.warps,
        choice.stages,
        x="i8",
        **({"out": "fp32"} if choice.split_k > 1 else {}),
    )
    text = check_tensor_cores(
        binary, chip, tmp_path, in_registers=bits < 8, kind="int8"
    )  # INT8 codes need no unpacking and are multiplied where they arrive
    name = f"int8 {code} g{group}{' with zero points' if zero else ''}, {m}"
    hold(name, text, bits, choice, chip, tmp_path)
    assert binary.metadata.shared <= shared_bytes(problem, choice)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_small_kernels(arch, tmp_path):
    from llmq_kernels.triton import gemm, int8

    chip = CHIPS[arch]
    check_resources(
        compiled(
            gemm.reduce_kernel,
            chip,
            {"HAS_BIAS": True, "SPLIT_K": 8, "EARLY": early(chip), "BLOCK": 1024},
            4,
            3,
        ),
        chip,
        tmp_path,
    )
    check_resources(
        compiled(
            int8.quantize_tokens_kernel,
            chip,
            {
                "AT_ONCE": True,
                "HAS_SUMS": True,
                "SUM_COLUMNS": 128,
                "BLOCK_K": 16384,
                "EARLY": early(chip),
            },
            16,
            3,
        ),
        chip,
        tmp_path,
    )
    if chip.arch == "sm_90":
        check_resources(
            compiled(
                int8.quantize_static_kernel,
                chip,
                {"HAS_SUMS": True, "SUM_COLUMNS": 128, "BLOCK_K": 4096, "EARLY": True},
                8,
                3,
                input_range="fp32",
            ),
            chip,
            tmp_path,
        )
    constants = float_constants(
        "int4", 128, Choice("dequantize", block_n=64, block_k=128), chip, zero=True
    )
    del constants["HAS_BIAS"], constants["BLOCK_M"]
    check_resources(compiled(gemm.dequantize_kernel, chip, constants, 4, 3), chip, tmp_path)


@pytest.mark.parametrize(
    ("code", "group", "zero", "m", "dtype", "arch"),
    cases(
        ("int4", 128, False, 16, "bf16"),
        ("int4", 64, True, 64, "fp16"),
        ("int3", 128, True, 32, "bf16"),
        ("int8", 0, False, 16, "fp16"),
    ),
)
def test_experts_in_one_launch(code, group, zero, m, dtype, arch, tmp_path):
    from llmq_kernels.triton import experts
    from llmq_kernels.triton.grouped import choice_of

    chip, choice = CHIPS[arch], choice_of(group, m)
    constants = float_constants(code, group, choice, chip, zero=zero)
    constants |= {"EVEN_K": True, "SETTLE": chip.arch == "sm_90", "UPCAST": False}
    binary = compiled(
        experts.experts_kernel,
        chip,
        constants,
        choice.warps,
        choice.stages,
        x=dtype,
        out=dtype,
        bias=dtype,
    )
    text = check_resources(binary, chip, tmp_path)
    assert re.search(MATRIX_INSTRUCTION[arch], text)
    name = f"experts {code} g{group}{' with zero points' if zero else ''}, {m} x {dtype}"
    hold(name, text, CODES[code].bits, choice, chip, tmp_path)


@pytest.mark.parametrize(
    ("code", "group", "zero", "m", "dtype", "arch"),
    cases(("int4", 128, False, 16, "bf16"), ("int4", 64, True, 64, "fp16")),
)
def test_gated_experts_in_one_launch(code, group, zero, m, dtype, arch, tmp_path):
    from llmq_kernels.triton import experts
    from llmq_kernels.triton.grouped import choice_of

    chip, choice = CHIPS[arch], choice_of(group, m)
    constants = float_constants(code, group, choice, chip, zero=zero)
    constants |= {"EVEN_K": True, "SETTLE": chip.arch == "sm_90", "UPCAST": False, "IS_GELU": False}
    own = POINTERS | {"bias": dtype}
    dtypes = {f"gate_{name}": own[name] for name in ("packed", "scale", "zero", "bias")}
    dtypes |= {"x": dtype, "out": dtype, "bias": dtype, "gate_distances": "i64"}
    binary = compiled(
        *(experts.gated_kernel, chip, constants, choice.warps, choice.stages), **dtypes
    )
    text = check_resources(binary, chip, tmp_path)
    assert re.search(MATRIX_INSTRUCTION[arch], text)
