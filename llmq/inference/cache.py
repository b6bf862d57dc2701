"""A key/value cache that is written in place.

transformers' default cache concatenates for every token and layer, which copies all that is there: work that grows with the context. Its static cache has attention run over the whole of the
longest context from the first token on. Here keys and values lie in a buffer of the final length, and attention sees a view of the part that is filled: the same numbers as the default, no copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class InPlaceLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values `[B, heads, length, head_dim]` as views of buffers for `capacity` tokens, which double when they are full. Whatever else replaces them (beams reordered, tokens cropped) is
    copied back into buffers when the next token comes."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        length = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = length + key_states.shape[-2]
        if not self._in_place(end, len(key_states)):
            self._move(key_states, value_states, length, end)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, length:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def _in_place(self, end: int, batch: int) -> bool:
        """Whether the filled part is where the buffers are, and the new tokens fit."""
        if not self._buffers or end > self._buffers[0].shape[2] or len(self._buffers[0]) != batch:
            return False
        return all(buffer.data_ptr() == tensor.data_ptr() for buffer, tensor in zip(self._buffers, (self.keys, self.values), strict=True))

    def _move(self, key_states: Tensor, value_states: Tensor, length: int, end: int) -> None:
        while self.capacity < end:
            self.capacity *= 2
        filled = (self.keys, self.values)
        self._buffers = [new.new_empty(*new.shape[:2], self.capacity, new.shape[3]) for new in (key_states, value_states)]
        if length:
            for buffer, tensor in zip(self._buffers, filled, strict=True):
                buffer[:, :, :length] = tensor

    def reset(self) -> None:
        self._buffers = []
        super().reset()


def in_place_cache(config: PretrainedConfig, capacity: int) -> DynamicCache:
    """The model's own kind of cache with room for `capacity` tokens. Layers that keep something else than all keys and values (a sliding window, a state) stay what they are."""
    cache = DynamicCache(config=config)
    cache.layers = [InPlaceLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
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
