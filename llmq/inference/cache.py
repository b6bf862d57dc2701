"""A key/value cache that is written in place.

transformers' default cache concatenates for every token and layer, which copies all that is there:
work that grows with the context. Its static cache has attention run over the whole of the longest
context from the first token on. Here keys and values lie in a buffer of the final length, and
attention sees a view of the part that is filled: the same numbers as the default, no copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from llmq.models.compat import DynamicLayer


class InPlaceLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values `[B, heads, length, head_dim]` as views of buffers for `capacity` tokens,
    which double when they are full. Whatever else replaces them (beams reordered, tokens cropped)
    is copied back into buffers when the next token comes."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        n_new = key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._make_room(key_states, value_states, n_new)
        length = self.get_seq_length()
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, length : length + n_new] = new
        self.advance(n_new)
        return self.keys, self.values

    def reserve(self, n_new: int) -> None:
        """Have room in the buffers for n_new tokens behind those that are there."""
        self._make_room(self.keys, self.values, n_new)

    def advance(self, n_new: int) -> None:
        """Count n_new tokens that were written into the buffers."""
        end = self.get_seq_length() + n_new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)

    def shorten(self, n_tokens: int) -> None:
        """Forget all but the first n_tokens, which are in the buffers."""
        self.keys, self.values = (buffer[:, :, :n_tokens] for buffer in self.buffers)

    def _make_room(self, keys: Tensor, values: Tensor, n_new: int) -> None:
        """keys, values: tensors of the shape of what is kept, but for the number of tokens."""
        end = self.get_seq_length() + n_new
        if not self._in_place(len(keys)) or end > self.buffers[0].shape[2]:
            self._move(keys, values, end)

    def _in_place(self, batch: int) -> bool:
        """Whether the filled part is where the buffers are."""
        if not self.buffers or len(self.buffers[0]) != batch:
            return False
        places = zip(self.buffers, (self.keys, self.values), strict=True)
        return self.get_seq_length() == 0 or all(
            buffer.data_ptr() == tensor.data_ptr() for buffer, tensor in places
        )

    def _move(self, keys: Tensor, values: Tensor, end: int) -> None:
        while self.capacity < end:
            self.capacity *= 2
        filled, length = (self.keys, self.values), self.get_seq_length()
        with torch.inference_mode(
            False
        ):  # a tensor of inference mode could not be written to outside of it
            self.buffers = [
                torch.empty(
                    *like.shape[:2],
                    self.capacity,
                    like.shape[3],
                    dtype=like.dtype,
                    device=like.device,
                )
                for like in (keys, values)
            ]
        if length:
            for buffer, tensor in zip(self.buffers, filled, strict=True):
                buffer[:, :, :length] = tensor
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    def reset(self) -> None:
        self.buffers = []
        super().reset()


def in_place_cache(config: PretrainedConfig, capacity: int) -> DynamicCache:
    """The model's own kind of cache with room for `capacity` tokens. Layers that keep something
    else than all keys and values (a sliding window, a state) stay what they are."""
    cache = DynamicCache(config=config)
    cache.layers = [
        InPlaceLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of everything that a cache holds."""
    held: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())
