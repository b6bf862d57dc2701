"""Keys and values of a conversation, kept from turn to turn: a turn begins with the tokens of those
before it, which need not be computed again.

In float32 SmolLM2-135M had the tokens of a fresh start in every turn tried. In bfloat16 sums over
fewer new tokens round otherwise, and a near tie can fall the other way, as it does in transformers
between a cache that is handed over and none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import DynamicCache, PreTrainedModel

from llmq.inference.cache import InPlaceLayer, in_place_cache
from llmq.inference.settings import effective, takes_in_place_cache


class KeptCache:
    """The cache of one conversation. Every prompt is asked for by `for_prompt`, and what became of
    it told by `keep`; without, as after an interruption, the next prompt begins anew."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache: DynamicCache | None = None
        self._ids: list[int] = []  # of the tokens in it

    def for_prompt(
        self, ids: Sequence[int], n_new: int, options: Mapping[str, Any]
    ) -> tuple[DynamicCache | None, int]:
        """The cache to generate with and how many tokens of the prompt it holds, at least one less
        than all; None where it has to be transformers' own, which is made anew every time: for
        beams, several texts, sliding windows and states. options: those of `generate`."""
        settings = effective(self._model, options)
        cache, n_kept = self._cache, self._n_common(ids)
        self._cache, self._ids = None, []
        if not self._is_plain(settings, options):
            return None, 0
        if cache is None or n_kept == 0:
            cache, n_kept = in_place_cache(self._model.config, len(ids) + n_new), 0
        layers = [layer for layer in cache.layers if isinstance(layer, InPlaceLayer)]
        if len(layers) < len(cache.layers):  # others cannot be shortened
            return None, 0
        if n_kept:
            for layer in layers:
                layer.shorten(n_kept)
        self._cache = cache
        return cache, n_kept

    def keep(self, ids: Sequence[int]) -> None:
        """ids: prompt and answer that the cache of the last prompt was used for."""
        if self._cache is not None:
            self._ids = list(ids[: self._cache.get_seq_length()])

    def _n_common(self, ids: Sequence[int]) -> int:
        pairs = zip(self._ids, ids[:-1], strict=False)
        return next(
            (i for i, (ours, theirs) in enumerate(pairs) if ours != theirs),
            min(len(self._ids), len(ids) - 1),
        )

    def _is_plain(self, settings: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
        is_one = (settings["num_return_sequences"] or 1) == (settings["num_beams"] or 1) == 1
        return is_one and takes_in_place_cache(self._model, settings, options)
