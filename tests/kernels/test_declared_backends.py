"""Every backend crossed with every code, group size, zero points, dtype, kind of activations and
order of groups: it refuses, or it is right. Codes that were made up for the test, which no backend
declares, are refused by all but `reference`.

Tolerance, as a share of `|x| |W|^T`, the size of the sum without cancellation: a rounding to
bfloat16 or float16 is off by at most u = 2^-8 or 2^-11. Weights (or scales) are rounded once, in
the interpreter cut off instead (2u), and so is the product of scale and zero point, which can be as
large as the largest weight; the output is rounded once. K additions in float32 add K * 2^-23."""

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_weights import make_weight

from llmq_kernels import BACKENDS, CODES, Code, linear, select_backend
from llmq_kernels.core.errors import SettingError
from llmq_kernels.core.reference import (
    activation_group,
    fake_quantize_groups,
    fake_quantize_static,
    fake_quantize_token_ranges,
    fake_quantize_tokens,
)
from llmq_kernels.core.reference_backend import linear as reference_linear
from llmq_kernels.core.weight import RUN_TIME_ACTIVATIONS
from llmq_kernels.torch_cpu import kleidiai

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
BY_NAME = {backend.name: backend for backend in BACKENDS}
MADE_UP = (
    Code("int7", 7, 128, 64.0),
    Code("uint4", 4, 16, 0.0),
    Code("int4-odd", 4, 16, 7.0),
    Code("int3-five", 3, 5, 2.0),
    Code("int8-low", 8, 256, 100.0),
    Code("int4h", 4, 16, 7.5),
    Code("bit", 1, 2, 0.5),
    Code("int2-below", 2, 4, -1.0),
)
# Codes of the table that no kernel was built for.
UNDECLARED = [
    code
    for code in CODES.values()
    if not any(code in (takes.codes or ()) for one in BACKENDS for takes in one.takes)
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("none", "int8-token", "int8-static", *RUN_TIME_ACTIVATIONS)
# columns per group (-1: one scale per row, 0: per tensor) and K: also groups that do not divide K
GROUPS = [
    (2, 64), (7, 63), (7, 100), (16, 64), (32, 160), (32, 100), (48, 96), (48, 200), (64, 192),
    (64, 150), (96, 192), (96, 400), (128, 256), (128, 300), (160, 320), (256, 512), (-1, 96),
    (-1, 77), (0, 128), (0, 50),
]  # fmt: skip


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    for code in MADE_UP:
        monkeypatch.setitem(CODES, code.name, code)


@pytest.fixture(autouse=True)
def reference_body(monkeypatch):
    """torch's own, where KleidiAI does not run: as right, and slow."""
    if kleidiai.machine_obstacle() is not None:
        monkeypatch.setattr(kleidiai, "machine_obstacle", lambda: None)


def as_seen(x, weight, backend):
    """x as the product's definition has it, or as KleidiAI has it: no less fine."""
    if weight.activations == "int8-token-asym" or backend is kleidiai.BACKEND:
        return fake_quantize_token_ranges(x)
    if weight.activations == "int8-token":
        return fake_quantize_tokens(x)
    if weight.activations == "int8-static":
        return fake_quantize_static(x, weight.input_range)
    if weight.activations == "int8-group":
        columns = weight.group_size if weight.scale.shape[1] > 1 else weight.shape[1]
        return fake_quantize_groups(x, activation_group(weight.code.bits, columns))
    return x


def check(backend, weight, dtype, m=3):
    """The product of a backend that takes the weight."""
    x = torch.randn(m, weight.shape[1]).to(dtype)
    seen, values = as_seen(x, weight, backend).double(), weight.dequantize().double()
    state = backend.prepare(weight, dtype)
    held = dataclasses.replace(weight, packed=state.get("packed", weight.packed))
    out = backend.linear(x, held, state)
    assert out.dtype == dtype
    if "packed" in state:
        assert torch.equal(backend.restore(held, state), weight.packed)
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    if backend is kleidiai.BACKEND:
        unit = 2.0**-8  # it rounds scales of groups to bfloat16
    largest = weight.scale.float().abs().max() * max(weight.code.levels, weight.code.offset + 1)
    size = seen.abs() @ torch.maximum(values.abs(), largest.double() / 2).T
    bound = (4 * unit + weight.shape[1] * 2.0**-23) * size
    assert torch.all((out.double() - seen @ values.T).abs() <= bound), backend.name


def weights(codes, groups, kinds=KINDS, n=48):
    for code, (group, k), zero, order, kind in itertools.product(
        codes, groups, (False, True), (False, True), kinds
    ):
        if not (order and group <= 0):
            yield make_weight(code, group, n, k, asymmetric=zero, act_order=order, activations=kind)


def cross(cases, dtypes=DTYPES):
    """How many products each backend made."""
    made = dict.fromkeys(BY_NAME, 0)
    for weight, dtype, backend in itertools.product(cases, dtypes, BACKENDS):
        if backend.refusal(weight, dtype, CPU) is None:
            check(backend, weight, dtype)
            made[backend.name] += 1
    return made


@pytest.mark.parametrize("group", [(32, 96), (7, 63)], ids=str)
def test_each_backend_refuses_or_is_right(group):
    codes = ["int4"] if INTERPRETED else ["int4", "int8", "int2h"]
    made = cross(weights(codes, [group], KINDS[:2], 16), [torch.bfloat16])
    assert made["reference"] == 8 * len(codes)
    assert bool(made["triton"] and made["triton-int8"]) == (INTERPRETED and group[0] == 32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", list(CODES))
@pytest.mark.parametrize("n", [48, 17])  # the second fills no band
def test_the_whole_matrix(n, code, kind):
    groups = GROUPS[::4] if INTERPRETED else GROUPS
    n_weights = sum(4 if group > 0 else 2 for group, _ in groups)
    assert cross(weights([code], groups, [kind], n))["reference"] == n_weights * len(DTYPES)


@pytest.mark.parametrize("code", [*UNDECLARED, *MADE_UP], ids=lambda code: code.name)
def test_a_code_that_nobody_declares(code, monkeypatch):
    """The reference computes it, with gradients and compiled, too; nobody else takes it, asked by
    name neither."""
    for weight in weights([code.name], [(32, 64), (-1, 64), (7, 63)], ("none", "int8-token")):
        for dtype, device in itertools.product(DTYPES, (CPU, torch.device("cuda"))):
            taken = [one.name for one in BACKENDS if one.refusal(weight, dtype, device) is None]
            assert taken == ["reference"]
            assert select_backend(weight, dtype, device).name == "reference"
        check(BY_NAME["reference"], weight, torch.float32)
    weight = make_weight(code.name, 32, 48, 64)
    x = torch.randn(2, 64, requires_grad=True)
    expected = x.detach().double() @ weight.dequantize().double().T
    out = linear(x, weight)
    assert torch.allclose(out.double(), expected, atol=1e-4)
    out.sum().backward()
    assert torch.allclose(x.grad, weight.dequantize().sum(0).expand(2, -1), atol=1e-4)
    for name in BY_NAME.keys() - {"reference"}:
        monkeypatch.setenv("LLMQ_BACKEND", name)
        with pytest.raises(SettingError, match=f"LLMQ_BACKEND={name} cannot take this weight"):
            linear(x.bfloat16().detach(), weight)


def test_the_reason_names_the_code_and_what_there_is():
    weight = make_weight("int6", 32, 48, 64)
    reason = BY_NAME["cpu-int4"].refusal(weight, torch.bfloat16, CPU)
    assert reason == (
        "it was built for the codes int4, int3, int2 and ternary, "
        "not int6 (6 bits, 64 levels, zero at 32)"
    )


def test_another_code_under_a_known_name_is_another_code():
    """And the operator for compilers and autograd computes with the code that the weight has."""
    weight = dataclasses.replace(make_weight("int4", 32, 48, 64), code=Code("int4", 4, 16, 3.0))
    assert select_backend(weight, torch.bfloat16, CPU).name == "reference"
    x = torch.randn(2, 64, requires_grad=True)
    expected = x.detach().double() @ weight.dequantize().double().T
    assert torch.allclose(linear(x, weight).double(), expected, atol=1e-4)


WEIGHT = make_weight("int4", 32, 48, 64, asymmetric=True)
ODDITIES = {
    "zero points of another dtype": {"zero": WEIGHT.zero.float() + 0.5},
    "zero points beyond the codes": {"zero": torch.full_like(WEIGHT.zero, 16)},
    "scales of another dtype": {"scale": WEIGHT.scale.double()},
    "a static range that is not there": {"activations": "int8-static"},
    "activations that nobody knows": {"activations": "int8-channel"},
    "codes wider than a byte": {"code": Code("int9", 9, 512, 256.0)},
}


@pytest.mark.parametrize("change", ODDITIES.values(), ids=ODDITIES)
def test_oddities_are_refused_or_right(change):
    weight = dataclasses.replace(WEIGHT, **change)
    for backend in BACKENDS:
        if backend.refusal(weight, torch.bfloat16, CPU) is None:
            check(backend, weight, torch.bfloat16)
    if {"activations", "code"} & change.keys():
        with pytest.raises(SettingError, match="no backend takes this weight"):
            select_backend(weight, torch.bfloat16, CPU)


def test_sums_that_would_not_fit_are_refused():
    """More columns than 32 bits hold the products of."""
    for name, k in (("cpu-w8a8", 1 << 17), ("triton-int8", 1 << 17)):
        obstacle = BY_NAME[name].obstacle
        weight = make_weight("int8", -1, 2, k, activations="int8-token")
        told = obstacle(weight, torch.bfloat16, CPU)
        assert told is not None


def test_every_backend_declares_and_the_reference_everything():
    for backend in BACKENDS:
        assert backend.takes
        undeclared = [takes for takes in backend.takes if takes.codes is None]
        assert bool(undeclared) == (backend.name == "reference")


def test_reference_is_the_definition():
    weight = make_weight("int6", 7, 5, 33, asymmetric=True)
    x = torch.randn(4, 33)
    expected = x.double() @ weight.dequantize().double().T
    assert torch.allclose(reference_linear(x, weight, {}).double(), expected, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="this is the run in the interpreter")
@pytest.mark.parametrize(
    "tests",
    [
        "is_right and 32",
        pytest.param("matrix and 17 and not group and not 2h", marks=pytest.mark.slow),
    ],
)
def test_in_tritons_interpreter(tests):
    """Triton's kernels among the others: CPU tensors are theirs there."""
    pytest.importorskip("triton", reason="needs Triton (pip install '.[triton]')")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", tests],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-4000:]
