"""compressed-tensors against its definition, written out independently, and whole folders."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

import llmq
from llmq.errors import LlmqError, LlmqWarning
from llmq.formats.compressed import COMPRESSED, CompressedTensors
from llmq.formats.registry import choose_format
from llmq.formats.settings import quantization_settings
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import quantized_modules
from llmq.recipe import Layer, LayerPlan, Recipe, Rule

N, K = 24, 96
TOKENS = torch.arange(1, 17)[None]


def bits_of(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Rows of whole numbers from rows of int32 words: bit i of a row is bit i % 32 of word i // 32,
    the lowest bit of a number first."""
    rows = []
    for row in words.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
        rows.append([stream >> (bits * i) & ((1 << bits) - 1) for i in range(count)])
    return torch.tensor(rows)


def values_by_definition(stored, spec):
    """The weight of stored tensors, in float32."""
    middle = 1 << (spec.bits - 1)
    if "weight" in stored:
        codes = stored["weight"].long()
    else:
        assert stored["weight_shape"].tolist() == [N, K]
        codes = bits_of(stored["weight_packed"], spec.bits, K) - middle
    scale, zero = stored["weight_scale"].float().view(-1, stored["weight_scale"].shape[-1]), 0
    if "weight_zero_point" in stored:
        zero = stored["weight_zero_point"]
        if zero.dtype == torch.int32:
            zero = bits_of(zero.T, spec.bits, N).T - middle
        zero = zero.long().repeat_interleave(K // zero.shape[-1], -1)
    return (codes - zero) * scale.repeat_interleave(K // scale.shape[-1], -1)


@pytest.mark.parametrize(
    "text", ["w2g32", "w3g32-asym", "w4g48", "w4g32-asym", "w4-asym", "w5", "w8", "w4-tensor"]
)
@pytest.mark.parametrize("kind", ["none", "int8-token"])
def test_definition_and_round_trip(text, kind):
    tensor = QuantizedTensor.quantize(torch.randn(N, K), QuantSpec.parse(text))
    fmt = COMPRESSED.given(ActSpec(kind))
    stored, config = fmt.write(tensor), fmt.write_config({"layer": tensor.spec})
    assert ("weight" in stored) == (text == "w8" and kind != "none")
    assert torch.equal(values_by_definition(stored, tensor.spec), tensor.dequantize())
    read = fmt.read("layer", stored, config, (N, K))
    read.validate("layer")
    assert (read.spec, fmt.activations_of("layer", config)) == (tensor.spec, ActSpec(kind))
    assert torch.equal(read.packed, tensor.packed)


RULES = {
    "mixed": (Rule("*.down_proj", QuantSpec.parse("w8")), Rule("*.o_proj", None)),
    "zero points": (Rule("*.down_proj", QuantSpec.parse("w4g64-asym")),),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("rules", "kind"), [("mixed", "none"), ("zero points", "int8-token"), ("mixed", "int8-static")]
)
def test_a_folder_loads_as_it_was_saved(rules, kind, tmp_path):
    model = make_model()
    recipe = Recipe(
        rules=(*RULES[rules], Rule("*", QuantSpec.parse("w4g32"))),
        method="rtn",
        activations=ActSpec(kind),
    )
    llmq.quantize(model, recipe, TOKENS)
    llmq.save(model, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    named = {name for group in settings["config_groups"].values() for name in group["targets"]}
    assert named == quantized_modules(model).keys()
    kept = {name for name, _ in model.named_modules() if name.endswith("o_proj")}
    assert set(settings["ignore"]) == (kept if rules == "mixed" else set()) | {"lm_head"}
    loaded = llmq.load(tmp_path / "out")
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_one_spec_for_all_is_said_of_the_class():
    config = COMPRESSED.write_config({"a.q_proj": QuantSpec.parse("w4g32"), "a.o_proj": None})
    config = COMPRESSED.with_kept(config, ["lm_head", "a.o_proj", "a.router"])
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    assert config["ignore"] == ["a.o_proj", "lm_head", "a.router"]
    assert config["format"] == "pack-quantized"


def test_auto_takes_it_first_and_leaves_what_it_cannot_hold():
    def plans(*texts, is_transposed=False):
        return [
            LayerPlan(Layer(f"layer.{i}", (N, K), is_transposed), QuantSpec.parse(text))
            for i, text in enumerate(texts)
        ]

    for texts in (("w4g32",), ("w2", "w8"), ("w3g32-asym",), ("w4-tensor",)):
        assert choose_format("auto", plans(*texts)) is COMPRESSED
    chosen = choose_format("auto", plans("w8"), ActSpec("int8-token"))
    assert isinstance(chosen, CompressedTensors)
    assert chosen.activations == ActSpec("int8-token")
    assert choose_format("auto", plans("w4g32", "ternary")).name == "llmq"
    assert choose_format("auto", plans("w4g32"), act_order=True).name != COMPRESSED.name
    assert choose_format("auto", plans("w4", is_transposed=True)).name != COMPRESSED.name
    name = COMPRESSED.name
    for refused, activations, reason in (
        (plans("ternary"), ActSpec(), "no ternary codes"),
        (plans("w2h"), ActSpec(), "whole zero points"),
        (plans("w4g64"), ActSpec(), "divisible by the group size"),
        (plans("w4", is_transposed=True), ActSpec(), "transposed"),
        (plans("w8"), ActSpec("int8-token", 8), "KV-cache scheme"),
    ):
        with pytest.raises(LlmqError, match=f"{reason}.*--format llmq"):
            choose_format(name, refused, activations)
    with pytest.raises(LlmqError, match="act-order"):
        choose_format(name, plans("w4g32"), act_order=True)


def test_columns_in_another_order_are_read_and_not_written():
    spec = QuantSpec.parse("w4g32")
    tensor = QuantizedTensor.quantize(torch.randn(N, K), spec)
    order = torch.randperm(K).to(torch.int32) // 32
    moved = QuantizedTensor.from_codes(tensor.codes(), tensor.scale, None, spec, order)
    with pytest.raises(LlmqError, match="act-order"):
        COMPRESSED.write(moved)
    stored, config = COMPRESSED.write(tensor), COMPRESSED.write_config({"layer": spec})
    read = COMPRESSED.read("layer", {**stored, "weight_g_idx": order}, config, (N, K))
    assert torch.equal(read.dequantize(), moved.dequantize())
    for trivial in (torch.arange(K) // 32, torch.full((K,), -1)):
        stored["weight_g_idx"] = trivial.to(torch.int32)
        assert COMPRESSED.read("layer", stored, config, (N, K)).g_idx is None


def test_words_that_no_code_went_over_are_read():
    """Ten codes of 3 bits to a word, as older compressed-tensors packed them."""
    spec = QuantSpec.parse("w3g32")
    tensor = QuantizedTensor.quantize(torch.randn(N, K), spec)
    codes = torch.nn.functional.pad(tensor.codes().long(), (0, -K % 10)).view(N, -1, 10)
    words = sum(codes[:, :, i] << (3 * i) for i in range(10)).to(torch.int32)
    stored = {**COMPRESSED.write(tensor), "weight_packed": words}
    read = COMPRESSED.read("layer", stored, COMPRESSED.write_config({"layer": spec}), (N, K))
    assert torch.equal(read.packed, tensor.packed)


GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FOREIGN = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["re:.*mlp.*"],
            "weights": {**GROUP, "num_bits": 8},
            "input_activations": None,
        },
        "group_1": {
            "targets": ["Linear"],
            "weights": {**GROUP, "actorder": "weight", "observer": "minmax"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": "token",
                "dynamic": True,
                "symmetric": True,
            },
        },
    },
    "kv_cache_scheme": None,
    "sparsity_config": {"format": "dense"},
    "transform_config": {},
}


def test_the_most_specific_target_decides():
    settings = quantization_settings(SimpleNamespace(quantization_config=FOREIGN))
    for name, bits, kind in (
        ("model.layers.0.mlp.up_proj", 8, "none"),
        ("model.layers.0.self_attn.q_proj", 4, "int8-token"),
    ):
        fmt = COMPRESSED.given(ActSpec("int8-token") if bits == 8 else ActSpec())
        tensor = QuantizedTensor.quantize(torch.randn(N, K), QuantSpec(f"int{bits}", 32))
        read = COMPRESSED.read(name, fmt.write(tensor), settings, (N, K))
        assert torch.equal(read.dequantize(), tensor.dequantize())
        assert COMPRESSED.activations_of(name, settings).kind == kind


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "marlin-24"}, "marlin-24"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "is pruned"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "rotates"),
        ({"quantization_status": "initialized"}, "quantization_status"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"a": {"targets": 3}}}, "targets"),
        ({"config_groups": {"a": {"targets": [], "weights": {"num_bits": 7}}}}, "num_bits"),
        ({"config_groups": {"a": {"targets": [], "weights": {"dynamic": True}}}}, "dynamic"),
        ({"config_groups": {"a": {"targets": [], "weights": {"strategy": "group"}}}}, "group_size"),
        ({"config_groups": {"a": {"targets": ["re:("]}}}, "regular expression"),
    ],
    ids=str,
)
def test_settings_that_would_be_read_otherwise_are_refused(change, reason):
    with pytest.raises(LlmqError, match=reason):
        quantization_settings(SimpleNamespace(quantization_config={**FOREIGN, **change}))


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("weight_packed", lambda each: each[:-1]),
        ("weight_packed", None),
        ("weight_shape", lambda each: each + 1),
        ("weight_scale", lambda each: each[:, :-1]),
        ("weight_scale", lambda each: each.to(torch.int8)),
        ("weight_zero_point", lambda each: each[:-1]),
        ("weight_zero_point", None),
        ("input_scale", None),
        ("input_zero_point", lambda each: each.float()),
    ],
)
def test_damage_is_named(suffix, change):
    spec = QuantSpec.parse("w4g32-asym")
    tensor = QuantizedTensor.quantize(torch.randn(N, K), spec)
    fmt = COMPRESSED.given(ActSpec("int8-static"))
    stored = fmt.write(tensor)
    stored |= {"input_scale": torch.ones(1), "input_zero_point": torch.zeros(1, dtype=torch.int8)}
    stored[suffix] = stored[suffix] if change is None else change(stored[suffix])
    if change is None:
        del stored[suffix]
    with pytest.raises(LlmqError, match=rf"layer.*{suffix}"):
        fmt.read("layer", stored, fmt.write_config({"layer": spec}), (N, K))


@torch.no_grad()
def test_what_has_no_kernel_is_loaded_in_full_precision_and_said(tmp_path, capsys):
    from llmq.commands.cli import main

    model = make_model()
    llmq.quantize(model, Recipe.uniform("w4g32", method="rtn"))
    llmq.save(model, tmp_path / "out")
    config_path, path = tmp_path / "out" / "config.json", tmp_path / "out" / "model.safetensors"
    (tmp_path / "out" / "llmq-manifest.json").unlink()
    config, tensors = json.loads(config_path.read_text()), load_file(path)
    layer = "model.layers.1.mlp.up_proj"
    for suffix in ("weight_packed", "weight_shape", "weight_scale"):
        del tensors[f"{layer}.{suffix}"]
    tensors[f"{layer}.weight"] = torch.randn(128, 64).to(torch.float8_e4m3fn)
    tensors[f"{layer}.weight_scale"] = torch.rand(128, 1).bfloat16() + 0.1
    settings = config["quantization_config"]
    (group,) = settings["config_groups"].values()
    floats = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    inputs = {**floats, "strategy": "token", "dynamic": True}
    settings["config_groups"]["floats"] = {
        **group,
        "targets": [layer],
        "weights": floats,
        "input_activations": inputs,
    }
    settings["kv_cache_scheme"] = {**floats, "strategy": "tensor"}
    config_path.write_text(json.dumps(config))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.warns(LlmqWarning) as told:
        loaded = llmq.load(tmp_path / "out")
    texts = " ".join(str(each.message) for each in told)
    for expected in ("1 layers of FP8, for which", "8-bit float, token", "keys and"):
        assert expected in texts
    weight = loaded.get_submodule(layer).weight
    expected = tensors[f"{layer}.weight"].float() * tensors[f"{layer}.weight_scale"].float()
    assert torch.equal(weight, expected.to(weight.dtype))
    assert len(quantized_modules(loaded)) == 13
    assert torch.isfinite(loaded(TOKENS).logits).all()
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "1 layers of FP8" in capsys.readouterr().out
