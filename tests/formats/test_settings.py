"""Quantization settings are understood or refused, never replaced by usual ones."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model

import llmq
from llmq.errors import LlmqError
from llmq.formats.gptq_settings import settings_of
from llmq.formats.registry import NAMES
from llmq.formats.settings import quantization_settings, stored_result
from llmq.grid.spec import QuantSpec
from llmq.recipe import Recipe, Rule

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AUTO_ROUND = {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
AUTO_ROUND_AWQ = {**AUTO_ROUND, "packing_format": "auto_round:auto_awq"}
BITNET = {"quant_method": "bitnet", "linear_class": "bitlinear"}


def read(settings):
    return quantization_settings(SimpleNamespace(quantization_config=settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**GPTQ, "bits": True}, "bits True: expected a whole number"),
        ({**GPTQ, "bits": 4.0}, "bits 4.0"),
        ({**GPTQ, "bits": "4"}, "bits '4'"),
        ({**GPTQ, "bits": 5}, "bits is"),
        ({**GPTQ, "group_size": 32.0}, "group_size 32.0"),
        ({**GPTQ, "group_size": 0}, "group_size is"),
        ({**GPTQ, "sym": 1}, "sym 1: expected true"),
        ({**GPTQ, "desc_act": "no"}, "desc_act 'no'"),
        ({**GPTQ, "dynamic": [1]}, "dynamic .*expected an object"),
        ({**GPTQ, "dynamic": {"+:a": 4}}, "dynamic.*expected an object, got 4"),
        ({**GPTQ, "dynamic": {"+:a": {"bits": 7}}}, "dynamic.*bits is '7'"),
        ({**GPTQ, "dynamic": {"+:(": {}}}, "not a regular expression"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({**GPTQ, "checkpoint_format": ""}, "checkpoint_format ''"),
        ({**GPTQ, "checkpoint_format": "gptq", "format": "gptq_v2"}, "and format 'gptq_v2'"),
        ({**GPTQ, "pack_dtype": "int8"}, "pack_dtype 'int8'"),
        ({**GPTQ, "is_marlin_format": True}, "Marlin"),
        ({**AUTO_ROUND, "packing_format": "auto_round:fake"}, "auto_round:fake"),
        ({**AUTO_ROUND_AWQ, "extra_config": {"a.b": {"bits": 8}}}, "extra_config.*bits is '8'"),
        ({**AUTO_ROUND_AWQ, "extra_config": {"a.b": 8}}, "extra_config.*an object"),
        ({**AUTO_ROUND, "data_type": "mx_fp"}, "data_type 'mx_fp'"),
        ({**AUTO_ROUND, "act_bits": 8}, "act_bits 8"),
        ({**AUTO_ROUND, "extra_config": {"a.b": {"bits": 5}}}, "bits is '5'"),
        ({**BITNET, "linear_class": "foo"}, "linear_class is 'foo'"),
        ({**BITNET, "linear_class": None}, "linear_class None"),
        ({**BITNET, "quantization_mode": "online"}, "autobitlinear"),
        ({**BITNET, "quantization_mode": "x"}, "quantization_mode is 'x'"),
        ({**BITNET, "use_rms_norm": True}, "use_rms_norm"),
        ({"quant_method": "llmq", "format": "foo"}, "format 'foo': expected one of"),
        ({"quant_method": "llmq", "format": ["llmq"]}, "format"),
        ({"quant_method": ["gptq"]}, "quant_method"),
        ({}, "quantization method None"),
    ],
)
def test_values_that_are_not_understood_are_refused(settings, message):
    with pytest.raises(LlmqError, match=message):
        read(settings)


@pytest.mark.parametrize(
    "settings", [GPTQ, AUTO_ROUND, AUTO_ROUND_AWQ, BITNET, {"quant_method": "llmq"}]
)
def test_values_that_are_understood_pass(settings):
    assert read(settings)["format"] in NAMES


@pytest.mark.parametrize(
    ("packing", "name"),
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round", "gptq_v2"),
        ("auto_round:gptqmodel", "gptq_v2"),
        ("auto_round:auto_awq", "awq"),
    ],
)
@torch.no_grad()
def test_the_packings_of_autoround_are_the_layouts_that_they_are(packing, name, tmp_path):
    """Zero points that are stored minus one, as they are, and in AWQ's order."""
    model = make_model()
    spec = "w4g32" if name == "gptq" else "w4g32-asym"
    llmq.quantize(model, Recipe.uniform(spec, method="rtn"))
    llmq.save(model, tmp_path / "out", format=name)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "auto-round",
        "packing_format": packing,
        "data_type": "int",
        "bits": 4,
        "group_size": 32,
        "sym": spec == "w4g32",
        "extra_config": {".*lm_head.*": {"bits": 16}},
    }
    path.write_text(json.dumps(config))
    (tmp_path / "out" / "quantize_config.json").unlink(missing_ok=True)
    tokens = torch.arange(1, 17)[None]
    loaded = llmq.load(tmp_path / "out")
    assert loaded.hf_quantizer.stored_format.name == name
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_layers_of_their_own_in_an_autoround_folder():
    extra = {"model.layers.1.mlp.up_proj": {"bits": 8}, ".*k_proj": {"bits": 2, "group_size": 64}}
    extra["lm_head"] = {"bits": 16}
    settings = read({**AUTO_ROUND, "extra_config": extra})
    found = {
        name: settings_of(name, settings)["bits"]
        for name in ("model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "a.k_proj")
    }
    assert list(found.values()) == [8, 4, 2]


@torch.no_grad()
def test_an_autoround_folder_of_mixed_bits_is_the_gptq_folder_that_it_is(tmp_path):
    model = make_model()
    rules = (Rule("*.down_proj", QuantSpec("int8", 32)), Rule("*", QuantSpec("int4", 32)))
    llmq.quantize(model, Recipe(rules=rules, method="rtn"))
    llmq.save(model, tmp_path / "out", format="gptq")
    path = tmp_path / "out" / "config.json"
    extra = {
        f"model.layers.{i}.mlp.down_proj": {"bits": 8, "group_size": 32, "sym": True}
        for i in range(2)
    }
    config = json.loads(path.read_text())
    config["quantization_config"] = {**AUTO_ROUND, "extra_config": extra}
    path.write_text(json.dumps(config))
    tokens = torch.arange(1, 17)[None]
    assert torch.equal(llmq.load(tmp_path / "out")(tokens).logits, model(tokens).logits)


def test_an_unknown_format_is_refused_by_transformers_own_loading_too(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model()
    llmq.quantize(model, Recipe.uniform("w4g32", method="rtn"))
    llmq.save(model, tmp_path / "out", format="llmq")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format"] = "foo"
    path.write_text(json.dumps(config))
    for load in (llmq.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(LlmqError, match="format 'foo'"):
            load(tmp_path / "out")


def test_settings_without_a_spec_are_refused_whoever_asks():
    """Also where no weight is read: what engines make of a folder goes by the settings alone."""
    shapes = {"model.layers.0.mlp.up_proj.packed": (8, 4), "model.layers.0.mlp.up_proj.scale": (8,)}
    settings = {"quant_method": "llmq", "format": "llmq", "version": 1, "exceptions": {}}
    with pytest.raises(LlmqError, match=r"no usable spec for model\.layers\.0\.mlp\.up_proj"):
        stored_result(settings, shapes)
