"""A quantized model in memory is written as what it is, or not at all."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from conftest import make_model
from format_models import quantized_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llmq
from llmq.errors import LlmqError, LlmqWarning
from llmq.formats.bitnet import BITNET
from llmq.formats.registry import NAMES
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.head import quantize_head
from llmq.inference.module import quantized_modules, swap
from llmq.qat.weights import prepare
from llmq.recipe import Recipe, Rule

TOKENS = torch.randint(2, 2048, (2, 16), generator=torch.Generator().manual_seed(0))
W4 = Recipe.uniform("w4g32", method="rtn")


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
def test_save_pretrained_after_quantizing_in_memory_loads_as_it_was(model_type, tmp_path):
    model = make_model(model_type)
    rules = (Rule("*.1.*", QuantSpec("int8", -1)), Rule("*", QuantSpec("int4", 32)))
    recipe = Recipe(rules=rules, method="rtn", activations=ActSpec("int8-token", 8))
    llmq.quantize(model, recipe)
    expected = model(TOKENS).logits
    copied = pickle.loads(pickle.dumps(copy.deepcopy(make_pristine(model))))
    for name, each in (("first", model), ("copy", copied)):
        each.save_pretrained(tmp_path / name)
        for load in (llmq.load, AutoModelForCausalLM.from_pretrained):
            assert torch.equal(load(tmp_path / name)(TOKENS).logits, expected)


def make_pristine(model):
    """Back to the canonical words: what has run may not be picklable."""
    model.state_dict()
    return model


@torch.no_grad()
def test_save_pretrained_after_training_loads_as_it_was(tmp_path):
    model, start = make_model(), make_model()
    llmq.quantize(start, W4)
    found = {
        name: m.qtensor() for name, m in llmq.inference.module.quantized_modules(start).items()
    }
    prepare(model, found)
    llmq.freeze(model)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(llmq.load(tmp_path / "out")(TOKENS).logits, model(TOKENS).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [each if each == "gptq" else pytest.param(each, marks=pytest.mark.slow) for each in NAMES],
)
def test_save_pretrained_keeps_the_format_of_a_folder(name, tmp_path):
    first, second = quantized_folder(tmp_path / "first", name), tmp_path / "second"
    loaded = llmq.load(first)
    loaded.save_pretrained(second)
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    settings = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (first, second)
    ]
    if name != "llmq":  # whose config says more of a model in memory
        assert settings[0] == settings[1]
    assert torch.equal(llmq.load(second)(TOKENS).logits, loaded(TOKENS).logits)


def test_save_pretrained_refuses_what_the_loaded_format_cannot_hold(tmp_path):
    loaded = llmq.load(quantized_folder(tmp_path / "first", "gptq"))
    name, module = next(iter(quantized_modules(loaded).items()))
    odd = QuantizedTensor.quantize(module.weight.float(), QuantSpec("int5", 32))
    swap(loaded, {name: odd})
    with pytest.raises(LlmqError, match=f"format gptq cannot hold {name}"):
        loaded.save_pretrained(tmp_path / "second")
    assert not list(tmp_path.glob("second/*.safetensors"))


def test_a_model_with_adapters_on_its_layers_is_not_written(tmp_path):
    model = make_model()
    llmq.quantize(model, W4)
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    layer.base_layer = None  # as PEFT's layers have one
    with pytest.raises(LlmqError, match=r"llmq\.merge_adapter"):
        llmq.save(model, tmp_path / "out")


@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_head_that_was_rounded_for_a_run_is_not_written(is_quantized, tmp_path):
    model = make_model()
    if is_quantized:
        llmq.quantize(model, W4)
    quantize_head(model, 8)
    with pytest.raises(LlmqError, match="rounded for this run"):
        model.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_generation_config_that_cannot_be_written_costs_no_model(tmp_path):
    model = make_model()
    llmq.quantize(model, W4)
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.5
    with pytest.warns(LlmqWarning, match="left out"):
        llmq.save(model, tmp_path / "out")
    llmq.load(tmp_path / "out")


def test_the_bias_of_a_bitnet_layer_is_scaled_where_its_class_scales_it():
    qtensor = QuantizedTensor.quantize(torch.randn(8, 32), QuantSpec("ternary", 0))
    tensors, bias = BITNET.write(qtensor), torch.randn(8)
    assert torch.equal(BITNET.bias(bias, tensors, {}), bias)
    scaled = BITNET.bias(bias, tensors, {"linear_class": "autobitlinear"})
    torch.testing.assert_close(scaled, bias * tensors["weight_scale"])


def test_who_names_no_format_hears_who_reads_act_order(tmp_path):
    model = make_model()
    llmq.quantize(model, Recipe.uniform("w4g32", method="gptq", order="act"), TOKENS)
    with pytest.warns(LlmqWarning, match="act-order.*written as gptq, for llmq, .*GPTQModel"):
        llmq.save(model, tmp_path / "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LlmqWarning)
        llmq.save(model, tmp_path / "named", format="gptq")
