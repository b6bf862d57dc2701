"""The families of models that are written as GGUF and read from it: a row for each.

What llmq calls a tensor and what llama.cpp calls it, by the part of a name before `.weight` or
`.bias`. llama.cpp rotates neighbouring rows of queries and keys in Llama, transformers the two
halves of a head; Gemma's norms multiply by 1 + weight, and llama.cpp stores the sum."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import LlmqError

_WHOLE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LINEAR = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_TWO_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_FOUR_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_QKV_BIASES = frozenset({"attn_q", "attn_k", "attn_v"})
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
_GGUF_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Family:
    """model_type: transformers' name. arch: llama.cpp's. in_block: names of a block. biases: parts
    that may have one in llama.cpp. is_permuted: whether rows of queries and keys are in another
    order. norm_offset: what is added to the weights of norms. activation: of the MLP, the only one
    that llama.cpp computes for it. windows: layers with a sliding window among those without:
    "none", or as the file says ("pattern")."""

    model_type: str
    arch: str
    in_block: Mapping[str, str]
    biases: frozenset[str] = frozenset()
    is_permuted: bool = False
    norm_offset: int = 0
    activation: str = "silu"
    windows: str = "none"

    def gguf_name(self, name: str) -> str:
        """What llama.cpp calls a parameter. Raises `LlmqError` for one that it has no place for."""
        layer, _, suffix = name.rpartition(".")
        match = _BLOCK.fullmatch(layer)
        if match:
            part = self.in_block.get(match[2])
            found = part and f"blk.{match[1]}.{part}"
        else:
            part = found = _WHOLE.get(layer)
        if not found or not (suffix == "weight" or (suffix == "bias" and part in self.biases)):
            raise LlmqError(
                f"GGUF: {name} has no place in llama.cpp's {self.arch}; export to another format"
            )
        return f"{found}.{suffix}"

    def model_name(self, gguf_name: str) -> str | None:
        """The inverse, or None for a tensor that is no parameter."""
        layer, _, suffix = gguf_name.rpartition(".")
        match = _GGUF_BLOCK.fullmatch(layer)
        if match:
            names = {part: name for name, part in self.in_block.items()}
            found = names.get(match[2])
            return found and f"model.layers.{int(match[1])}.{found}.{suffix}"
        names = {part: name for name, part in _WHOLE.items()}
        return f"{names[layer]}.{suffix}" if layer in names else None

    def is_norm(self, name: str) -> bool:
        """Whether a parameter is the weight of a norm."""
        return name.endswith("norm.weight")

    def permuted_heads(self, name: str, n_heads: int, n_kv_heads: int) -> int | None:
        """Heads of a parameter whose rows are in another order, None for all others."""
        if not self.is_permuted:
            return None
        part = name.rpartition(".")[0].rpartition(".")[2]
        return {"q_proj": n_heads, "k_proj": n_kv_heads}.get(part)


FAMILIES = (
    Family("llama", "llama", _LINEAR | _TWO_NORMS, frozenset(_LINEAR.values()), is_permuted=True),
    Family("mistral", "llama", _LINEAR | _TWO_NORMS, is_permuted=True),
    Family("qwen2", "qwen2", _LINEAR | _TWO_NORMS, _QKV_BIASES),
    Family("qwen3", "qwen3", _LINEAR | _TWO_NORMS | _HEAD_NORMS),
    Family(
        "gemma2",
        "gemma2",
        _LINEAR | _FOUR_NORMS,
        norm_offset=1,
        activation="gelu_pytorch_tanh",
        windows="pattern",
    ),
    Family(
        "gemma3_text",
        "gemma3",
        _LINEAR | _FOUR_NORMS | _HEAD_NORMS,
        norm_offset=1,
        activation="gelu_pytorch_tanh",
        windows="pattern",
    ),
)


def family_of_model(model_type: str) -> Family:
    """The row of a model type. Raises `LlmqError` for a family that is not written as GGUF."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    names = ", ".join(family.model_type for family in FAMILIES)
    raise LlmqError(
        f"GGUF: models of type {model_type!r} are not written; known are {names}. Export to "
        "another format, or convert the original with llama.cpp"
    )


def family_of_arch(arch: object) -> Family:
    """The row of an architecture of llama.cpp: the first of that name."""
    for family in FAMILIES:
        if family.arch == arch:
            return family
    names = ", ".join(dict.fromkeys(family.arch for family in FAMILIES))
    raise LlmqError(
        f"GGUF: architecture {str(arch)[:80]!r} is not read; known are {names}. Take the model in "
        "safetensors"
    )


def permuted(rows: Tensor, n_heads: int) -> Tensor:
    """Rows `[N, ...]` of queries or keys in llama.cpp's order: row i of the first half of a head
    beside row i of the second."""
    halves = rows.view(n_heads, 2, rows.shape[0] // n_heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def restored(rows: Tensor, n_heads: int) -> Tensor:
    """The inverse of `permuted`."""
    pairs = rows.view(n_heads, rows.shape[0] // n_heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def rope_factors(parameters: Mapping[str, float], head_dim: int) -> Tensor:
    """What each frequency of a head is divided by in Llama 3.1 and later, float32 `[head_dim / 2]`:
    long waves by `factor`, short ones by 1, those between by something between."""
    base, factor = parameters["rope_theta"], parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    waves = 2 * torch.pi * base**exponents
    turns = parameters["original_max_position_embeddings"] / waves
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()
