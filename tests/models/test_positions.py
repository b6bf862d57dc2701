"""How many tokens a model has positions for, by how its rotary positions are scaled."""

import pytest
from transformers import AutoConfig, Gemma3TextConfig, GPT2Config, LlamaConfig

from llmq.errors import LlmqError
from llmq.models.arch import check_length, position_limit


def yarn(factor, original=None, **more):
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original} | {
        "rope_theta": 1e6,
        **more,
    }


def longrope(factor, original):
    lists = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    return yarn(factor, original, **lists) | {"rope_type": "longrope"}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
# (max_position_embeddings, rotary positions, tokens): what models of these shapes are documented
# for.
TABLE = {
    "plain": (4096, None, 4096),
    "default": (4096, {"rope_type": "default", "rope_theta": 1e4}, 4096),
    "Qwen2.5 with YaRN": (32768, yarn(4.0, 32768), 131072),
    "Qwen3 with YaRN": (40960, yarn(4.0, 32768), 131072),
    "YaRN that is counted": (131072, yarn(4.0, 32768), 131072),
    "YaRN, counted to more": (163840, yarn(40, 4096), 163840),
    "YaRN of another size": (128, yarn(2.5, 100), 250),
    "YaRN without a factor": (163840, yarn(None, 4096), 163840),
    "YaRN by one": (4096, yarn(1.0, 4096), 4096),
    "YaRN to nowhere": (4096, yarn(1e300, 4096), 4096),
    "LongRoPE, counted": (131072, longrope(None, 4096), 131072),
    "LongRoPE, not counted": (4096, longrope(32.0, 4096), 131072),
    "linear": (4096, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 8192),
    "dynamic": (32768, {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 65536),
    "Llama 3.1": (131072, yarn(8.0, 8192, **LLAMA3), 131072),
    "Llama 3.2": (131072, yarn(32.0, 8192, **LLAMA3), 131072),
}


@pytest.mark.parametrize(("stored", "rope", "expected"), TABLE.values(), ids=TABLE)
def test_of_all_layers(stored, rope, expected):
    config = LlamaConfig(max_position_embeddings=stored, rope_parameters=rope, head_dim=32)
    assert position_limit(config) == expected


def test_as_older_folders_write_it():
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = AutoConfig.for_model("qwen2", max_position_embeddings=32768, rope_scaling=rope)
    assert position_limit(config) == 131072


@pytest.mark.parametrize(
    ("full", "expected"),
    [
        ({"rope_type": "linear", "factor": 8.0}, 131072),  # Gemma 3 counts it
        (yarn(4.0, 131072), 524288),
        ({"rope_type": "default"}, 131072),
    ],
)
def test_of_some_layers(full, expected):
    """Sliding windows are no limit: what they see is never far away."""
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default"}}
    config = Gemma3TextConfig(max_position_embeddings=131072, rope_parameters=rope)
    assert position_limit(config) == expected
    whole = AutoConfig.for_model("gemma3", text_config=config.to_dict())
    assert position_limit(whole) == expected


def test_learned_positions_end():
    config = GPT2Config(n_positions=128)
    config.rope_parameters = yarn(4.0, 128)
    assert position_limit(config) == 128


def test_lengths_are_checked_by_it():
    config = LlamaConfig(max_position_embeddings=64, rope_parameters=yarn(4.0, 64))
    check_length(config, 256, "256 tokens")
    with pytest.raises(LlmqError, match="positions for 256 tokens only"):
        check_length(config, 257, "257 tokens")
