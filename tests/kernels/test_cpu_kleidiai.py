"""KleidiAI's backend, through the reference body that torch has on other machines.

Tolerance. The reference rounds activations as the operator does, so where scales are exact (float32
per row, or numbers that bfloat16 holds) both multiply the same integers, and what differs is
float32 arithmetic: one rounding per group and a few for the scales. A code on the edge between two
integers may fall to either side where a scale differs in its last place: less than one code in
2^16, which moves an output by one step of x times one weight. Scales of groups are rounded to
bfloat16, 2^-9 each, which averages out over the groups in the norm."""

import dataclasses
import json

import pytest
import torch
from packed_weights import make_weight, relative_error

from llmq_kernels import BACKENDS, PreparedWeight, select_backend
from llmq_kernels.core import compute
from llmq_kernels.core.reference import fake_quantize_token_ranges, fake_quantize_tokens
from llmq_kernels.torch_cpu import kleidiai

CPU = torch.device("cpu")
EPS = 2.0**-24
CASES = [
    ("int4", 32, 48, 128),
    ("int4", 64, 17, 192),
    ("int4", -1, 48, 62),
    ("int4", 0, 16, 64),
    ("int3", 32, 16, 64),
    ("int2", -1, 16, 300),
    ("ternary", 96, 16, 192),
]


@pytest.fixture
def anywhere(monkeypatch):
    """As if this machine were an ARM64: torch then computes with its reference body."""
    monkeypatch.setattr(kleidiai, "machine_obstacle", lambda: None)
    monkeypatch.setenv("LLMQ_BACKEND", "cpu-kleidiai")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_multiplies_what_the_reference_does(case, dtype, anywhere):
    weight = make_weight(*case, activations="int8-token-asym")
    weight = dataclasses.replace(weight, scale=weight.scale.bfloat16())  # what groups are held in
    x = (torch.randn(5, weight.shape[1]) + torch.arange(-2, 3)[:, None]).to(dtype)
    prepared = PreparedWeight(weight, dtype, CPU)
    assert prepared.backend is kleidiai.BACKEND
    expected = fake_quantize_token_ranges(x).double() @ weight.dequantize().double().T
    bound = {torch.float32: (weight.scale.shape[1] + 8) * EPS, torch.bfloat16: 2.0**-8}[dtype]
    assert relative_error(prepared.linear(x), expected) < bound
    assert torch.equal(prepared.canonical_packed(), weight.packed)


@pytest.mark.parametrize("kind", ["int8-token", "int8-token-asym"])
def test_it_is_no_further_from_the_truth_than_int8_activations_are(kind, anywhere):
    """With float16 scales, and where the checkpoint says "int8-token": each rounding of x is off by
    half a step at most, and so is the zero point at the ends of the range."""
    weight = make_weight("int4", 32, 64, 256, activations=kind)
    x = torch.randn(7, 256)
    out = PreparedWeight(weight, torch.float32, CPU).linear(x).double()
    values = weight.dequantize().double()
    seen = {"int8-token": fake_quantize_tokens, "int8-token-asym": fake_quantize_token_ranges}[kind]
    step = (x.amax(1) - x.amin(1)).double()[:, None] / 255
    own = x.abs().amax(1).double()[:, None] / 127
    differs = (step + own / 2 if kind == "int8-token" else 0) * values.abs().sum(1)
    bound = differs + 2.0**-8 * (seen(x).double().abs() @ values.abs().T)
    assert torch.all((out - seen(x).double() @ values.T).abs() <= bound)
    exact = x.double() @ values.T
    symmetric = fake_quantize_tokens(x).double() @ values.T
    assert relative_error(out, exact) < relative_error(symmetric, exact) + 2.0**-9


def test_a_range_per_token_holds_zero_and_both_ends():
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [-4.0, -1.0, -2.0], [-1.0, 0.0, 3.0]])
    step = (x.amax(1).clamp_min(0) - x.amin(1).clamp_max(0))[:, None] / 255
    seen = fake_quantize_token_ranges(x)
    assert torch.all((seen - x).abs() <= step)
    assert bool((seen[x == 0] == 0).all())


def test_it_is_refused_by_name_where_it_does_not_run(monkeypatch):
    weight = make_weight("int4", 32, 48, 64, activations="int8-token-asym")
    if kleidiai.platform.machine().lower() in ("aarch64", "arm64"):
        pytest.skip("this is an ARM64")
    assert "for ARM64, not" in kleidiai.BACKEND.refusal(weight, torch.float32, CPU)
    assert select_backend(weight, torch.float32, CPU).name == "reference"
    kleidiai.machine_obstacle.cache_clear()
    monkeypatch.setattr(kleidiai.platform, "machine", lambda: "aarch64")
    assert "without KleidiAI" in kleidiai.BACKEND.refusal(weight, torch.float32, CPU)
    kleidiai.machine_obstacle.cache_clear()
    monkeypatch.setattr(torch, "ops", type("ops", (), {"aten": object()}))
    assert "has no _dyn_quant" in kleidiai.BACKEND.refusal(weight, torch.float32, CPU)
    monkeypatch.undo()
    kleidiai.machine_obstacle.cache_clear()


def test_what_it_cannot_hold_is_refused(anywhere):
    weight = make_weight("int4", 32, 16, 64, activations="int8-token-asym")
    odd = make_weight("int4", -1, 16, 63, activations="int8-token-asym")
    short = make_weight("int4", 64, 16, 96, activations="int8-token-asym")
    none = dataclasses.replace(weight, scale=torch.zeros_like(weight.scale))
    for given, told in ((odd, "even number"), (short, "divide K"), (none, "scale of zero")):
        assert told in kleidiai.BACKEND.refusal(given, torch.float32, CPU)


def test_never_under_exact_arithmetic(anywhere, monkeypatch):
    """And with `--compute int8`, where nothing better is there."""
    weight = make_weight("int4", 32, 16, 64)
    for dtype in (torch.float32, torch.bfloat16):
        assert "INT8 activations" in kleidiai.BACKEND.refusal(weight, dtype, CPU)
        assert compute.at_run_time(weight, "exact", dtype, CPU) is weight
    only = [one for one in BACKENDS if one.name in ("cpu-kleidiai", "reference")]
    monkeypatch.setattr(compute, "BACKENDS", only)
    assert compute.refusal("int8", CPU) is None
    rounded = compute.at_run_time(weight, "int8", torch.float32, CPU)
    assert rounded.activations == "int8-token-asym"
    monkeypatch.setattr(kleidiai, "machine_obstacle", lambda: "no")
    assert compute.at_run_time(weight, "int8", torch.float32, CPU) is weight
    assert compute.refusal("int8", CPU) == "cpu-kleidiai: no"


def test_compilers_and_gradients_see_the_same(anywhere):
    weight = make_weight("int4", 32, 16, 64, activations="int8-token-asym")
    prepared, x = PreparedWeight(weight, torch.float32, CPU), torch.randn(3, 64)
    assert json.loads(prepared.layout)["activations"] == "int8-token-asym"
    out = torch.ops.llmq.linear(x, prepared.tensors, prepared.layout, None)
    assert torch.equal(out, prepared.linear(x))
    x.requires_grad_()
    prepared.linear(x).sum().backward()
    assert torch.allclose(x.grad, weight.dequantize().sum(0).expand(3, -1), atol=1e-5)
