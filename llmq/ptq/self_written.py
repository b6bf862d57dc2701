"""Calibration text that the model writes itself: it needs no data and no network, and looks like
what the model is used for. The whole model is in memory meanwhile, as for `llmq generate`.

What was written is kept, by everything that decides it, so that an interrupted run reads the same
windows when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import llmq
from llmq.formats.load import load
from llmq.inference.decoding import prepare_decoding
from llmq.models.source import Source
from llmq.models.tokens import fingerprint, first_token, own_tokenizer
from llmq.ptq.precision import multiplies_bfloat16
from llmq.recipe import Recipe
from llmq.storage import files
from llmq.storage.boundary import running
from llmq.text.documents import SELF, TokenSet
from llmq.text.generate import GREEDY_TOKENS, generate_windows, written_windows
from llmq.text.held_out import (
    MAX_LENGTH,
    N_WINDOWS,
    SAME,
    HeldOutText,
    begun_with,
    bundled_texts,
)
from llmq_kernels.core.cache import cache_dir

BATCH_SIZE = 32


def self_written(
    source: Source,
    recipe: Recipe,
    device: str,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> TokenSet:
    """The windows of a recipe, written by the model. on_batch: told how many are done, of how
    many."""
    tokenizer = own_tokenizer(source)
    dtype = "auto" if multiplies_bfloat16(device) else "float32"
    told = {
        "seed": recipe.seed,
        "dtype": dtype,
        "batch_size": BATCH_SIZE,
        "greedy_tokens": list(GREEDY_TOKENS),
    }
    read = {"source": SELF, "rows": recipe.samples, "written": told}
    folder = _folder(source, recipe, {**told, "device": device.partition(":")[0]})
    bos = first_token(tokenizer, source.config)
    size = min(MAX_LENGTH, recipe.sequence_length)
    n_spare = -(-N_WINDOWS * size // recipe.sequence_length)
    tokens = running(source.folder)(_windows)(
        source,
        replace(recipe, samples=recipe.samples + n_spare),
        folder,
        (dtype, device),
        bos,
        on_batch,
    )
    spare = tokens[recipe.samples :]
    cut = spare[:, : spare.shape[1] // size * size].reshape(-1, size)[:N_WINDOWS]
    held_out = [HeldOutText(SAME, SELF, cut), *bundled_texts(False, tokenizer, size)]
    return TokenSet(
        tokens[: recipe.samples],
        SELF,
        fingerprint(tokenizer),
        read,
        tuple(begun_with(each, bos) for each in held_out),
    )


def _windows(
    source: Source,
    recipe: Recipe,
    folder: Path,
    kind: tuple[str, str],
    bos: int | None,
    on_batch: Callable[[int, int], None],
) -> Tensor:
    written = written_windows(folder, recipe.samples, BATCH_SIZE)
    if written is not None:
        return written
    dtype, device = kind
    model = prepare_decoding(load(source, dtype=dtype, device=device))
    return generate_windows(
        model,
        recipe.samples,
        recipe.sequence_length,
        folder,
        seed=recipe.seed,
        batch_size=BATCH_SIZE,
        bos=bos,
        on_batch=on_batch,
    )


def _folder(source: Source, recipe: Recipe, told: dict[str, Any]) -> Path:
    """Where the windows of this model and recipe are kept."""
    decides = {
        "weights": files.stamps(set(source.shards.names.values())),
        "contents": source.files.contents(),
        "windows": [recipe.samples, recipe.sequence_length],
        "told": told,
        "software": [llmq.__version__, torch.__version__, transformers.__version__],
    }
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "text" / f"{SELF}-{key[:32]}"
