"""Tokens per second of decoding, one token at a time: a static cache, and on a GPU one CUDA graph
per token.

The step below is a Llama's forward pass for one token, over the weights of a transformers model:
every tensor keeps its address, positions are read on the device, nothing waits for the host. q, k
and v, and gate and up, are one product each (as `llmq/inference/fuse` has it on CPUs), attention
sees a cache of the length that is asked for, its query heads of one key head side by side, and what
lies between the products is compiled on a GPU: the normalization, the rotation, and SwiGLU are one
kernel each. Two models of the same shape, one in bfloat16 and one quantized, run through the same
step, so their ratio is that of the linear layers within a step that wastes little else."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor, stack_rows
from llmq.inference.module import QuantLinear, prepare, swap

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

Product = Callable[[Tensor], Tensor]


def stacked(modules: Sequence[nn.Module], dtype: torch.dtype) -> Product:
    """One product for linear layers that read the same input, without biases."""
    first = modules[0]
    if isinstance(first, QuantLinear):
        tensors = [module.qtensor() for module in modules if isinstance(module, QuantLinear)]
        fused = QuantLinear(stack_rows(tensors), None, first.activations)
        fused.prepare(dtype)
        return fused
    weight = torch.cat([module.get_parameter("weight").detach() for module in modules])
    return lambda x: linear(x, weight)


def add_and_normalize(
    hidden: Tensor, more: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """`hidden + more` and its RMS norm, `[B, D]`, as transformers' Llama computes them."""
    hidden = hidden + more
    values = hidden.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + epsilon)
    return hidden, weight * values.to(hidden.dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `[B, H, D]` by cos and sin `[1, D]`."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` from both, `[B, 2 D]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


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
        self.qkv, self.gate_up = self._fused(model.model.layers)
        on_gpu = device.type == "cuda"
        self.normalize = torch.compile(add_and_normalize) if on_gpu else add_and_normalize
        self.rotate = torch.compile(rotate) if on_gpu else rotate
        self.swiglu = torch.compile(swiglu) if on_gpu else swiglu

    def _fused(self, layers: Any) -> tuple[list[Product], list[Product]]:
        qkv, gate_up, dtype = [], [], self.model.dtype
        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv.append(stacked([attention.q_proj, attention.k_proj, attention.v_proj], dtype))
            gate_up.append(stacked([mlp.gate_proj, mlp.up_proj], dtype))
        return qkv, gate_up

    def _attention(self, index: int, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, cache = x.shape[0], self.cache[index]
        heads = self.qkv[index](x).view(batch, -1, self.head_dim)
        rotated = self.rotate(heads[:, : self.heads + self.kv_heads], cos, sin)
        cache[0].index_copy_(2, self.position, rotated[:, self.heads :, None])
        cache[1].index_copy_(2, self.position, heads[:, self.heads + self.kv_heads :, None])
        # The query heads of a key head are rows of one product: nothing is repeated.
        query = rotated[:, : self.heads].reshape(batch, self.kv_heads, -1, self.head_dim)
        out = scaled_dot_product_attention(query, cache[0], cache[1], attn_mask=mask)
        return out.reshape(batch, self.heads * self.head_dim)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Logits `[B, vocabulary]` of the token at `position`; then `tokens` holds the likeliest
        next one, and `position` the next place."""
        body, epsilon = self.model.model, self.model.config.rms_norm_eps
        cos, sin = self.cos[self.position], self.sin[self.position]
        mask = self.cos.new_zeros(1, 1, 1, len(self.places)).masked_fill_(
            self.places > self.position, -torch.inf
        )
        hidden = body.embed_tokens(self.tokens)
        more = torch.zeros_like(hidden)
        for index, layer in enumerate(body.layers):
            weight = layer.input_layernorm.weight
            hidden, x = self.normalize(hidden, more, weight, epsilon)
            more = layer.self_attn.o_proj(self._attention(index, x, cos, sin, mask))
            weight = layer.post_attention_layernorm.weight
            hidden, x = self.normalize(hidden, more, weight, epsilon)
            more = layer.mlp.down_proj(self.swiglu(self.gate_up[index](x)))
        hidden, x = self.normalize(hidden, more, body.norm.weight, epsilon)
        logits: Tensor = self.model.lm_head(x)
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
            for _ in range(2):  # compiles
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
    max_length: int = 256,
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
