"""Perplexity of a model, quantized or not, with the Python API.

python scripts/eval_perplexity.py tiny
"""

from __future__ import annotations

import argparse

import llmq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", default="bundled")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--max-characters", type=int, default=100_000)
    args = parser.parse_args()

    model = llmq.load(args.model, dtype="float32")
    text = "\n\n".join(llmq.load_documents(args.data, "eval"))[: args.max_characters]
    result = llmq.perplexity(model, text, sequence_length=args.sequence_length)
    print(
        f"perplexity {result.value:.4f}, 95% interval {result.ci95[0]:.4f} to "
        f"{result.ci95[1]:.4f}, {result.windows.n_targets} tokens"
    )


if __name__ == "__main__":
    main()
