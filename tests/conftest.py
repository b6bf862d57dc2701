"""Shared fixtures: tiny real models with random weights, their tokenizer, and calibration tokens.
Everything is made here; nothing is downloaded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is compiled here is what is tested, by this process and those it starts; removed when it
# ends.
os.environ["LLMQ_CACHE_DIR"] = (
    _cache := tempfile.TemporaryDirectory(prefix="llmq-test-cache-")
).name

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmq.models.source import resolve
from llmq.ptq.stats import LayerStats

# Two blocks, widths with groups of 32, 64 and 128; each family with what sets it apart (grouped
# queries, sliding windows, soft caps, fused projections, biases, Conv1D).
_SMALL = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
FAMILY_CONFIGS: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {
        "layer_types": ["full_attention", "sliding_attention"],
        "use_sliding_window": True,
        "sliding_window": 16,
        "tie_word_embeddings": True,
    },
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 16},
    "gemma3_text": {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 32,
    },
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 0},
    "gpt_neox": {},
    "falcon": {
        "head_dim": None,
        "num_key_value_heads": None,
        "new_decoder_architecture": False,
        "multi_query": True,
        "ffn_hidden_size": 128,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "rwkv": {"attention_hidden_size": 64, "context_length": 128, "rescale_every": 0},
}

# Experts: gate and up beside each other; with biases, transposed and alternating; scaled before the
# experts; without a gate.
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 32,
}
EXPERT_CONFIGS: dict[str, dict[str, object]] = {
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gpt_oss": {**_EXPERTS, "sliding_window": 16},
    "llama4_text": {**_EXPERTS, "intermediate_size_mlp": 64, "num_experts_per_tok": 1},
    "nemotron_h": {
        **_EXPERTS,
        "layers_block_type": ["attention", "moe"],
        "moe_shared_expert_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
}


def families(*fast: str) -> list[object]:
    """Every family as a parameter of a test; all but the fast ones in the slow run."""
    return [
        name if name in fast else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILY_CONFIGS
    ]


def make_model(
    model_type: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: object,
) -> PreTrainedModel:
    """A model of a family with random weights, large enough in magnitude that quantization
    shows."""
    settings = {
        "bos_token_id": 0,
        "eos_token_id": 0,
        **_SMALL,
        **(FAMILY_CONFIGS | EXPERT_CONFIGS).get(model_type, {}),
        **overrides,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **settings), dtype=dtype
    )
    for name, parameter in model.named_parameters():
        is_experts = parameter.dim() == 3 and ".experts." in name
        if parameter.dim() == 2 or is_experts:
            parameter.data.normal_(std=0.08)
        elif name.endswith("bias"):
            parameter.data.normal_(std=0.02)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve("tiny"))


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer) -> Callable[..., Path]:
    """A function that saves a small model with a tokenizer and returns the folder."""

    def save(
        model_type: str = "llama",
        name: str = "model",
        max_shard_size: str = "50GB",
        **overrides: object,
    ) -> Path:
        folder = tmp_path / name
        make_model(model_type, **overrides).save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def outlier_folder(model_folder) -> Path:
    """A model some of whose channels are far larger than others before down_proj, and smaller in
    its weights."""
    path = model_folder(name="outliers")
    model = make_model()
    for block in model.model.layers:
        block.mlp.up_proj.weight.data[:4] *= 60
        block.mlp.down_proj.weight.data[:, :4] /= 60
    model.bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(
        "\n".join(
            f"def function_{i}(value, other={i}):\n    return value + other * {i * i}\n"
            for i in range(400)
        )
    )
    return path


@pytest.fixture
def stats() -> Callable[[int], LayerStats]:
    """A function that makes statistics of correlated inputs with a few loud channels."""

    def make(k: int, n_tokens: int = 4096) -> LayerStats:
        generator = torch.Generator().manual_seed(k)
        mixing = torch.randn(k, k, generator=generator) * 0.2 + torch.eye(k)
        inputs = torch.randn(n_tokens, k, generator=generator) @ mixing
        inputs[:, : max(1, k // 50)] *= 8
        result = LayerStats(k)
        result.add(inputs)
        return result

    return make
