"""The GPTQ format against its definition, written out independently, and what other tools write."""

import numpy as np
import pytest
import torch
from conftest import make_model

from llmq.errors import LlmqError
from llmq.formats.engines import refused_by
from llmq.formats.gptq_settings import settings_of
from llmq.formats.registry import choose_format, format_named, result_of
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.recipe import Layer, LayerPlan


def unpack_columns(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of `[rows * bits / 32, columns]` words packed along the first axis, by the definition:
    a little-endian bitstream per column."""
    raw = np.ascontiguousarray(words.T).view(np.uint8)
    stream = np.unpackbits(raw, axis=1, bitorder="little").reshape(words.shape[1], -1, bits)
    return (stream * (1 << np.arange(bits))).sum(-1).T


def dequantize_by_definition(tensors, bits, v2):
    q = unpack_columns(tensors["qweight"].numpy(), bits).astype(np.float32)  # [K, N]
    z = unpack_columns(np.ascontiguousarray(tensors["qzeros"].numpy().T), bits).T.astype(
        np.float32
    ) + (0 if v2 else 1)  # [G, N]
    g = tensors["g_idx"].numpy()
    return torch.from_numpy((tensors["scales"].float().numpy()[g] * (q - z[g])).T.copy())


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_definition_and_round_trip(fmt, bits, group_size, symmetric):
    spec = QuantSpec(f"int{bits}", group_size, symmetric)
    tensor = QuantizedTensor.quantize(torch.randn(64, 96), spec)
    if fmt == "gptq" and not symmetric:
        assert "gptq_v2" in format_named(fmt).refusal(spec, (64, 96))
        return
    stored = format_named(fmt).write(tensor)
    assert stored["qweight"].shape == (96 * bits // 32, 64)
    assert stored["qzeros"].shape == (spec.n_groups(96), 64 * bits // 32)
    assert torch.equal(
        dequantize_by_definition(stored, bits, fmt == "gptq_v2"), tensor.dequantize()
    )
    config = format_named(fmt).write_config({"layer": spec})
    read = format_named(fmt).read("layer", stored, config, (64, 96))
    read.validate("layer")
    assert read.spec == spec
    assert torch.equal(read.packed, tensor.packed)
    assert torch.equal(read.dequantize(), tensor.dequantize())


def test_symmetric_zero_points_have_the_known_words():
    tensor = QuantizedTensor.quantize(torch.randn(32, 32), QuantSpec("int4", 32))
    for fmt, word in (("gptq", 0x77777777), ("gptq_v2", 0x88888888 - (1 << 32))):
        assert set(format_named(fmt).write(tensor)["qzeros"].flatten().tolist()) == {word}


def test_version_1_refuses_a_zero_point_of_zero():
    tensor = QuantizedTensor.quantize(torch.rand(32, 32), QuantSpec("int4", 32, symmetric=False))
    with pytest.raises(LlmqError, match="gptq_v2"):
        format_named("gptq").write(tensor)


def test_version_1_asymmetric_of_other_tools_is_read_value_by_value():
    """z = 16 is stored as 15 by old tools: shifting the decoded value gives 16, shifting the word
    would give 0."""
    tensor = QuantizedTensor.quantize(torch.randn(32, 32), QuantSpec("int4", 32))
    stored = format_named("gptq").write(tensor)
    stored["qzeros"] = torch.full_like(stored["qzeros"], -1)
    read = format_named("gptq").read(
        "layer", stored, {"bits": 4, "group_size": 32, "checkpoint_format": "gptq"}, (32, 32)
    )
    assert set(read.zero.flatten().tolist()) == {16}


def test_dynamic_overrides_first_match_wins():
    config = {
        "bits": 4,
        "group_size": 128,
        "dynamic": {"+:.*\\.down_proj$": {"bits": 8}, "-:.*o_proj": {}, ".*": {"group_size": 64}},
    }
    assert settings_of("model.layers.0.mlp.down_proj", config)["bits"] == 8
    assert settings_of("model.layers.0.mlp.down_proj", config)["group_size"] == 128
    assert settings_of("model.layers.0.mlp.up_proj", config)["group_size"] == 64


@pytest.mark.parametrize("change", ["qweight", "scales", "qzeros", "missing", "bits", "group_size"])
def test_damage_is_named(change):
    tensor = QuantizedTensor.quantize(torch.randn(32, 64), QuantSpec("int4", 32))
    stored, config = (
        format_named("gptq").write(tensor),
        {"bits": 4, "group_size": 32, "checkpoint_format": "gptq"},
    )
    if change == "missing":
        del stored["scales"]
    elif change in stored:
        stored[change] = stored[change][:-1]
    else:
        config[change] = {"bits": 8, "group_size": 64}[change]
    with pytest.raises(LlmqError, match="layer"):
        format_named("gptq").read("layer", stored, config, (32, 64))


def test_choice_of_format():
    def plans(*specs, shape=(64, 128)):
        return [
            LayerPlan(Layer(f"layer.{i}", shape), spec and QuantSpec.parse(spec))
            for i, spec in enumerate(specs)
        ]

    for each in ("w4g128", "w4g128-asym", "w3g128", "w4g16"):
        found = choose_format("auto", plans("w4g128", "w8", each, None))
        assert found.name == "compressed-tensors"
    assert choose_format("auto", plans("w4g128", "ternary")).name == "llmq"
    assert choose_format("auto", plans("w4"), ActSpec("int8-token", 8)).name == "llmq"
    with pytest.raises(LlmqError, match=r"layer\.0 \(ternary\).*no ternary codes"):
        choose_format("gptq", plans("ternary"))
    with pytest.raises(LlmqError, match="expected one of auto"):
        choose_format("onnx", plans("w4g128"))


def test_parts_of_one_layer_in_other_engines_agree_or_are_noted():
    def plans(**specs):
        return [
            LayerPlan(
                Layer(f"model.layers.0.part.{name}", (64, 128)), spec and QuantSpec.parse(spec)
            )
            for name, spec in specs.items()
        ]

    alike = plans(
        q_proj="w4g128",
        k_proj="w4g128",
        v_proj="w4g128",
        o_proj="w8",
        gate_proj="w8",
        up_proj="w8",
        down_proj="w4g128",
    )
    told = refused_by(result_of(format_named("gptq"), alike, ActSpec()))
    assert "one width" in told
    assert "vLLM" not in told.replace("vLLM on a CPU", "")
    for unlike in (
        plans(q_proj="w4g128", k_proj="w4g128", v_proj="w8"),
        plans(gate_proj="w4g128", up_proj="w4g64"),
        plans(q_proj="w4g128", k_proj=None),
    ):
        told = refused_by(result_of(choose_format("gptq", unlike), unlike, ActSpec()))
        assert f"SGLang: {unlike[0].layer.name}" in told
        assert refused_by(result_of(format_named("llmq"), unlike, ActSpec())) is None


def test_the_layers_that_others_make_of_several_have_their_own_patterns():
    """vLLM looks up qkv_proj and gate_up_proj, and takes the first pattern that matches."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    specs = {f"model.layers.{i}.part.{name}": QuantSpec() for i in range(2) for name in names}
    for name in ("q_proj", "k_proj", "v_proj"):
        specs[f"model.layers.0.part.{name}"] = QuantSpec("int8", 32)
        specs[f"model.layers.1.part.{name}"] = QuantSpec("int4", 32)
    specs["model.layers.1.part.q_proj"] = QuantSpec("int8", 32)  # these three are not alike
    specs["model.layers.1.part.gate_proj"] = specs["model.layers.1.part.up_proj"] = None
    config = format_named("gptq").write_config(specs)
    for name, spec in specs.items():
        read = settings_of(name, config)
        assert spec is None or (read["bits"], read["group_size"]) == (spec.bits, spec.group_size)
    assert settings_of("model.layers.0.part.qkv_proj", config)["bits"] == 8
    joint = [key for key in config["dynamic"] if "qkv" in key or "gate_up" in key]
    assert joint == [
        r"+:model\.layers\.0\.part\.qkv_proj$",
        r"-:model\.layers\.1\.part\.gate_up_proj$",
    ]


def write_foreign_folder(folder, tokenizer, quantization_config, v2=False, **kept):
    """A folder as GPTQModel or AutoRound lay it out: the same tensor names, their own config keys,
    one file, no index, no manifest."""
    from safetensors.torch import save_file

    model = make_model(dtype=torch.float16)
    spec = QuantSpec("int4", 32, symmetric=not v2)
    expected, tensors = {}, {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 2 and ".layers." in name:
            layer = name.removesuffix(".weight")
            quantized = QuantizedTensor.quantize(tensor.float(), spec)
            expected[layer] = quantized.dequantize()
            tensors |= {
                f"{layer}.{suffix}": part
                for suffix, part in format_named("gptq_v2" if v2 else "gptq")
                .write(quantized)
                .items()
            }
        else:
            tensors[name] = tensor
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "quantization_config": quantization_config,
        "dtype": "float16",
    }
    (folder / "config.json").write_text(__import__("json").dumps(config))
    tokenizer.save_pretrained(folder)
    return model, expected


GPTQMODEL = {
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
    "pack_dtype": "int32",
    "meta": {"quantizer": ["gptqmodel:7.7.0"]},
}
AUTOROUND = {
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "data_type": "int",
    "iters": 200,
    "quant_method": "gptq",
    "autoround_version": "0.16.0",
    "damp_percent": 0.01,
    "desc_act": False,
    "true_sequential": False,
}
AUTOROUND_NATIVE = {
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "block_name_to_quantize": "model.layers",
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "v2"),
    [
        (GPTQMODEL, False),
        (AUTOROUND, False),
        (AUTOROUND_NATIVE, False),
        ({**GPTQMODEL, "checkpoint_format": "gptq_v2", "sym": False}, True),
    ],
)
def test_folders_of_other_tools(config, v2, tmp_path, tokenizer):
    import llmq
    from llmq.inference.module import quantized_modules

    model, expected = write_foreign_folder(tmp_path / "foreign", tokenizer, config, v2)
    loaded = llmq.load(tmp_path / "foreign", dtype="float32")
    assert dict.fromkeys(quantized_modules(loaded), True) == dict.fromkeys(expected, True)
    model = model.float()
    for name, weight in expected.items():
        model.get_submodule(name).weight.copy_(weight)
    tokens = torch.randint(2, 2048, (2, 16))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_modules_that_are_not_quantized_are_listed_by_where_they_begin():
    quantized = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    config = format_named("gptq").write_config(dict.fromkeys(quantized, QuantSpec.parse("w4g32")))
    names = [f"model.layers.{i}.mlp.gate" for i in range(2)]
    names += ["lm_head", "mtp.fc", "mtp.layers.0.up_proj", "model.visual.blocks.0.qkv"]
    dynamic = format_named("gptq").with_kept(config, names, quantized)["dynamic"]
    patterns = [r"model\.layers\.\d+\.mlp\.gate$", r"mtp\.", r"model\.visual\."]
    assert dynamic == {f"-:{pattern}": {} for pattern in patterns}


def test_kept_layers_beside_quantized_ones_are_listed_one_by_one():
    quantized = ["model.layers.0.up_proj", "model.layers.1.up_proj"]
    config = {"dynamic": {}}
    kept = ["model.layers.0.gate", "model.layers.2.up_proj"]
    found = format_named("gptq").with_kept(config, kept, quantized)["dynamic"]
    assert found.keys() == {r"-:model\.layers\.\d+\.gate$", r"-:model\.layers\.2\."}
    in_wrapper = ["model.language_model.layers.0.up_proj"]
    found = format_named("gptq").with_kept(config, ["model.language_model.layers.0.a"], in_wrapper)
    assert list(found["dynamic"]) == [r"-:.*layers\.\d+\.a$"]
