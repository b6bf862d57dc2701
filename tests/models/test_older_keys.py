"""Readers of configs from before transformers 5 find the base of positions and the number of
experts, and transformers reads the same config as without those keys."""

import json

import pytest
from conftest import families, make_model
from transformers import AutoConfig

import llmq
from llmq.models.older_keys import with_older_keys
from llmq.recipe import Recipe

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_the_base_is_said_in_both_ways():
    plain = {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5}
    written = with_older_keys({"rope_parameters": plain, "text_config": {"rope_parameters": plain}})
    for part in (written, written["text_config"]):
        assert part["rope_theta"] == 1e5
        assert part["partial_rotary_factor"] == 0.5
        assert "rope_scaling" not in part
        assert part["rope_parameters"] == plain


def test_scaled_positions_are_said_as_a_whole():
    written = with_older_keys({"rope_parameters": LLAMA3})
    assert written["rope_theta"] == 500000.0
    assert written["rope_scaling"] == LLAMA3


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_parameters": None},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}},
        {"rope_parameters": {"rope_theta": "many"}},
        {"rope_theta": 3.0, "rope_parameters": {"rope_type": "default", "rope_theta": 4.0}},
    ],
)
def test_nothing_is_made_up_or_replaced(config):
    assert with_older_keys(config) == config


@pytest.mark.parametrize("positions", [None, LLAMA3], ids=["plain", "llama3"])
@pytest.mark.parametrize("family", families("llama", "phi3", "gemma3_text", "gpt_neox"))
def test_transformers_reads_the_same_config(family, positions):
    config = make_model(family).config.to_dict()
    is_flat = "rope_theta" in (config.get("rope_parameters") or {})
    if positions and (not is_flat or family == "phi3"):
        pytest.skip(f"{family} has no positions of this kind")
    config["rope_parameters"] = positions or config.get("rope_parameters")
    written = json.loads(json.dumps(with_older_keys(config)))
    assert ("rope_theta" in written) >= is_flat
    read = [AutoConfig.for_model(**json.loads(json.dumps(each))) for each in (config, written)]
    expected, found = (each.to_dict() for each in read)
    assert found.keys() - expected.keys() <= {"rope_theta", "partial_rotary_factor"}  # gpt_neox
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "deepseek_v3", "ernie4_5_moe", "gpt_oss", "hunyuan_v1_moe", "olmoe"]
)
def test_the_number_of_experts_is_said_by_every_name(family):
    config = AutoConfig.for_model(family)
    written = json.loads(json.dumps(with_older_keys({"text_config": config.to_dict()})))
    written = written["text_config"]
    for name, stored in type(config).attribute_map.items():
        if "experts" in stored:
            assert written[name] == written[stored] == getattr(config, stored)
    assert AutoConfig.for_model(**written).to_dict() == config.to_dict()


@pytest.mark.parametrize("kind", [None, 3, "nothing of transformers", "llama"])
def test_a_config_of_no_known_mixture_stays(kind):
    config = {"model_type": kind, "num_local_experts": 8}
    assert with_older_keys(config) == config


def test_a_quantized_mixture_has_the_key_of_its_original(tmp_path):
    model = make_model("qwen3_moe")
    llmq.quantize(model, Recipe.uniform("w4g32", method="rtn"))
    llmq.save(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_experts"] == written["num_local_experts"] == model.config.num_experts
    assert llmq.load(tmp_path / "out").config.num_experts == model.config.num_experts


def test_a_quantized_folder_has_them(tmp_path):
    model = make_model(rope_parameters={"rope_type": "default", "rope_theta": 123456.0})
    llmq.quantize(model, Recipe.uniform("w4g32", method="rtn"))
    llmq.save(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == 123456.0
    assert llmq.load(tmp_path / "out").config.rope_parameters == model.config.rope_parameters
