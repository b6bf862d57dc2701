"""Layers in training: the start's codes, the stored weight bit for bit, and gradients against
derivatives by hand."""

import copy

import pytest
import torch
from conftest import make_model

import llmq
from llmq.errors import LlmqError
from llmq.grid.fakequant import lsq_factor
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import quantized_modules
from llmq.models.arch import linear_weight, quantizable_layers
from llmq.models.source import load_config, meta_model
from llmq.qat.weights import (
    FakeQuantLinear,
    WeightQuantizer,
    fake_quant_modules,
    freeze,
    masters,
    prepare,
    stretched_scale,
)
from llmq_kernels.core.reference import expand_groups

SPECS = [
    "w8",
    "w4g32",
    "w4-tensor",
    "w3g64-asym",
    "w2g32-asym",
    "w2",
    "w2h-g32",
    "ternary-g32",
    "ternary-row",
    "ternary-tensor",
]


def layer(
    spec: str, name: str = "lsq", n: int = 24, k: int = 128
) -> tuple[torch.Tensor, QuantizedTensor, FakeQuantLinear]:
    weight = torch.randn(n, k) * torch.rand(n, 1)
    start = QuantizedTensor.quantize(weight, QuantSpec.parse(spec), torch.rand(k) + 0.1)
    master = masters(weight, start, 0.05) if name == "lsq" else weight
    return (
        weight,
        start,
        FakeQuantLinear(master, None, WeightQuantizer(start.spec, name, start.scale, start.zero)),
    )


@pytest.mark.parametrize("spec", SPECS)
def test_training_starts_from_the_codes_it_is_given(spec):
    weight, start, module = layer(spec)
    found = module.qtensor()
    assert torch.equal(found.packed, start.packed)
    assert torch.equal(found.scale, start.scale)
    moved = (module.weight - weight).abs()
    unmoved = (start.dequantize() - weight).abs() <= 0.44 * start.scale.float().min()
    assert bool((moved[unmoved] == 0).all()), "weights inside their cell keep their value"
    assert bool(unmoved.any())


@pytest.mark.parametrize("margin", [0.01, 0.2])
def test_masters_keep_off_the_edge_of_their_cell(margin):
    weight, start, _ = layer("w2g32-asym")
    master = masters(weight, start, margin)
    steps = ((master - start.dequantize()) / expand_groups(start.scale.float(), 128, 32)).abs()
    assert float(steps.max()) == pytest.approx(0.5 - margin, abs=1e-4)
    again = QuantizedTensor.round(master, start.scale.float(), start.zero.float(), start.spec)
    assert torch.equal(again.packed, start.packed)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["lsq", "seq", "ste", "absmean"])
def test_the_packed_weight_is_the_trained_one_bit_for_bit(spec, name):
    if name in ("absmean", "seq") and not spec.startswith(
        ("ternary", "w2h") if name == "seq" else "ternary"
    ):
        with pytest.raises(LlmqError, match=f"{name} is for"):
            layer(spec, name)
        return
    _, _, module = layer(spec, name)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    x = torch.randn(64, 128)
    for _ in range(5):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    model = torch.nn.Sequential(module)
    expected, used = module(x).detach(), module.quantizer(module.weight).detach()
    frozen = freeze(model)["0"]
    assert torch.equal(frozen.dequantize(), used)
    frozen.validate("0")
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["ternary-g32", "ternary-row", "ternary-tensor"])
def test_absmean_is_bitnets_formula_with_an_identity_gradient(spec):
    weight, _, module = layer(spec, "absmean")
    value = module.quantizer(module.weight)
    size = {"ternary-g32": 32, "ternary-row": 128, "ternary-tensor": weight.numel()}[spec]
    grouped = weight.reshape(-1, size)
    mean = grouped.abs().mean(1, keepdim=True).half().float()
    assert torch.equal(
        value.detach(), ((grouped / mean).round().clamp(-1, 1) * mean).view_as(weight)
    )
    upstream = torch.randn_like(weight)
    value.backward(upstream)
    assert torch.equal(module.weight.grad, upstream), "no mask: weights far outside still move"


@pytest.mark.parametrize(
    ("spec", "n", "shift"), [("w2h-g32", 2, 0.5), ("w2h", 2, 0.5), ("ternary-g32", 1.5, 0.0)]
)
def test_seq_is_paretoqs_formula(spec, n, shift):
    weight, _, module = layer(spec, "seq")
    with torch.no_grad():
        module.quantizer.scale.copy_(stretched_scale(weight, module.quantizer.spec))
    size = 128 if spec == "w2h" else 32
    grouped = weight.view(24, -1, size)
    largest = (module.quantizer.scale.detach().half().float() * n)[
        ..., None
    ]  # a, as the stored scale gives it
    assert torch.allclose(largest[..., 0], grouped.abs().amax(-1), rtol=1e-3)
    expected = (
        largest * ((torch.clip(grouped / largest, -0.99, 0.99) * n - shift).round() + shift) / n
    )
    value = module.quantizer(module.weight)
    assert torch.allclose(value.detach(), expected.view_as(weight), atol=1e-6)
    upstream = torch.randn_like(weight)
    value.backward(upstream)
    step = largest / n
    inside = (
        (grouped - expected) / step
    ).abs() <= 0.5  # all but a largest weight whose scale was rounded down
    slope = torch.where(inside, (expected - grouped) / step, expected / step)
    by_hand = (slope * upstream.view_as(grouped)).sum(-1) * lsq_factor(
        module.quantizer.spec, 24, 128
    )
    assert torch.allclose(module.quantizer.scale.grad, by_hand, rtol=1e-3, atol=1e-5)
    assert torch.equal(module.weight.grad, upstream * inside.view_as(weight))
    assert float(inside.float().mean()) > 0.95
    with pytest.raises(LlmqError, match="half-integer"):
        WeightQuantizer(QuantSpec.parse("w4g32"), "seq")


def test_ste_follows_the_range_and_passes_the_gradient():
    weight, _, module = layer("w4g32", "ste")
    value = module.quantizer(module.weight)
    scale = (2 * weight.view(24, 4, 32).abs().amax(-1, keepdim=True) / 15).half().float()
    codes = ((weight.view(24, 4, 32) / scale).round() + 8).clamp(0, 15)
    assert torch.equal(value.detach(), ((codes - 8) * scale).view(24, 128))
    upstream = torch.randn_like(weight)
    value.backward(upstream)
    assert torch.equal(module.weight.grad, upstream)
    assert not list(module.quantizer.parameters())


def test_gradual_quantization_keeps_a_gradient_for_the_scales():
    _, _, module = layer("w2g32-asym")
    x = torch.randn(5, 128)
    full = module(x)
    module.strength = 0.25
    blended = module.weight + 0.25 * (module.quantizer(module.weight) - module.weight)
    assert torch.allclose(module(x), x @ blended.T, atol=1e-5)
    assert not torch.allclose(module(x), full)
    module(x).sum().backward()
    quarter = module.quantizer.scale.grad.clone()
    module.zero_grad()
    module.strength = 1.0
    module(x).sum().backward()
    assert torch.allclose(quarter, 0.25 * module.quantizer.scale.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_prepare_and_freeze_a_model(model_type, tmp_path, tokenizer):
    model = make_model(model_type)
    names = [found.name for found in quantizable_layers(meta_model(model.config))]
    start = {
        name: QuantizedTensor.quantize(
            linear_weight(model.get_submodule(name)).detach().float(), QuantSpec.parse("w3g32-asym")
        )
        for name in names
    }
    prepare(model, start)
    assert set(fake_quant_modules(model)) == set(names)
    ids = torch.randint(2, 2048, (2, 16))
    model(input_ids=ids).logits.square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
        trained = model(input_ids=ids).logits
    freeze(model)
    assert set(quantized_modules(model)) == set(names)
    llmq.save(model, tmp_path / "out", tokenizer=tokenizer)
    with torch.no_grad():
        packed = model(input_ids=ids).logits
        assert torch.equal(
            llmq.load(tmp_path / "out", dtype="float32")(input_ids=ids).logits, packed
        )
    assert torch.allclose(packed, trained, atol=1e-4)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_training_a_model_starts_from_its_quantized_one(method):
    model, ids = make_model(), torch.randint(2, 2048, (4, 16))
    recipe = llmq.Recipe.uniform("w3g32-asym", method=method)
    llmq.quantize(start := copy.deepcopy(model), recipe, ids)
    llmq.prepare_qat(model, recipe, ids)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, start(input_ids=ids).logits, atol=1e-4)


SCHEMES = [(spec, "lsq", "none") for spec in SPECS] + [
    ("w4g32", "ste", "int8-token"),
    ("w2h-g32", "seq", "none"),
    ("ternary-g32", "seq", "none"),
    ("ternary-row", "absmean", "none"),
    ("ternary-tensor", "absmean", "int8-token"),
    ("w8", "lsq", "int8-static"),
]


@pytest.mark.parametrize(("spec", "quantizer", "activations"), SCHEMES)
def test_every_scheme_from_a_model_in_memory_to_a_folder(
    spec, quantizer, activations, tmp_path, tokenizer
):
    """Trained, frozen, saved in the format that holds it, loaded: codes and logits stay the same
    bit for bit."""
    model, ids = make_model(), torch.randint(2, 2048, (4, 16))
    recipe = llmq.Recipe.uniform(spec, method="rtn", activations=ActSpec(activations))
    llmq.prepare_qat(model, recipe, ids, quantizer=quantizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model(input_ids=ids, labels=ids).loss.backward()
    for module in fake_quant_modules(model).values():
        assert all(
            parameter.grad.any()
            for name, parameter in module.named_parameters()
            if name != "quantizer.zero"
        ), "zero points get theirs from clipped weights only"
    optimizer.step()
    with torch.no_grad():
        used = {
            name: module.quantizer(module.weight)
            for name, module in fake_quant_modules(model).items()
        }
        frozen = llmq.freeze(model, recipe.activations)
        assert all(torch.equal(frozen[name].dequantize(), value) for name, value in used.items())
        llmq.save(model, tmp_path / "out", tokenizer=tokenizer)
        loaded = llmq.load(tmp_path / "out", dtype="float32")
        assert all(
            torch.equal(module.qtensor().dequantize(), used[name])
            for name, module in quantized_modules(loaded).items()
        )
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    is_bitnet = (spec, activations) == ("ternary-tensor", "int8-token")
    assert load_config(tmp_path / "out").quantization_config["quant_method"] == (
        "bitnet"
        if is_bitnet
        else "llmq"
        if spec.startswith(("ternary", "w2h"))
        else "compressed-tensors"
    )


def test_activations_are_not_lost_when_a_model_is_frozen():
    model = make_model()
    recipe = llmq.Recipe.uniform("w4g32", method="rtn", activations=ActSpec("int8-token"))
    llmq.prepare_qat(model, recipe)
    with pytest.raises(LlmqError, match="trained with activations int8-token, not none"):
        llmq.freeze(model)
    llmq.freeze(model, recipe.activations)
    assert {module.activations for module in quantized_modules(model).values()} == {
        recipe.activations
    }


def test_act_order_weights_are_refused():
    model = make_model()
    weight = torch.randn(64, 64)
    plain = QuantizedTensor.quantize(weight, QuantSpec.parse("w4g32"))
    ordered = QuantizedTensor(
        plain.packed,
        plain.scale,
        plain.zero,
        plain.spec,
        plain.shape,
        torch.arange(64, dtype=torch.int32) // 32,
    )
    with pytest.raises(LlmqError, match="act-order"):
        prepare(model, {"model.layers.0.self_attn.q_proj": ordered})


def test_a_learned_scale_never_crosses_zero():
    _, _, module = layer("w4g32")
    with torch.no_grad():
        module.quantizer.scale[:2, 0] = torch.tensor([-0.3, 0.0])
    assert bool(module(torch.randn(3, 128)).isfinite().all())
    assert bool((module.quantizer.scale > 0).all()), "a forward pass mends what an optimizer did"
    with torch.no_grad():
        module.quantizer.scale[0, 0] = -0.3
    qtensor = module.qtensor()
    qtensor.validate("layer")
    assert 0 < float(qtensor.scale[0, 0]) < 1e-4
