"""Every backend against float64 arithmetic on the dequantized weight, with a tolerance derived from
dtype and K, and back to the canonical words.

Tolerance. bfloat16 rounds to 8 bits: relative error of one rounding at most u = 2^-8, on average u
/ 4 or so. Backends round the scale (int4pack) or the weight (blocks) once and the output once;
per-weight roundings are independent and average out over K in the norm, so the relative error of
the whole output stays below 2u whatever K is; inputs are exact on both sides. The integer path is
exact but for float32 scaling and the final rounding to bfloat16."""

import dataclasses

import pytest
import torch
from packed_weights import make_weight, relative_error

from llmq_kernels import BACKENDS, CODES, PackedWeight, PreparedWeight, linear, pack, select_backend
from llmq_kernels.core.reference import fake_quantize_static, fake_quantize_tokens, quantize_tokens

U = 2.0**-8
BY_NAME = {backend.name: backend for backend in BACKENDS}
CPU = torch.device("cpu")


INT4_CASES = [
    ("int4", 128, 256, 512, False),
    ("int4", 128, 192, 256, True),
    ("int4", 64, 80, 256, False),
    ("int4", 64, 80, 256, True),
    ("int4", 32, 64, 64, True),
    ("int4", 96, 64, 192, True),
    ("int4", 256, 320, 256, False),
    ("int3", 128, 192, 256, False),
    ("int3", 64, 64, 256, True),
    ("int2", 64, 128, 128, False),
    ("int2", 64, 128, 128, True),
    ("ternary", 256, 64, 256, False),
]


@pytest.mark.parametrize("m", [1, 3, 48, 49, 130])
@pytest.mark.parametrize(("code", "group", "n", "k", "asymmetric"), INT4_CASES)
def test_int4_backend(code, group, n, k, asymmetric, m, monkeypatch):
    weight = make_weight(code, group, n, k, asymmetric=asymmetric)
    if reason := BY_NAME["cpu-int4"].refusal(weight, torch.bfloat16, CPU):
        pytest.skip(f"this machine: {reason}")
    monkeypatch.setenv("LLMQ_BACKEND", "cpu-int4")
    x = torch.randn(m, k).bfloat16()
    prepared = PreparedWeight(weight, torch.bfloat16, CPU)
    assert relative_error(prepared.linear(x), x.double() @ weight.dequantize().double().T) < 2 * U
    assert torch.equal(prepared.canonical_packed(), weight.packed)


@pytest.mark.parametrize("m", [1, 12, 13, 300])
@pytest.mark.parametrize(("n", "k"), [(96, 512), (77, 300)])
def test_int8_backend(n, k, m, monkeypatch):
    monkeypatch.setenv("LLMQ_BACKEND", "cpu-int8")
    weight = make_weight("int8", k, n, k)
    x = torch.randn(m, k).bfloat16()
    prepared = PreparedWeight(weight, torch.bfloat16, CPU)
    assert relative_error(prepared.linear(x), x.double() @ weight.dequantize().double().T) < 2 * U
    assert torch.equal(prepared.canonical_packed(), weight.packed)


@pytest.mark.parametrize("m", [1, 5, 64])
@pytest.mark.parametrize(("n", "k"), [(96, 512), (77, 300)])
def test_w8a8_backend_is_exact_up_to_float32_scaling(n, k, m, monkeypatch):
    weight = make_weight("int8", k, n, k, activations="int8-token")
    if reason := BY_NAME["cpu-w8a8"].refusal(weight, torch.float32, CPU):
        pytest.skip(f"this machine: {reason}")
    monkeypatch.setenv("LLMQ_BACKEND", "cpu-w8a8")
    x = torch.randn(m, k)
    prepared = PreparedWeight(weight, torch.float32, CPU)
    expected = fake_quantize_tokens(x).double() @ weight.dequantize().double().T
    assert relative_error(prepared.linear(x), expected) < 4 * 2.0**-24 * 3
    assert torch.equal(prepared.canonical_packed(), weight.packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("code", "group", "n", "k", "asymmetric"),
    [
        ("int3", 7, 5, 33, True),
        ("int8", 16, 9, 50, True),
        ("int4", 40, 11, 100, False),
        ("ternary", 8, 4, 20, False),
    ],
)
def test_reference_takes_every_shape(code, group, n, k, asymmetric, dtype):
    weight = make_weight(code, group, n, k, asymmetric=asymmetric)
    x, bias = torch.randn(2, 3, k).to(dtype), torch.randn(n)
    out = linear(x, weight, bias)
    expected = x.double() @ weight.dequantize().double().T + bias.double()
    assert out.shape == (2, 3, n)
    assert out.dtype == dtype
    # One rounding each of weight, product sum and bias; float32 also accumulates K of them.
    assert (
        relative_error(out, expected)
        < {torch.float32: k * 2.0**-24, torch.bfloat16: 2 * U, torch.float16: 2 * 2.0**-11}[dtype]
    )


def test_act_order_groups_are_gathered():
    weight = make_weight("int4", 32, 16, 64)
    g_idx = torch.randint(0, 2, (64,), dtype=torch.int32)
    shuffled = dataclasses.replace(weight, g_idx=g_idx)
    expected = weight.scale.float()[:, g_idx.long()]
    codes = weight.dequantize() / weight.scale.float().repeat_interleave(32, 1)
    assert torch.allclose(shuffled.dequantize(), codes.round() * expected)
    assert select_backend(shuffled, torch.bfloat16, CPU).name == "reference"


@pytest.mark.parametrize("code", ["int4", "int8"])
def test_gradient_with_respect_to_x(code):
    weight = make_weight(code, 128, 64, 128)
    x = torch.randn(3, 128).bfloat16().requires_grad_()
    linear(x, weight).float().sum().backward()
    expected = weight.dequantize().sum(0)
    assert relative_error(x.grad, expected.double().expand(3, -1)) < 2 * U


def test_token_quantization_round_trip():
    x = torch.randn(6, 100) * torch.logspace(-3, 3, 6)[:, None]
    codes, scale = quantize_tokens(x)
    assert codes.dtype == torch.uint8
    assert torch.all((fake_quantize_tokens(x) - x).abs() <= scale / 2 * (1 + 1e-5))


def test_override_is_honoured_or_refused(monkeypatch):
    weight = make_weight("int4", 128, 64, 128)
    monkeypatch.setenv("LLMQ_BACKEND", "reference")
    assert select_backend(weight, torch.bfloat16, CPU).name == "reference"
    monkeypatch.setenv("LLMQ_BACKEND", "cpu-int8")
    with pytest.raises(ValueError, match="cannot take this weight"):
        select_backend(weight, torch.bfloat16, CPU)
    monkeypatch.setenv("LLMQ_BACKEND", "warp-drive")
    with pytest.raises(ValueError, match="cpu-int4, cpu-int8, cpu-w8a8"):
        select_backend(weight, torch.bfloat16, CPU)


@pytest.mark.parametrize(("n", "k", "m"), [(64, 128, 1), (48, 96, 7), (32, 256, 33)])
def test_static_int8_activations_multiply_integers_exactly(n, k, m):
    """W8A8 with a stored range: the sums are exact, so only the float32 scaling differs from the
    reference: a few units in the last place."""
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    packed = PackedWeight(
        pack(codes, 8),
        (torch.rand(n, 1) / 100).half(),
        None,
        None,
        CODES["int8"],
        k,
        (n, k),
        "int8-static",
        torch.tensor([0.017, 101.0]),
    )
    x = torch.randn(m, k) * 2
    expected = fake_quantize_static(x, packed.input_range).double() @ packed.dequantize().double().T
    prepared = PreparedWeight(packed, torch.float32, torch.device("cpu"))
    assert prepared.backend.name != "reference" or not torch.cpu._is_vnni_supported()
    assert torch.allclose(
        prepared.linear(x).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )
    assert float((expected - x.double() @ packed.dequantize().double().T).abs().max()) > 0, (
        "the range clips and rounds"
    )
