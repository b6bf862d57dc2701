"""How fast a model writes text to be trained on: llmq's writer, which `llmq qat --train generated`
uses, beside transformers' `generate`, tokens per second.

    python scripts/benchmark_writing.py tiny
    python scripts/benchmark_writing.py MODEL --batch-size 8 32 128 --length 256

Both sample from the whole vocabulary at temperature 1; they take turns, the median of all turns."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

import llmq
from llmq.text.generate import generate_batch

DTYPES = ("float32", "bfloat16")


def by_llmq(model: PreTrainedModel, first: torch.Tensor, length: int) -> torch.Tensor:
    return generate_batch(model, first, length, torch.Generator().manual_seed(0))


def by_transformers(model: PreTrainedModel, first: torch.Tensor, length: int) -> torch.Tensor:
    torch.manual_seed(0)
    written: torch.Tensor = model.generate(  # type: ignore[operator]
        first[:, None],
        attention_mask=torch.ones_like(first[:, None]),
        do_sample=True,
        top_k=0,
        min_new_tokens=length - 1,
        max_new_tokens=length - 1,
        pad_token_id=0,
    )
    return written


WRITERS: dict[str, Callable[[PreTrainedModel, torch.Tensor, int], torch.Tensor]] = {
    "transformers": by_transformers,
    "llmq": by_llmq,
}


def tokens_per_second(
    model: PreTrainedModel, batch_size: int, length: int, turns: int
) -> dict[str, float]:
    """By writer, without the first turn, which warms up."""
    vocabulary = model.config.get_text_config().vocab_size
    first = torch.randint(vocabulary, (batch_size,), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in WRITERS}
    for turn in range(turns + 1):
        for name, write in WRITERS.items():
            started = time.perf_counter()
            written = write(model, first.to(model.device), length if turn else 4)
            assert written.shape == (batch_size, length if turn else 4), written.shape
            if turn:
                seconds[name].append(time.perf_counter() - started)
    new = batch_size * (length - 1)
    return {name: new / statistics.median(each) for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(
        f"{args.length} tokens each, {args.device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}\n\n| | {' | '.join(WRITERS)} | ratio |\n|---|---|---|---|"
    )
    for dtype in DTYPES:
        model = llmq.load(args.model, dtype=dtype).to(args.device).eval()
        for batch_size in args.batch_size:
            found = tokens_per_second(model, batch_size, args.length, args.turns)
            cells = [f"{value:.0f}" for value in found.values()]
            ratio = found["llmq"] / found["transformers"]
            print(
                f"| {dtype}, batches of {batch_size} | {' | '.join(cells)} | {ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
