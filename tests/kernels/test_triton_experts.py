"""Experts in one launch against float64: in Triton's interpreter, in a process of its own, or on a
GPU. The tolerance is that of test_triton_kernels.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_weights import make_weight, relative_error
from torch import nn

from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import swap
from llmq.models.experts import GATES, Layout, UnfusedExperts
from llmq_kernels import PreparedWeight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
here = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a CUDA device, or TRITON_INTERPRET=1",
)
E, M = 5, 45

# code, columns per group, N, K, zero points, biases
CASES = [
    ("int4", 128, 72, 256, False, False),
    ("int4", 64, 40, 320, True, True),
    ("int4", -1, 33, 100, True, False),
    ("int3", 32, 48, 96, True, False),
    ("int8", 128, 24, 128, False, True),
    ("ternary", 0, 30, 200, False, False),
]


def prepared(code, group, n, k, zero):
    weight = make_weight(code, group, n, k, asymmetric=zero, device=DEVICE)
    return weight, PreparedWeight(weight, torch.float16, DEVICE)


@here
@pytest.mark.parametrize(("code", "group", "n", "k", "zero", "has_bias"), CASES)
def test_each_row_meets_its_expert(code, group, n, k, zero, has_bias):
    from llmq_kernels.triton.grouped import GroupedWeight, refusal, tiles_of

    pairs = [prepared(code, group, n, k, zero) for _ in range(E)]
    biases = [torch.randn(n, device=DEVICE).half() if has_bias else None for _ in pairs]
    weights = [one for _, one in pairs]
    assert refusal(weights, biases) is None
    # one without rows, one with more than a tile; the last rows are of no expert
    experts = torch.tensor([0] * 3 + [1] * 36 + [3] + [4] * 2 + [E] * 3, device=DEVICE)
    x, source = torch.randn(20, k, device=DEVICE).half(), torch.randint(0, 20, (M,), device=DEVICE)
    out = GroupedWeight(weights, biases).linear(x, tiles_of(experts, source, E))
    assert out.shape == (M, n)
    for number, (weight, _) in enumerate(pairs):
        rows = (experts == number).nonzero()[:, 0]
        if not len(rows):
            continue
        expected = x[source[rows]].double() @ weight.dequantize().double().T
        expected += 0 if biases[number] is None else biases[number].double()
        assert relative_error(out[rows], expected) < 2.0**-11 + k * 2.0**-22


@here
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize(("code", "group", "n", "k", "zero", "has_bias"), CASES[1:4])
def test_two_layers_and_the_gate(activation, code, group, n, k, zero, has_bias):
    """Rounded once. A sum's error, and that of a gate's activation, goes into the product."""
    from llmq_kernels.triton.grouped import GroupedWeight, tiles_of

    pairs = [[prepared(code, group, n, k, zero) for _ in range(E)] for _ in range(2)]
    biases = [[torch.randn(n, device=DEVICE).half() if has_bias else None] * E for _ in pairs]
    gate, up = (
        GroupedWeight([one for _, one in own], each)
        for own, each in zip(pairs, biases, strict=True)
    )
    assert up.goes_with(gate)
    experts = torch.tensor([0] * 3 + [1] * 36 + [3] + [4] * 2 + [E] * 3, device=DEVICE)
    x, source = torch.randn(20, k, device=DEVICE).half(), torch.randint(0, 20, (M,), device=DEVICE)
    out = up.gated(gate, x, tiles_of(experts, source, E), activation)
    for number in range(E):
        rows = (experts == number).nonzero()[:, 0]
        if not len(rows):
            continue
        sums = [
            x[source[rows]].double() @ own[number][0].dequantize().double().T
            + (0 if each[number] is None else each[number].double())
            for own, each in zip(pairs, biases, strict=True)
        ]
        expected = GATES[activation](sums[0]) * sums[1]
        assert relative_error(out[rows], expected) < 2.0**-11 + 3 * k * 2.0**-22


@here
def test_gates_of_another_kind_are_multiplied_apart():
    from llmq_kernels.triton.grouped import GroupedWeight

    kinds = [
        ("int4", 64, 32, 128, False),
        ("int4", 64, 32, 128, True),
        ("int4", 64, 40, 128, False),
    ]
    a, b, c = (GroupedWeight([prepared(*kind)[1]], [None]) for kind in kinds)
    assert not a.goes_with(b)
    assert not a.goes_with(c)
    assert a.goes_with(a)


@here
def test_what_is_refused():
    from llmq_kernels.triton.grouped import refusal

    (_, a), (_, b) = prepared("int4", 64, 32, 128, False), prepared("int4", 64, 32, 128, True)
    assert "packed alike" in refusal([a, b], [None, None])
    assert "biases" in refusal([a, a], [None, torch.zeros(32)])


class Fused(nn.Module):
    """Four experts of 32 x 64."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 64) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(4, 64, 32) * 0.2)
        self.act_fn = nn.SiLU()


def of_clamped(joint):
    gate, up = joint.chunk(2, dim=-1)
    return nn.functional.silu(gate.clamp(max=7)) * up


@pytest.mark.parametrize(
    ("activation", "own", "found"),
    [
        (nn.SiLU(), None, "silu"),
        (nn.GELU(approximate="tanh"), None, "gelu"),
        (nn.GELU(), None, None),
        (nn.ReLU(), None, None),
        (nn.SiLU(), of_clamped, None),
    ],
)
def test_the_gate_is_found_by_trying(activation, own, found):
    fused = Fused()
    fused.act_fn = activation
    if own is not None:
        fused._apply_gate = own
    assert UnfusedExperts(fused, Layout())._known_gate(torch.device("cpu")) == found


@here
def test_a_module_of_experts(monkeypatch):
    """As one by one, also for a number beyond the last expert; not where someone listens. Both
    ways round x, the products, the gate and the sum to float16: a dozen roundings."""
    module = UnfusedExperts(Fused(), Layout())
    linears = {n: one for n, one in module.named_modules() if isinstance(one, nn.Linear)}
    spec = QuantSpec("int4", 32)
    swap(module, {n: QuantizedTensor.quantize(one.weight, spec) for n, one in linears.items()})
    module.to(DEVICE)
    x, weights = torch.randn(7, 64, device=DEVICE).half(), torch.rand(7, 3, device=DEVICE).half()
    index = torch.stack([torch.randperm(5)[:3] for _ in range(7)]).to(DEVICE)
    assert module._grouped(x) is not None
    out = module(x, index, weights)
    module.expert(0).layer("up_proj").register_forward_hook(lambda *_: None)
    assert module._grouped(x) is None
    assert relative_error(out, module(x, index, weights).double()) < 12 * 2.0**-11


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the run in the interpreter")
def test_in_tritons_interpreter():
    pytest.importorskip("triton", reason="needs Triton (pip install '.[triton]')")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"8 passed", done.stdout), done.stdout[-4000:]
