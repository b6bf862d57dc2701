"""A quantized folder is quantized again where that is asked for, as the model that it stands
for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

import llmq
from llmq.commands.cli import main
from llmq.errors import LlmqError
from llmq.formats.requantizing import full_precision
from llmq.inference.module import quantized_modules
from llmq.models.arch import weight_as_stored
from llmq.models.source import Source
from llmq.models.stored import StoredModel
from llmq.recipe import Recipe

SMALL = {"dtype": torch.bfloat16, "num_hidden_layers": 1}
SPECS = {"gptq": "w4g32", "awq": "w4g32-asym", "compressed-tensors": "w4g32", "llmq": "w3g32-asym"}
N, K = 64, 128


def packed(folder: Path, tokenizer, format: str, model_type: str = "llama") -> Path:
    model = make_model(model_type, **SMALL)
    llmq.quantize(model, Recipe.uniform(SPECS[format], method="rtn"))
    llmq.save(model, folder, format=format, tokenizer=tokenizer)
    return folder


def unpacked(folder: Path, out: Path, tokenizer, model_type: str = "llama") -> Path:
    """The model in bfloat16 that a folder stands for."""
    plain, model = make_model(model_type, **SMALL), llmq.load(folder)
    for name, module in quantized_modules(model).items():
        layer = plain.get_submodule(name)
        layer.weight.data = weight_as_stored(layer, module.qtensor().dequantize()).bfloat16()
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("format", "model_type"), [*((format, "llama") for format in SPECS), ("llmq", "gpt2")]
)
def test_what_it_becomes_is_what_the_model_in_bfloat16_becomes(
    format, model_type, tmp_path, tokenizer
):
    folder = packed(tmp_path / "packed", tokenizer, format, model_type)
    with pytest.raises(LlmqError, match=r"quantized already.*--allow-requantize") as caught:
        llmq.quantize(folder, tmp_path / "out", "w2g32", method="rtn")
    assert "\n" not in str(caught.value)
    options = {"method": "rtn", "format": "llmq"}
    report = llmq.quantize(folder, tmp_path / "out", "w2g32", allow_requantize=True, **options)
    plain = unpacked(folder, tmp_path / "plain", tokenizer, model_type)
    llmq.quantize(plain, tmp_path / "expected", "w2g32", **options)
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert sum(report["source_precision"].values()) == report["n_quantized_layers"]
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "llmq"


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_what_it_becomes_may_be_of_the_same_format(format, tmp_path, tokenizer):
    """Whose parts have the names of those that are read."""
    folder = packed(tmp_path / "packed", tokenizer, format)
    recipe = Recipe.uniform("w8", method="rtn")
    llmq.quantize(folder, tmp_path / "out", recipe, format=format, allow_requantize=True)
    found = quantized_modules(llmq.load(tmp_path / "out"))
    assert {str(module.spec) for module in found.values()} == {"w8"}


def test_on_the_command_line(tmp_path, tokenizer, capsys):
    folder = packed(tmp_path / "packed", tokenizer, "gptq")
    command = [str(folder), "--method", "rtn", "--rule", "*.down_proj=keep", "--bits", "3"]
    assert main(["plan", *command]) == 2
    assert "--allow-requantize" in capsys.readouterr().err
    assert main(["plan", *command, "--allow-requantize", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert sum(plan["source_precision"].values()) == 7
    assert plan["notes"]["kept weights"].startswith("1 are stored in fewer bits")


def test_text_of_its_own_is_written_by_the_packed_model(tmp_path, tokenizer):
    source = full_precision(Source.open(packed(tmp_path / "packed", tokenizer, "gptq")), True)
    assert quantized_modules(llmq.load(source))


def test_a_part_without_the_codes_is_named(tmp_path, tokenizer):
    folder = packed(tmp_path / "packed", tokenizer, "gptq")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.qweight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = full_precision(Source.open(folder), True)
    with pytest.raises(LlmqError, match=r"mlp\.up_proj") as caught:
        StoredModel.of(source)
    assert "\n" not in str(caught.value)


PRESETS = {
    "W4A16": "pack-quantized",
    "FP8_DYNAMIC": "float-quantized",
    "NVFP4A16": "nvfp4-pack-quantized",
    "MXFP4A16": "mxfp4-pack-quantized",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_folders_of_compressed_tensors_have_the_values_of_the_package(preset, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    layout, scheme = PRESETS[preset], preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    if args.type == "int":
        args.group_size = 32
    compressor = BaseCompressor.get_value_from_registry(layout)
    make_model(**SMALL).save_pretrained(tmp_path)
    stored, expected = {}, {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        stored[name] = weight
        if not name.endswith("proj.weight"):
            continue
        size = args.group_size or weight.shape[1]
        top = weight.abs().view(len(weight), -1, size).amax(-1)
        largest = 7.5 if args.type == "int" else 448 if args.num_bits == 8 else 6
        state = {"weight": weight, "weight_scale": top / largest}
        if layout.startswith("nvfp4"):
            whole = (448 * 6 / weight.abs().amax()).float().view(1)
            scale = (state["weight_scale"] * whole).to(torch.float8_e4m3fn).float()
            state |= {"weight_global_scale": whole, "weight_scale": scale}
        if layout.startswith("mx"):
            exponents = torch.log2(state["weight_scale"].float()).ceil()
            state["weight_scale"] = torch.exp2(exponents).bfloat16()
        parts = compressor.compress(state, scheme)
        expected[name] = compressor.decompress(dict(parts), scheme)["weight"].bfloat16()
        del stored[name]
        prefix = name.removesuffix("weight")
        stored |= {f"{prefix}{key}": part.contiguous() for key, part in parts.items()}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    path = tmp_path / "config.json"
    settings = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
        "ignore": ["lm_head"],
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    source = full_precision(Source.open(tmp_path), True)
    found = source.tensors.read(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert sum(source.precision.values()) == 7


def test_a_gguf_file_has_the_values_of_the_package(tmp_path, tokenizer):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    folder, path = tmp_path / "packed", tmp_path / "model.gguf"
    model = make_model("qwen3", **SMALL)
    llmq.quantize(model, Recipe.uniform("w8g32", method="rtn"))
    llmq.save(model, folder, format="llmq", tokenizer=tokenizer)
    llmq.export(folder, path, format="gguf")
    with pytest.raises(LlmqError, match=r"model\.gguf: Q8_0 x 7\).*--allow-requantize"):
        llmq.quantize(path, tmp_path / "out", "w4g32", method="rtn")
    source = full_precision(Source.open(path), True)
    assert source.precision == {"Q8_0": 7}
    names = {"ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj", "attn_q": "self_attn.q_proj"}
    for tensor in gguf.GGUFReader(path).tensors:
        part = tensor.name.removeprefix("blk.0.").removesuffix(".weight")
        if part in names:
            name = f"model.layers.0.{names[part]}.weight"
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            expected = torch.from_numpy(values.copy()).bfloat16()
            assert torch.equal(source.tensors.read([name])[name], expected)
    llmq.quantize(path, tmp_path / "out", "w4g32", method="rtn", allow_requantize=True)
    assert llmq.load(tmp_path / "out")
