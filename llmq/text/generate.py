"""Text that a model writes itself, to train or calibrate on where there is no other (LLM-QAT, Liu
et al., 2023, section 3.1).

Each sequence starts from a token of the vocabulary, goes on greedily for three to five tokens and
is then sampled from the teacher's own distribution: greedy starts keep the beginnings sensible,
sampling keeps the texts diverse. Batches are written one by one and sealed, so an interrupted run
goes on with the next batch; a batch depends on the seed and its number alone, and a damaged one is
written again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from llmq.inference.cache import in_place_cache
from llmq.models.compat import cache_name
from llmq.storage import files, seals
from llmq.storage.workspace import tell

GREEDY_TOKENS = (3, 4, 5)


@torch.no_grad()
def generate_batch(
    teacher: PreTrainedModel,
    first: Tensor,
    length: int,
    generator: torch.Generator,
    bos: int | None = None,
) -> Tensor:
    """Sequences int64 `[B, length]` that begin with the tokens `first` `[B]`, after a BOS token for
    teachers that are broken without it."""
    n_greedy = torch.tensor(GREEDY_TOKENS)[
        torch.randint(len(GREEDY_TOKENS), (len(first),), generator=generator)
    ]
    tokens, cache = [first], in_place_cache(teacher.config, length)
    unseen = first[:, None]
    if bos is not None:
        unseen = torch.stack([torch.full_like(first, bos), first], dim=1)
    for step in range(1, length - unseen.shape[1] + 1):
        logits = (
            teacher(
                input_ids=unseen.to(teacher.device),
                use_cache=True,
                **{cache_name(): cache},
            )
            .logits[:, -1]
            .float()
            .cpu()
        )
        sampled = torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)[:, 0]
        tokens.append(torch.where(step <= n_greedy, logits.argmax(dim=-1), sampled))
        unseen = tokens[-1][:, None]
    if bos is not None:
        tokens = [torch.full_like(first, bos), *tokens]
    return torch.stack(tokens, dim=1)


def _batch_path(work_dir: Path, number: int) -> Path:
    return work_dir / f"generated-{number:05d}.safetensors"


def written_windows(work_dir: Path, n_windows: int, batch_size: int = 32) -> Tensor | None:
    """What `generate_windows` left in a folder, None where a batch is missing or damaged."""
    paths = [_batch_path(work_dir, i) for i in range(-(-n_windows // batch_size))]
    if not all(map(seals.is_sound, paths)):
        return None
    return torch.cat([load_file(path)["tokens"] for path in paths])


def generate_windows(
    teacher: PreTrainedModel,
    n_windows: int,
    length: int,
    work_dir: Path,
    *,
    seed: int = 0,
    batch_size: int = 32,
    bos: int | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """`n_windows` sequences int64 `[n, length]`. First tokens run through the vocabulary in a
    seeded random order, again and again. bos: see `generate_batch`. work_dir: where batches lie,
    finished ones are not made again."""
    vocabulary = torch.randperm(
        teacher.config.get_text_config().vocab_size, generator=torch.Generator().manual_seed(seed)
    )
    work_dir.mkdir(parents=True, exist_ok=True)
    batches = []
    on_batch(0, n_windows)
    for number, start in enumerate(range(0, n_windows, batch_size)):
        path = _batch_path(work_dir, number)
        if not seals.is_sound(path):
            if os.path.lexists(path):
                tell(f"{path}: is not as it was when it was finished; this batch is written again")
            first = vocabulary[
                torch.arange(start, min(start + batch_size, n_windows)) % len(vocabulary)
            ]
            tokens = generate_batch(
                teacher,
                first,
                length,
                torch.Generator().manual_seed(seed * 1_000_003 + number),
                bos,
            )
            partial = path.with_suffix(".tmp")
            files.write_tensors(partial, {"tokens": tokens})
            seals.seal(path, files.digest(partial))
            partial.replace(path)
            files.sync_folder(work_dir)
        batches.append(load_file(path)["tokens"])
        on_batch(min(start + batch_size, n_windows), n_windows)
    return torch.cat(batches)
