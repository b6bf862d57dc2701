"""Wrappers of a text model and towers: built, quantized and opened as the class that they name."""

import json

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaForConditionalGeneration

import llmq
from llmq.models import compat
from llmq.models.arch import find_blocks, tower_parameters
from llmq.models.source import meta_model
from llmq.ptq.job import prepare
from llmq.ptq.parts import OTHERS, parts
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe

TOKENS = torch.arange(6, 38)[None]


@pytest.fixture
def folder(tmp_path, tokenizer):
    """LLaVA, whose type has no causal language model, with a tower as deep as its text model."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model(
        "llava",
        text_config=make_model().config,
        vision_config=AutoConfig.for_model("clip_vision_model", **vision),
        image_token_index=5,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "processor_config.json").write_text('{"patch_size": 14}')
    return tmp_path / "model"


@torch.no_grad()
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_text_is_quantized_and_the_rest_stays(method, folder, tmp_path, calibration_file):
    recipe = Recipe.uniform("w4g32", method=method, samples=2, sequence_length=16)
    job = prepare(str(folder), recipe, calibration=str(calibration_file), strict=True)
    assert all(plan.layer.name.startswith("model.language_model.layers.") for plan in job.plans)
    assert OTHERS in {part.name for part in parts(job)}
    quantize_folder(job, tmp_path / "out")
    assert (tmp_path / "out" / "processor_config.json").is_file()
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    kept = [name for name in before if name.removesuffix(".weight") not in _packed(after)]
    assert any("vision_tower" in name for name in kept)
    assert all(torch.equal(before[name], after[name]) for name in kept)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.multi_modal_projector.linear_1" in settings["ignore"]
    loaded = llmq.load(tmp_path / "out", strict=True)
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert type(loaded) is type(opened) is LlavaForConditionalGeneration
    assert torch.equal(loaded(TOKENS).logits, opened(TOKENS).logits)


def _packed(tensors):
    return {
        name.removesuffix(".weight_packed") for name in tensors if name.endswith("weight_packed")
    }


@torch.no_grad()
def test_one_in_memory_is_quantized_as_its_own_class(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    before = model(TOKENS).logits
    llmq.quantize(model, "w8", method="rtn")
    assert (model(TOKENS).logits - before).norm() < 0.05 * before.norm()


def test_what_text_does_not_come_by_is_known(folder):
    model = meta_model(llmq.load(folder).config)
    towers = tower_parameters(model)
    assert find_blocks(model)[0] == "model.language_model.layers"
    assert {name.split(".")[1] for name in towers} == {"vision_tower", "multi_modal_projector"}
    assert not tower_parameters(make_model())


def test_the_class_that_a_config_names_is_built():
    def auto(**settings):
        return compat.auto_class(AutoConfig.for_model("qwen3_5", **settings)).__name__

    assert auto() == "AutoModelForCausalLM"
    assert auto(architectures=["Qwen3_5ForCausalLM"]) == "AutoModelForCausalLM"
    wrapper = auto(architectures=["Qwen3_5ForConditionalGeneration"])
    assert wrapper == "AutoModelForImageTextToText"


def test_blocks_are_the_outermost_lists():
    """LongCat has two attentions in each block, and its config counts these."""
    config = AutoConfig.for_model(
        "longcat_flash", vocab_size=64, hidden_size=32, num_layers=2, num_hidden_layers=4,
        ffn_hidden_size=64, expert_ffn_hidden_size=32, n_routed_experts=4, zero_expert_num=2,
        moe_topk=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, head_dim=8, qk_head_dim=16,
    )  # fmt: skip
    name, blocks = find_blocks(meta_model(config))
    assert (name, len(blocks)) == ("model.layers", 2)
