"""`llmq generate MODEL --prompt TEXT`."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from llmq.commands import common
from llmq.commands.values import real, whole

HELP = "Generate text; streams tokens to stdout, prints tokens/s and weight GB/s to stderr."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=common.MODEL_HELP)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=whole(1), default=64, metavar="N")
    parser.add_argument("--temperature", type=real(), default=0.0, help="0: the likeliest token each time (default)")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto, as stored)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--revision", help="revision of a Hub model")
    common.add_compute_argument(parser)
    common.add_head_argument(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    import torch
    from transformers import TextStreamer

    from llmq.data import check_vocabulary
    from llmq.errors import LlmqError
    from llmq.formats.load import load
    from llmq.inference.decoding import generate, prepare_decoding
    from llmq.inference.step import report
    from llmq.models.load import load_tokenizer, resolve
    from llmq.modules import backends_in_use

    common.check_device(args.device)
    model_dir = resolve(args.model, args.revision)
    tokenizer = load_tokenizer(model_dir)
    inputs = tokenizer(args.prompt, return_tensors="pt")
    n_prompt = inputs["input_ids"].shape[1]
    if n_prompt == 0:
        raise LlmqError("--prompt: no tokens; give some text to go on from")
    model = prepare_decoding(load(model_dir, dtype=args.dtype, device=args.device, compute=args.compute), head_bits=args.head_bits)
    check_vocabulary(inputs["input_ids"], model.config.get_text_config().vocab_size, "--prompt")
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    streamer = None if args.json else TextStreamer(tokenizer)  # type: ignore[no-untyped-call]
    started = time.perf_counter()
    output = generate(model, inputs["input_ids"].to(model.device), args.max_new_tokens, streamer=streamer, pad_token_id=tokenizer.eos_token_id, **sampling)[0]
    seconds = time.perf_counter() - started
    n_new = len(output) - n_prompt
    weight_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    rate = n_new / seconds
    print(f"{n_new} tokens in {seconds:.2f} s: {rate:.1f} tokens/s, {rate * weight_bytes / 1e9:.2f} GB/s of weights", file=sys.stderr)
    result = {
        "text": tokenizer.decode(output, skip_special_tokens=True),
        "new_tokens": n_new,
        "seconds": seconds,
        "tokens_per_second": rate,
        "weight_gb_per_second": rate * weight_bytes / 1e9,
        "backends": backends_in_use(model),
        "recorded_steps": report(model),
    }
    return result, ""
