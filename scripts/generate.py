"""Load a model, quantized or not, and generate text with transformers' own `generate`.

python scripts/generate.py tiny --prompt "def main():"
"""

from __future__ import annotations

import argparse

import llmq
from llmq.models.source import load_tokenizer, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompt", default="def main():")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    args = parser.parse_args()

    model = llmq.load(args.model)
    tokenizer = load_tokenizer(resolve(args.model))
    inputs = tokenizer(args.prompt, return_tensors="pt")
    output = model.generate(
        **inputs,
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
