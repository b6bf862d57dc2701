"""A mixture of experts that was quantized in memory is stored as its folder would have been."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llmq
from tests.conftest import EXPERT_CONFIGS, make_model

TOKENS = torch.randint(3, 2000, (2, 24), generator=torch.Generator().manual_seed(0))
# What checkpoints of a family call the layers of its first expert.
OWN_NAMES = {
    "mixtral": "block_sparse_moe.experts.0.{w1,w2,w3}",
    "qwen3_moe": "mlp.experts.0.{down_proj,gate_proj,up_proj}",
    "gpt_oss": "mlp.experts.0.{down_proj,gate_proj,up_proj}",
}
KINDS = [
    kind if kind in ("mixtral", "gpt_oss") else pytest.param(kind, marks=pytest.mark.slow)
    for kind in EXPERT_CONFIGS
]
FORMATS = [
    name if name == "compressed-tensors" else pytest.param(name, marks=pytest.mark.slow)
    for name in ("compressed-tensors", "gptq", "llmq")
]


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def stored(folder):
    return load_file(folder / "model.safetensors")


def settings(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def names_of_first_expert(tensors):
    """Of its layers, as in `OWN_NAMES`."""
    layers = {name.rpartition(".")[0] for name in tensors if ".experts.0." in name}
    leaves = sorted({layer.rpartition(".")[2] for layer in layers})
    (prefix,) = {layer.split(".", 3)[3].rpartition(".")[0] for layer in layers}
    return f"{prefix}.{{{','.join(leaves)}}}"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_and_its_folder_are_stored_alike(kind, format, model_folder, tmp_path):
    source = model_folder(kind)
    recipe = {"recipe": "w4g32", "method": "rtn"}
    llmq.quantize(source, tmp_path / "folder", format=format, **recipe)
    model = llmq.load(source)
    llmq.quantize(model, **recipe)
    llmq.save(model, tmp_path / "memory", format=format)
    expected, found = stored(tmp_path / "folder"), stored(tmp_path / "memory")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert settings(tmp_path / "memory") == settings(tmp_path / "folder")
    if kind in OWN_NAMES:
        assert names_of_first_expert(found) == OWN_NAMES[kind]
    assert torch.equal(logits(llmq.load(tmp_path / "memory")), logits(model))


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_a_model_that_came_from_no_folder_has_the_names_of_its_family(kind, tmp_path):
    model = make_model(kind)
    llmq.quantize(model, "w4g32", method="rtn")
    expected = logits(model)
    llmq.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "own")
    for name in ("saved", "own"):
        assert names_of_first_expert(stored(tmp_path / name)) == OWN_NAMES[kind]
        assert torch.equal(logits(llmq.load(tmp_path / name)), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_save_pretrained_of_a_loaded_mixture_keeps_names_and_format(format, model_folder, tmp_path):
    llmq.quantize(model_folder("mixtral"), tmp_path / "first", "w4g32", method="rtn", format=format)
    loaded = llmq.load(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    llmq.save(loaded, tmp_path / "third", format=format)
    expected = stored(tmp_path / "first")
    for name in ("second", "third"):
        found = stored(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[each], tensor) for each, tensor in expected.items())
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_a_mixture_is_exported_under_its_names(kind, model_folder, tmp_path):
    llmq.quantize(model_folder(kind), tmp_path / "first", "w4g32", method="rtn")
    expected = logits(llmq.load(tmp_path / "first"))
    for format in ("gptq", "llmq", "compressed-tensors"):
        llmq.export(tmp_path / "first", tmp_path / format, format)
        assert names_of_first_expert(stored(tmp_path / format)) == OWN_NAMES[kind]
        assert torch.equal(logits(llmq.load(tmp_path / format)), expected)
    assert stored(tmp_path / "compressed-tensors").keys() == stored(tmp_path / "first").keys()
