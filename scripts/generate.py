"""Load a model, quantized or not, make it ready for decoding, and generate text.

python scripts/generate.py tiny --prompt "def main():"
"""

from __future__ import annotations

import argparse

import llmq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompt", default="def main():")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    args = parser.parse_args()

    model = llmq.prepare_decoding(llmq.load(args.model))
    print(args.prompt + llmq.generate(model, args.prompt, args.max_new_tokens))


if __name__ == "__main__":
    main()
