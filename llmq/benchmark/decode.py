"""Tokens per second of decoding, one token at a time, with everything but the linear layers held
still: a static cache, and on a GPU one CUDA graph per token.

The step below is a Llama's forward pass for one token, written over the modules of a transformers
model: every tensor keeps its address, positions are read on the device, nothing waits for the host.
Two models of the same shape, one in bfloat16 and one quantized, run through the same step, so their
ratio is that of the linear layers and of nothing else."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import prepare, swap

LLAMA_3_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
}


class StaticDecoder:
    """Greedy decoding of batch B with a Llama model of transformers. tokens: int64 `[B]`, the next
    input; position: int64 `[1]`, where it stands."""

    def __init__(self, model: Any, batch: int, max_length: int) -> None:
        config = model.config
        self.model, device, dtype = model, model.device, model.dtype
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        shape = (config.num_hidden_layers, 2, batch, self.kv_heads, max_length, self.head_dim)
        self.cache = torch.zeros(shape, device=device, dtype=dtype)
        self.places = torch.arange(max_length, device=device)
        cos, sin = model.model.rotary_emb(
            torch.empty(1, 1, device=device, dtype=dtype), self.places[None]
        )
        self.cos, self.sin = cos[0], sin[0]  # [max_length, head_dim]

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def _attention(
        self, layer: Any, x: Tensor, cache: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
    ) -> Tensor:
        batch = x.shape[0]
        attention = layer.self_attn
        query = self._rotate(
            attention.q_proj(x).view(batch, self.heads, 1, self.head_dim), cos, sin
        )
        key = self._rotate(
            attention.k_proj(x).view(batch, self.kv_heads, 1, self.head_dim), cos, sin
        )
        value = attention.v_proj(x).view(batch, self.kv_heads, 1, self.head_dim)
        cache[0].index_copy_(2, self.position, key)
        cache[1].index_copy_(2, self.position, value)
        out = scaled_dot_product_attention(
            query, cache[0], cache[1], attn_mask=mask, enable_gqa=True
        )
        return attention.o_proj(out.reshape(batch, self.heads * self.head_dim))

    @torch.no_grad()
    def step(self) -> Tensor:
        """Logits `[B, vocabulary]` of the token at `position`; then `tokens` holds the likeliest
        next one, and `position` the next place."""
        body = self.model.model
        cos, sin = self.cos[self.position], self.sin[self.position]
        mask = (self.places <= self.position)[None, None, None, :]
        hidden = body.embed_tokens(self.tokens)
        for index, layer in enumerate(body.layers):
            hidden = hidden + self._attention(
                layer, layer.input_layernorm(hidden), self.cache[index], cos, sin, mask
            )
            x = layer.post_attention_layernorm(hidden)
            hidden = hidden + layer.mlp.down_proj(
                silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
            )
        logits: Tensor = self.model.lm_head(body.norm(hidden))
        self.tokens.copy_(logits.argmax(-1))
        self.position += 1
        return logits

    def decode(
        self, first: Tensor, n_tokens: int, *, use_graph: bool
    ) -> tuple[list[Tensor], float]:
        """Greedy tokens after `first` `[B]` from an empty cache, and the median seconds of a
        step."""
        replay = self._captured() if use_graph else self.step
        self.tokens.copy_(first)
        self.position.zero_()
        synchronize = torch.cuda.synchronize if self.tokens.is_cuda else lambda: None
        tokens, times = [], []
        for _ in range(n_tokens):
            synchronize()
            started = time.perf_counter()
            replay()
            synchronize()
            times.append(time.perf_counter() - started)
            tokens.append(self.tokens.clone())
        return tokens, statistics.median(times)

    def _captured(self) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


def synthetic_llama(device: torch.device, dtype: torch.dtype = torch.bfloat16, **shape: Any) -> Any:
    """A Llama with random weights (small ones, so that nothing overflows), made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in {**LLAMA_3_8B, **shape}.items() if key != "rope_theta"}
    theta = {**LLAMA_3_8B, **shape}["rope_theta"]
    config = AutoConfig.for_model(
        "llama",
        **settings,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False,
    )
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def quantize_layers(model: Any, spec: QuantSpec) -> None:
    """Round every linear layer but the head to nearest, in place: right enough for a measurement of
    speed."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    for name in names:  # one by one: the model's bfloat16 weights go as the codes come
        swap(
            model,
            {
                name: QuantizedTensor.quantize(
                    model.get_submodule(name).weight.detach().float(), spec
                )
            },
        )
    prepare(model, model.dtype)


def compare_decode(
    device: torch.device,
    spec: QuantSpec = QuantSpec("int4", 128),
    *,
    n_tokens: int = 64,
    batch: int = 1,
    max_length: int = 1024,
    **shape: Any,
) -> dict[str, Any]:
    """Tokens per second in bfloat16 and quantized, the same model and step."""
    model = synthetic_llama(device, **shape)
    use_graph = device.type == "cuda"
    first = torch.randint(0, model.config.vocab_size, (batch,), device=device)
    dense = StaticDecoder(model, batch, max_length).decode(first, n_tokens, use_graph=use_graph)[1]
    quantize_layers(model, spec)
    quantized = StaticDecoder(model, batch, max_length).decode(
        first, n_tokens, use_graph=use_graph
    )[1]
    return {
        "weights": str(spec),
        "batch": batch,
        "cache_length": max_length,
        "bf16_tokens_per_second": batch / dense,
        "quantized_tokens_per_second": batch / quantized,
        "ratio": dense / quantized,
        "backends": sorted(
            {str(module.backend) for module in model.modules() if hasattr(module, "backend")}
        ),
    }
