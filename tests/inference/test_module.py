"""QuantLinear under compilers, autograd and changes of dtype: one operator, whichever backend is
behind it."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

from llmq.grid.spec import ActSpec, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import QuantLinear, prepare
from llmq_kernels.core import dispatch

CASES = [
    ("int4", 128, "none", torch.bfloat16),
    ("int8", -1, "none", torch.bfloat16),
    ("int8", -1, "int8-token", torch.float32),
    ("int8", -1, "int8-static", torch.bfloat16),
    ("int3", 32, "none", torch.float32),
    ("ternary", 0, "none", torch.bfloat16),
]


def layer(code="int4", group=128, activations="none", bias=True, n=64, k=128):
    qtensor = QuantizedTensor.quantize(torch.randn(n, k), QuantSpec(code, group))
    if activations == "int8-static":
        qtensor = dataclasses.replace(qtensor, input_range=torch.tensor([0.05, 120.0]))
    return QuantLinear(qtensor, torch.randn(n) if bias else None, ActSpec(activations))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("code", "group", "activations", "dtype"), CASES)
def test_full_graph_before_and_after_the_first_call(code, group, activations, dtype, bias):
    x = torch.randn(2, 3, 128).to(dtype)
    eager, traced = (layer(code, group, activations, bias) for _ in range(2))
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), traced(x))
    expected = eager(x)
    assert torch.equal(torch.compile(eager, fullgraph=True, backend="aot_eager")(x), expected)


def test_full_graph_through_inductor():
    """The operator alone: nothing for Inductor to generate, so no C++ compiler is needed and no
    minute is spent."""
    module = layer()
    x = torch.randn(5, 128).bfloat16()
    assert torch.equal(torch.compile(module, fullgraph=True)(x), module(x))


def test_dtype_may_change_between_calls():
    module = layer()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        x = torch.randn(3, 128).to(dtype)
        assert torch.equal(compiled(x), module(x))


def test_blocks_compiled_one_by_one_share_one_graph():
    count = 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return graph.forward

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer()

        def forward(self, x):
            return self.layer(x)

    blocks = nn.ModuleList(
        Block() for _ in range(12)
    )  # more than the compiler's limit of versions of one function
    prepare(blocks, torch.bfloat16)
    for block in blocks:
        block.compile(fullgraph=True, backend=backend)
        x = torch.randn(3, 128).bfloat16()
        assert torch.equal(block(x), block.layer(x))
    assert count == 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("code", "group", "activations", "dtype"), CASES)
def test_gradient_for_an_adapter(code, group, activations, dtype, compiled):
    """An adapter before a quantized layer gets its gradient; INT8 activations count as straight
    through."""
    module = layer(code, group, activations)
    adapter = nn.Linear(128, 128, dtype=dtype)
    model = nn.Sequential(adapter, module)
    function = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    x = torch.randn(4, 128).to(dtype)
    direction = torch.randn(4, 64).to(dtype)
    (function(x) * direction).sum().backward()
    at_adapter = direction.double() @ module.qtensor().dequantize().double()
    expected = at_adapter.T @ x.double()
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    # Rounded on the way: the dequantized weight, the gradient of the layer's input, and the
    # product.
    assert float((adapter.weight.grad.double() - expected).norm() / expected.norm()) < 3 * unit


def test_prepared_tensors_are_memory_but_not_state():
    module = layer()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.prepare(torch.bfloat16)
    assert module.packed is None
    assert sum(buffer.nbytes for buffer in module.buffers()) >= before["packed"].nbytes
    assert module.backend is not None
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert module.backend is None


def test_operator_passes_torchs_own_checks():
    prepared = dispatch.PreparedWeight(
        layer().qtensor().as_packed(), torch.float32, torch.device("cpu")
    )
    x = torch.randn(3, 128, requires_grad=True)
    torch.library.opcheck(
        torch.ops.llmq.linear.default, (x, prepared.tensors, prepared.layout, torch.randn(64))
    )


def test_without_triton_everything_imports_and_says_why():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, llmq_kernels\nfrom llmq_kernels.triton import backend\n"
        "from llmq_kernels.core.dispatch import BACKENDS\nimport importlib.util\n"
        "codes = torch.zeros(64, 128, dtype=torch.uint8)\n"
        "weight = llmq_kernels.PackedWeight(llmq_kernels.pack(codes, 4), torch.ones(64, 1), None, "
        "None, llmq_kernels.CODES['int4'], 128, (64, 128))\n"
        "print(BACKENDS[0].refusal(weight, torch.bfloat16, torch.device('cuda')))\n"
        "print(llmq_kernels.linear(torch.ones(2, 128), weight).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "Triton is not installed (pip install '.[triton]' in a clone of llmq)",
        "torch.Size([2, 64])",
    ]


def test_a_copy_is_prepared_by_itself_in_a_trace():
    """Modules are known to the compiler by a key, which a copy must not share."""
    original = layer()
    copied = copy.deepcopy(original)
    x = torch.randn(2, 128).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(copied, fullgraph=True, backend="eager")(x)
        assert original.backend is None
        assert torch.equal(compiled, original(x))
