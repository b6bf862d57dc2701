"""A decoding step as one list of kernel calls.

Around the products of a small model's token lies half as much time again: modules called, tensors
allocated, operators started, some 25 in every layer. For decoder layers of Llama's kind all of it
is known beforehand. So the first token of a text is computed by the model and once more by llmq's
own kernels, recorded on the way (`llmq_kernels.compiled.recording`); if both agree, later tokens
repeat the recording: 0.85B parameters on two cores take 19 ms instead of 31, of which 15 are
products. What is not like Llama, what the kernels cannot do and what does not agree goes on as
before, and `DecodeStep.reason` says why.

The recording reads weights where they are and keys and values where `cache.InPlaceLayer` holds
them. Every cache has its own, made anew when cache or weights move and for another number of
threads: its buffers are written at every token, and threads that decode at once have a cache
each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from llmq.inference.attention import NAME
from llmq.inference.cache import InPlaceLayer, in_place_cache
from llmq.inference.module import quantized_modules
from llmq.models.compat import BaseModelOutputWithPast, attention_name, cache_name
from llmq_kernels.compiled import decoding
from llmq_kernels.compiled.recording import NotRecordable, Recording

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
# Both ways round at the same places and use the same products and attention; what is left is the
# order of the sum in a norm. In every model tried, up to 16 layers 2048 wide, the outputs were
# equal.
TOLERANCE = 0.01
_HARMLESS = {
    "use_cache",
    "cache_position",
    "return_dict",
    "tokenizer",  # `generate` passes it on where strings stop it
}  # arguments that change nothing for one token with a cache


class DecodeStep:
    """Stands where `forward` of a decoder (the model without its head) was.

    reason: why tokens do not go through the recording, None where they do or may. replayed: how
    many did."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        self._decoder, self._forward = decoder, decoder.forward
        self.reason = _unsuitable(decoder)
        self.replayed = 0
        self._start_empty()

    def _start_empty(self) -> None:
        self._recorded: WeakKeyDictionary[Cache, _RecordedStep] = WeakKeyDictionary()
        self._counting = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in vars(self).items()
            if name not in ("_recorded", "_counting")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy makes its own recordings: these hold addresses."""
        vars(self).update(state)
        self._start_empty()

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **others: Any,
    ) -> Any:
        cache = past_key_values if cache is None else cache  # by its name of before
        inputs = (input_ids, attention_mask, position_ids)
        arguments = {
            **dict(zip(("input_ids", "attention_mask", "position_ids"), inputs, strict=True)),
            cache_name(): cache,
            **others,
        }
        if self.reason is not None or not _is_plain_token(*inputs, cache, **others):
            return self._forward(**arguments)
        assert input_ids is not None
        assert cache is not None
        n_before = cache.get_seq_length()
        if position_ids is not None and int(position_ids) != n_before:
            return self._forward(**arguments)
        for layer in cache.layers:
            layer.reserve(1)
        recorded = self._recorded.get(cache)
        if recorded is None or not recorded.is_for(cache):
            output = self._forward(**arguments)
            self._record(input_ids, n_before, cache, output.last_hidden_state)
            return output
        output = recorded(input_ids, n_before)
        for layer in cache.layers:
            layer.advance(1)
        with self._counting:
            self.replayed += 1
        return BaseModelOutputWithPast(last_hidden_state=output.clone(), **{cache_name(): cache})

    def _record(self, input_ids: Tensor, n_before: int, cache: Cache, expected: Tensor) -> None:
        """Record for this cache and compute the token that was just computed, over the keys and
        values it left, again. What the model wrote into the cache stays."""
        try:
            recorded = _RecordedStep(self._decoder, cache)
        except NotRecordable as error:
            self.reason = str(error)
            return
        places = [buffer[:, :, n_before] for layer in cache.layers for buffer in layer.buffers]
        written = [place.clone() for place in places]
        difference = float(
            (recorded(input_ids, n_before).float() - expected.float()).norm()
            / expected.float().norm()
        )
        for place, values in zip(places, written, strict=True):
            place.copy_(values)
        if difference <= TOLERANCE:
            self._recorded[cache] = recorded
        else:
            self.reason = (
                f"the recorded step is off by {difference:.2g} of what the model computes, more "
                f"than {TOLERANCE}"
            )


class _RecordedStep:
    def __init__(self, decoder: Any, cache: Cache) -> None:
        self._embed, self._rotary = decoder.embed_tokens, decoder.rotary_emb
        self._state = _state(cache)
        attention = decoder.layers[0].self_attn
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # written to in and outside of inference mode
            self._hidden = torch.empty(1, 1, decoder.config.hidden_size, dtype=torch.bfloat16)
            self._angles = torch.empty(2, attention.head_dim, dtype=torch.bfloat16)
            self._n_tokens = torch.zeros((), dtype=torch.int64)
        with Recording() as self._recording:
            self._scores = decoding.score_buffer(cache.layers[0].buffers[0])
            self._output = self._layers(decoder, cache)
        # What the kernels read stays in memory as long as the recording, even if the model lets go
        # of it.
        self._products = [
            (module, module.prepared) for module in quantized_modules(decoder).values()
        ]
        self._parameters = [(parameter, parameter.detach()) for parameter in decoder.parameters()]

    def is_for(self, cache: Cache) -> bool:
        """Whether the cache, the weights and the number of threads are as they were recorded."""
        if self._state != _state(cache):
            return False
        is_same = all(module.prepared is prepared for module, prepared in self._products)
        return is_same and all(
            parameter.data_ptr() == recorded.data_ptr() for parameter, recorded in self._parameters
        )

    def __call__(self, input_ids: Tensor, n_before: int) -> Tensor:
        """`[1, 1, D]`, overwritten by the next call."""
        self._n_tokens.fill_(n_before + 1)
        self._hidden.copy_(self._embed(input_ids))
        for row, values in zip(
            self._angles, self._rotary(self._hidden, torch.tensor([[n_before]])), strict=True
        ):
            row.copy_(values.view(-1))
        self._recording.replay()
        return self._output

    def _layers(self, decoder: Any, cache: Cache) -> Tensor:
        delta = None
        for layer, kept in zip(decoder.layers, cache.layers, strict=True):
            attended = self._attend(layer.self_attn, self._norm(layer.input_layernorm, delta), kept)
            x = self._norm(layer.post_attention_layernorm, attended)
            delta = layer.mlp.down_proj(decoding.gate(layer.mlp.gate_proj(x), layer.mlp.up_proj(x)))
        return self._norm(decoder.norm, delta)

    def _norm(self, norm: Any, delta: Tensor | None) -> Tensor:
        return decoding.norm(self._hidden, norm.weight, norm.variance_epsilon, delta)

    def _attend(self, attention: Any, x: Tensor, kept: InPlaceLayer) -> Tensor:
        query, key, value = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        if hasattr(attention, "q_norm"):
            heads = (
                (query.view(-1, attention.head_dim), attention.q_norm),
                (key.view(-1, attention.head_dim), attention.k_norm),
            )
            query, key = (
                decoding.norm(part, norm.weight, norm.variance_epsilon) for part, norm in heads
            )
        keys, values = kept.buffers
        cosine, sine = self._angles
        decoding.rotate_and_store(query, key, value, cosine, sine, keys, values, self._n_tokens)
        query = query.view(1, -1, 1, attention.head_dim)
        if reason := decoding.attention_refusal(query, keys, values):
            raise NotRecordable(f"the attention kernel: {reason}")
        attended = decoding.attention(
            query, keys, values, attention.scaling, self._n_tokens, self._scores
        )
        output: Tensor = attention.o_proj(attended.view(1, 1, -1))
        return output


def report(model: PreTrainedModel) -> dict[str, Any] | None:
    """For `--json`: how many tokens were repetitions of a recording and why others were not; None
    for a model that has no step."""
    step = step_of(model)
    return None if step is None else {"replayed_tokens": step.replayed, "reason": step.reason}


def use_recorded_steps(model: PreTrainedModel) -> None:
    """Have `model`, whose attention is that of `llmq.inference.attention`, decode by recorded steps
    where it can, in place."""
    decoder = model.base_model
    if not isinstance(decoder.forward, DecodeStep):
        decoder.forward = DecodeStep(decoder)


def step_of(model: PreTrainedModel) -> DecodeStep | None:
    """The step of a model that `use_recorded_steps` went through."""
    forward: Callable[..., Any] = model.base_model.forward
    return forward if isinstance(forward, DecodeStep) else None


def _unsuitable(decoder: PreTrainedModel) -> str | None:
    """Why the layers of a decoder are not of the kind that is known here, or None."""
    kinds = {type(layer).__name__ for layer in getattr(decoder, "layers", [])}
    if len(kinds) != 1 or not kinds.issubset(LAYERS):
        found = ", ".join(sorted(kinds)) or "these layers"
        return f"{type(decoder).__name__}: recorded steps know {', '.join(LAYERS)}, not {found}"
    if (activation := decoder.config.hidden_act) != "silu":
        return f"{type(decoder).__name__}: recorded steps know silu, not {activation}"
    attention = attention_name(decoder.config)
    if attention != NAME:  # such as one that quantizes keys and values
        return f"{type(decoder).__name__}: recorded steps know plain attention, not {attention}"
    if not all(
        isinstance(layer, InPlaceLayer) for layer in in_place_cache(decoder.config, 1).layers
    ):
        return f"{type(decoder).__name__}: recorded steps know no layers with sliding windows"
    return decoding.missing()


def _is_plain_token(
    input_ids: Tensor | None,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Cache | None,
    **others: Any,
) -> bool:
    """One token of one text, all of whose past is in a cache that is written in place, and nothing
    asked for but its output."""
    if (
        input_ids is None
        or input_ids.shape != (1, 1)
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
    ):
        return False
    if cache is None or not all(
        isinstance(layer, InPlaceLayer) and layer.get_seq_length() for layer in cache.layers
    ):
        return False
    if attention_mask is not None and not (
        isinstance(attention_mask, Tensor)
        and attention_mask.ndim == 2
        and bool(attention_mask.all())
    ):
        return False
    return others.get("return_dict", True) is not False and not any(
        value is not None and value is not False
        for name, value in others.items()
        if name not in _HARMLESS
    )


def _state(cache: Cache) -> tuple[object, ...]:
    """What a recording has taken down as it was."""
    return (
        torch.get_num_threads(),
        *(buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers),
    )
