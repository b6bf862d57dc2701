"""What transformers makes one tensor of while it loads is stored in its parts again."""

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
