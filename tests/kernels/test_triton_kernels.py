"""The Triton kernels against float64, on a GPU (`pytest -m gpu`) or, with the same bodies, in
Triton's interpreter (`TRITON_INTERPRET=1`, started by test_triton_interpreter.py).

Tolerance. Numbers `code - zero` and x are exact in their dtype, products of two such numbers are
exact in float32, and K of them are added in float32 (tensor cores keep at least 22 bits while they
add): a relative error of at most K * 2^-22 in the norm. The output is rounded once: u = 2^-8 for
bfloat16, 2^-11 for float16. Where the weight is dequantized for cuBLAS, or scales are multiplied
into it (`fold`), it is rounded as well: another u. The interpreter cuts off instead of rounding to
bfloat16: twice the u. Outputs are poisoned: every uninitialized tensor is filled with NaN."""

import os

import pytest
import torch
from conftest import make_model
from packed_weights import make_weight, relative_error

from llmq.benchmark import kernels, tuner
from llmq.benchmark.decode import StaticDecoder, quantize_layers
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import QuantLinear, prepare, quantized_modules, swap
from llmq_kernels import BACKENDS, PreparedWeight
from llmq_kernels.core.reference import (
    fake_quantize_static,
    fake_quantize_tokens,
    quantize_static,
    quantize_tokens,
)
from llmq_kernels.triton import backend as triton_backend
from llmq_kernels.triton import choices, tuning
from llmq_kernels.triton.choices import Choice

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
BY_NAME = {backend.name: backend for backend in BACKENDS}
pytestmark = (
    []
    if INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available(), reason="needs a CUDA device, or TRITON_INTERPRET=1"
        ),
    ]
)
gpu_only = pytest.mark.skipif(
    INTERPRETED, reason="the interpreter has no CUDA graphs, streams or races"
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Uninitialized memory is filled with NaN, and no tuned file of this user is read."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(tuning, "_tuned", {})
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setenv("LLMQ_CACHE_DIR", "/nonexistent")
    yield
    torch.use_deterministic_algorithms(False)


def tolerance(dtype, k, roundings=1):
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    return unit * (roundings + (INTERPRETED and dtype == torch.bfloat16)) + k * 2.0**-22


AS_SEEN = {
    "none": lambda x, _: x,
    "int8-token": lambda x, _: fake_quantize_tokens(x),
    "int8-static": fake_quantize_static,
}


def as_seen(x, weight):
    """What a kernel multiplies with. On the CPU: torch on CUDA divides by a number through its
    reciprocal, and a code at a tie then goes to the other side."""
    limits = weight.input_range
    found = AS_SEEN[weight.activations](x.cpu(), None if limits is None else limits.cpu())
    return found.to(x.device)


def expected(x, weight, bias=None):
    out = x.double() @ weight.dequantize().double().T
    return out if bias is None else out + bias.double()


def check(weight, dtype, m, bias=False, choice=None):
    n, k = weight.shape
    x = torch.randn(m, k, device=DEVICE).to(dtype)
    offset = torch.randn(n, device=DEVICE).to(dtype) if bias else None
    prepared = PreparedWeight(weight, dtype, DEVICE)
    assert prepared.backend.name == ("triton" if weight.activations == "none" else "triton-int8")
    out = (
        prepared.linear(x, offset)
        if choice is None
        else triton_backend.run(x, prepared.weight, prepared.state, offset, choice)
    )
    assert out.dtype == dtype
    assert out.shape == (m, n)
    used = choice or tuning.choose(triton_backend.problem_of(x, weight), choices.chip_of(x.device))
    roundings = 2 if used.method == "dequantize" or used.fold else 1
    seen = as_seen(x, weight)
    assert relative_error(out, expected(seen, weight, offset)) < tolerance(dtype, k, roundings)
    assert torch.equal(prepared.canonical_packed(), weight.packed)


FLOAT_CASES = [
    ("int4", 128, 72, 256, False),
    ("int4", 64, 40, 320, True),
    ("int4", 32, 64, 160, True),
    ("int4", -1, 33, 77, False),
    ("int4", -1, 33, 100, True),
    ("int4", 0, 64, 128, False),
    ("int2", 64, 72, 128, True),
    ("int2", 32, 20, 96, False),
    ("ternary", 128, 64, 256, False),
    ("ternary", 0, 30, 200, False),
    ("int3", 128, 48, 256, False),
    ("int3", 32, 17, 96, True),
    ("int8", 128, 48, 128, True),
    ("int8", -1, 40, 130, False),
    ("int8", 32, 24, 64, True),
    ("int4", 96, 24, 192, False),
]


@pytest.mark.parametrize("m", [1, 3, 6, 37])
@pytest.mark.parametrize(("code", "group", "n", "k", "asymmetric"), FLOAT_CASES)
def test_float_activations(code, group, n, k, asymmetric, m):
    dtype = torch.bfloat16 if m % 2 else torch.float16
    check(
        make_weight(code, group, n, k, asymmetric=asymmetric, device=DEVICE), dtype, m, bias=m == 3
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_of_scales(dtype, scale_dtype):
    check(make_weight("int4", 64, 48, 192, scale_dtype=scale_dtype, device=DEVICE), dtype, 9)


CHOICES = [
    Choice("gemv", 1, 2, 256, 1, 2, 1),
    Choice("gemv", 1, 8, 512, 1, 4, 1),
    Choice("gemm", 16, 64, 64, 1, 4, 2),
    Choice("gemm", 16, 64, 64, 3, 4, 3),
    Choice("gemm", 64, 128, 32, 2, 8, 3),
    Choice("gemm", 64, 64, 64, 1, 4, 3, fold=True),
    Choice("gemm", 16, 64, 32, 2, 4, 3, fold=True),
    Choice("dequantize"),
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize(("code", "asymmetric"), [("int4", True), ("int3", False)])
def test_every_method_agrees(code, asymmetric, choice):
    m = 4 if choice.method == "gemv" else 20
    for dtype in (torch.float16, torch.bfloat16):
        check(
            make_weight(code, 64, 40, 448, asymmetric=asymmetric, device=DEVICE),
            dtype,
            m,
            bias=True,
            choice=choice,
        )


INT8_CASES = [
    ("ternary", 128, 72, 256, False),
    ("ternary", -1, 40, 200, False),
    ("int2", 64, 33, 192, True),
    ("int4", 128, 64, 256, True),
    ("int4", 32, 40, 96, False),
    ("int4", 0, 24, 77, False),
    ("int8", -1, 72, 256, False),
    ("int8", -1, 40, 130, True),
    ("int8", 64, 24, 128, True),
    ("int8", 0, 16, 64, False),
]


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize(("code", "group", "n", "k", "asymmetric"), INT8_CASES)
def test_int8_activations(code, group, n, k, asymmetric, m):
    dtype = torch.float16 if m % 2 else torch.bfloat16
    check(
        make_weight(
            code, group, n, k, asymmetric=asymmetric, activations="int8-token", device=DEVICE
        ),
        dtype,
        m,
        bias=m == 5,
    )


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize(("code", "group", "n", "k", "asymmetric"), INT8_CASES)
def test_static_int8_activations(code, group, n, k, asymmetric, m):
    dtype = torch.float16 if m % 2 else torch.bfloat16
    check(
        make_weight(
            code, group, n, k, asymmetric=asymmetric, activations="int8-static", device=DEVICE
        ),
        dtype,
        m,
        bias=m == 40,
    )


@pytest.mark.parametrize("activations", ["int8-token", "int8-static"])
def test_int8_with_split_k(activations):
    weight = make_weight(
        "int4", 64, 40, 512, asymmetric=True, activations=activations, device=DEVICE
    )
    check(weight, torch.float16, 7, bias=True, choice=Choice("gemm", 16, 64, 64, 4, 4, 2))


def test_codes_of_tokens_are_those_of_the_reference():
    x = (torch.randn(9, 300) * torch.logspace(-3, 2, 9)[:, None]).to(DEVICE, torch.float16)
    x[3] = 0
    codes, scale, sums = triton_backend.quantize_tokens(x, 64)
    # On the CPU: on GPUs torch divides by a number by multiplying with its reciprocal.
    expected_codes, expected_scale = quantize_tokens(x.cpu())
    assert torch.equal(codes[:, :300].int().cpu(), expected_codes.int() - 128)
    assert not codes[:, 300:].any()
    assert torch.equal(scale[:, None].cpu(), expected_scale)
    assert torch.equal(sums, codes.int().view(9, -1, 64).sum(2, dtype=torch.int32))


def test_codes_of_a_static_range_are_those_of_the_reference():
    x = torch.randn(9, 300).to(DEVICE, torch.float16) * 3
    x[3], x[4, 0] = 0, 60000
    weight = make_weight("int4", 64, 16, 300, activations="int8-static", device=DEVICE)
    codes, scale, sums = triton_backend.quantize_tokens(x, 64, weight.input_range)
    assert torch.equal(codes[:, :300].int(), quantize_static(x, weight.input_range).int() - 128)
    assert not codes[:, 300:].any()
    assert torch.equal(scale, weight.input_range[0].expand(9))
    assert torch.equal(sums, codes.int().view(9, -1, 64).sum(2, dtype=torch.int32))


@pytest.mark.parametrize("activations", ["none", "int8-token", "int8-static"])
def test_act_order_gathers_x(activations):
    weight = make_weight(
        "int4", 32, 40, 160, asymmetric=True, act_order=True, activations=activations, device=DEVICE
    )
    for m in (2, 11):
        check(weight, torch.float16, m)


@pytest.mark.parametrize("code", ["int4", "int3"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gradient_with_respect_to_x(code, act_order):
    weight = make_weight(code, 32, 40, 160, asymmetric=True, act_order=act_order, device=DEVICE)
    x = torch.randn(5, 160, device=DEVICE, dtype=torch.float16, requires_grad=True)
    direction = torch.randn(5, 40, device=DEVICE, dtype=torch.float16)
    (PreparedWeight(weight, torch.float16, DEVICE).linear(x) * direction).sum().backward()
    assert relative_error(x.grad, direction.double() @ weight.dequantize().double()) < tolerance(
        torch.float16, 40, 2
    )


def test_no_rows_and_many_dimensions():
    weight = make_weight("int4", 32, 24, 64, device=DEVICE)
    prepared = PreparedWeight(weight, torch.float16, DEVICE)
    assert prepared.linear(torch.empty(0, 64, device=DEVICE, dtype=torch.float16)).shape == (0, 24)
    x = torch.randn(2, 3, 64, device=DEVICE, dtype=torch.float16).transpose(0, 1)
    assert relative_error(
        prepared.linear(x), x.double() @ weight.dequantize().double().T
    ) < tolerance(torch.float16, 64)


@pytest.mark.parametrize("m", [1, 24, 300])
@pytest.mark.parametrize("activations", ["none", "int8-token", "int8-static"])
def test_same_bits_every_time(activations, m):
    """Split-K, ragged edges and two streams of allocations: nothing may depend on the order in
    which programs finish."""
    n, k, runs = (40, 320, 2) if INTERPRETED else (1000, 4096, 100)
    prepared = PreparedWeight(
        make_weight("int4", 64, n, k, activations=activations, device=DEVICE), torch.float16, DEVICE
    )
    x = torch.randn(m if not INTERPRETED else min(m, 24), k, device=DEVICE, dtype=torch.float16)
    first = prepared.linear(x)
    for _ in range(runs - 1):
        assert torch.equal(prepared.linear(x), first)


def module(spec=QuantSpec("int4", 64), activations=ActSpec(), n=96, k=128):
    return QuantLinear(
        QuantizedTensor.quantize(torch.randn(n, k), spec), torch.randn(n), activations
    ).to(DEVICE)


@pytest.mark.parametrize("activations", ["none", "int8-token"])
def test_compiled_module(activations):
    torch._dynamo.reset()
    layer = module(activations=ActSpec(activations))
    compiled = torch.compile(
        layer, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor"
    )
    x = torch.randn(3, 128, device=DEVICE, dtype=torch.float16)
    assert torch.equal(compiled(x), layer(x))
    assert layer.backend == ("triton" if activations == "none" else "triton-int8")


@gpu_only
@pytest.mark.parametrize("m", [1, 16, 64, 2048])
def test_graph_capture(m):
    layer = module(n=512, k=512)
    x = torch.randn(m, 512, device=DEVICE, dtype=torch.bfloat16)
    layer(x)  # compiles, as before every capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, layer(x))


@gpu_only
def test_compile_with_cuda_graphs():
    torch._dynamo.reset()
    layers = torch.nn.Sequential(*(module(n=256, k=256) for _ in range(3)))
    compiled = torch.compile(layers, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        x = torch.randn(2, 256, device=DEVICE, dtype=torch.bfloat16)
        with torch.no_grad():
            assert relative_error(compiled(x).clone(), layers(x).double()) < tolerance(
                torch.bfloat16, 256
            )


@gpu_only
@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 33, 64, 128, 256, 700, 2048])
@pytest.mark.parametrize(
    ("code", "activations"),
    [
        ("int4", "none"),
        ("int3", "none"),
        ("ternary", "none"),
        ("int8", "none"),
        ("ternary", "int8-token"),
        ("int4", "int8-token"),
        ("int8", "int8-token"),
        ("int8", "int8-static"),
    ],
)
def test_default_choices_at_real_sizes(code, activations, m):
    check(
        make_weight(code, 128, 4096, 4096, activations=activations, device=DEVICE),
        torch.bfloat16,
        m,
    )


def test_decode_step_of_a_model():
    """Every linear layer of a small model through the kernels, next to the same model with its
    weights dequantized: a prompt and one token on a cache."""
    model = make_model("llama", dtype=torch.float16)
    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name
    ]
    swap(
        model,
        {
            name: QuantizedTensor.quantize(
                model.get_submodule(name).weight.detach().float(), QuantSpec("int4", 32)
            )
            for name in names
        },
    )
    model.to(DEVICE)
    dense = make_model("llama", dtype=torch.float16).to(DEVICE)
    for name, layer in quantized_modules(model).items():
        dense.get_submodule(name).weight.data = (
            layer.qtensor().dequantize().to(DEVICE, torch.float16)
        )
    prepare(model, torch.float16)
    tokens = torch.randint(0, 2048, (1, 7), device=DEVICE)
    with torch.no_grad():
        outputs = []
        for each in (model, dense):
            prompt = each(tokens[:, :6], use_cache=True)
            outputs.append(each(tokens[:, 6:], past_key_values=prompt.past_key_values).logits)
    assert {layer.backend for layer in quantized_modules(model).values()} == {"triton"}
    # Two blocks with about ten roundings each, at 2^-11, and the dense weights rounded once more.
    assert relative_error(outputs[0], outputs[1].double()) < 30 * 2.0**-11


def test_tuning_keeps_what_it_measured(monkeypatch):
    every = choices.candidates
    monkeypatch.setattr(tuner, "candidates", lambda problem, chip: list(every(problem, chip))[:2])
    monkeypatch.delenv("LLMQ_CACHE_DIR")  # its children compile
    kinds = [kernels.Kind("w4g128"), kernels.Kind("ternary+a8")]
    report = tuner.tune([(32, 128)], (1,), kinds, DEVICE, 120.0)
    results = report.seconds
    assert not report.refused
    assert not report.not_reached
    assert sorted(key.split("/")[0] for key in results) == ["float", "int8"]
    for key, seconds in results.items():
        best = min(seconds, key=seconds.get)
        assert str(tuning.tuned(choices.chip_of(torch.empty(0, device=DEVICE).device))[key]) == best


@gpu_only
def test_decoding_by_graph_gives_the_tokens_of_decoding_without():
    model = make_model("llama", dtype=torch.bfloat16).to(DEVICE)
    quantize_layers(model, QuantSpec("int4", 32))
    first = torch.tensor([5, 1000], device=DEVICE)
    by_graph, _ = StaticDecoder(model, 2, 64).decode(first, 20, use_graph=True)
    step_by_step, _ = StaticDecoder(model, 2, 64).decode(first, 20, use_graph=False)
    assert torch.equal(torch.stack(by_graph), torch.stack(step_by_step))
