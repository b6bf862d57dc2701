"""Quantize a model in memory with the Python API, look at every layer's error, save.

    python scripts/quantize.py tiny out/tiny-w4

The command `llmq quantize` does the same from disk to disk, with the memory of one block.
"""

from __future__ import annotations

import argparse

import llmq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument(
        "--spec", default="w4g128", help="such as w4g128, w3g64-asym, w8, W4A16, W8A8"
    )
    parser.add_argument("--calibration", default="bundled")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    args = parser.parse_args()

    model = llmq.load(args.model)
    texts = llmq.load_documents(args.calibration, "calibration")
    size = {"samples": args.samples, "sequence_length": args.sequence_length}

    for block in llmq.quantize(model, args.spec, texts, **size):
        for layer in block.layers:
            print(
                f"{layer.name}: {layer.error:.2e} of the output (plain rounding: "
                f"{layer.rtn_error:.2e})"
            )
    print("saved to", llmq.save(model, args.out))


if __name__ == "__main__":
    main()
