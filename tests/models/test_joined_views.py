"""What transformers makes one tensor of while it loads is stored in its parts again, whoever writes
it."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import llmq
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe

PARTS = {"q_conv1d": 32, "k_conv1d": 32, "v_conv1d": 64}


@pytest.fixture
def folder(tmp_path, tokenizer):
    """OLMo hybrid as it is published: a convolution for each of queries, keys and values."""
    config = AutoConfig.for_model(
        "olmo_hybrid", vocab_size=2048, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        layer_types=["linear_attention", "full_attention"], max_position_embeddings=128,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.linear_attn.{}.weight"
    joint = torch.cat([tensors[name.format(part)] for part in PARTS])
    for part, rows in zip(PARTS, joint.split(list(PARTS.values())), strict=True):
        tensors[name.format(part)] = rows.clone()
    save_file(tensors, path, metadata={"format": "pt"})
    return tmp_path / "model"


@torch.no_grad()
def test_parts_are_one_tensor_of_the_model_and_are_stored_as_they_were(folder, tmp_path):
    job = prepare(str(folder), Recipe.uniform("w8", method="rtn"), strict=True)
    quantize_folder(job, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    for part in PARTS:
        name = f"model.layers.0.linear_attn.{part}.weight"
        assert torch.equal(before[name], after[name])
    packed = {name.rpartition(".")[0] for name in after}
    assert all(name in after or name.removesuffix(".weight") in packed for name in before)
    tokens = torch.arange(1, 33)[None]
    full, quantized = (llmq.load(path)(tokens).logits for path in (folder, tmp_path / "out"))
    assert (full - quantized).norm() < 0.05 * full.norm()


@torch.no_grad()
@pytest.mark.parametrize(
    "format", ["gptq", pytest.param("compressed-tensors", marks=pytest.mark.slow)]
)
def test_a_quantized_folder_is_exported_with_its_parts(format, folder, tmp_path):
    llmq.quantize(folder, tmp_path / "first", "w4g32", method="rtn")
    llmq.export(tmp_path / "first", tmp_path / "second", format)
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")
    )
    for part in PARTS:
        name = f"model.layers.0.linear_attn.{part}.weight"
        assert torch.equal(before[name], after[name])
    tokens = torch.arange(1, 33)[None]
    logits = [llmq.load(tmp_path / name)(tokens).logits for name in ("first", "second")]
    assert torch.equal(*logits)


def test_a_quantized_folder_is_quantized_again(folder, tmp_path):
    llmq.quantize(folder, tmp_path / "first", "w8", method="rtn")
    llmq.quantize(
        tmp_path / "first", tmp_path / "second", "w4g32", method="rtn", allow_requantize=True
    )
    after = load_file(tmp_path / "second" / "model.safetensors")
    assert all(f"model.layers.0.linear_attn.{part}.weight" in after for part in PARTS)


def test_an_adapter_is_merged_beside_parts(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    llmq.quantize(folder, tmp_path / "first", "w8", method="rtn")
    model = llmq.load(tmp_path / "first")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    llmq.merge_adapter(tmp_path / "first", tmp_path / "adapter", out=tmp_path / "second")
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".down_proj." in name for name in changed)
