"""`llmq generate MODEL --prompt TEXT`."""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import TYPE_CHECKING, Any

from llmq.commands import common
from llmq.commands.values import real, whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

HELP = "Generate text; streams tokens to stdout, prints tokens/s and weight GB/s to stderr."
DEFAULT_NEW_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=common.MODEL_HELP)
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1),
        metavar="N",
        help=f"(default: {DEFAULT_NEW_TOKENS}, or what the model has positions for)",
    )
    parser.add_argument(
        "--temperature", type=real(), default=0.0, help="0: the likeliest token each time (default)"
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument(
        "--dtype",
        default="auto",
        help="auto, float32, bfloat16 or float16 (default: auto, as stored)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--revision", help="revision of a Hub model")
    common.add_compute_argument(parser)
    common.add_head_argument(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    import torch
    from transformers import TextStreamer

    from llmq.data import check_vocabulary
    from llmq.formats.load import load
    from llmq.inference.decoding import generate, prepare_decoding
    from llmq.inference.step import report
    from llmq.models.source import load_config, load_tokenizer, resolve
    from llmq.modules import backends_in_use
    from llmq.storage.boundary import reading, running

    common.check_device(args.device)
    model_dir = resolve(args.model, args.revision)
    config = load_config(model_dir)
    tokenizer = load_tokenizer(model_dir)
    with reading(model_dir, "its tokenizer cannot read the prompt", "give another --prompt"):
        prompt = tokenizer(args.prompt, return_tensors="pt")["input_ids"]
    max_new_tokens = _new_tokens(args.max_new_tokens, prompt.shape[1], config)
    model = running(args.model)(prepare_decoding)(
        load(model_dir, dtype=args.dtype, device=args.device, compute=args.compute),
        head_bits=args.head_bits,
    )
    check_vocabulary(prompt, model.config.get_text_config().vocab_size, "--prompt")
    torch.manual_seed(args.seed)
    streamer = None if args.json else TextStreamer(tokenizer)  # type: ignore[no-untyped-call]
    started = time.perf_counter()
    output = running(args.model)(generate)(
        model,
        prompt.to(model.device),
        max_new_tokens,
        streamer=streamer,
        pad_token_id=tokenizer.eos_token_id,
        **_sampling(args, model.dtype),
    )[0]
    speed = _speed(model, len(output) - prompt.shape[1], time.perf_counter() - started)
    print(
        f"{speed['new_tokens']} tokens in {speed['seconds']:.2f} s: {speed['tokens_per_second']:.1f} tokens/s, {speed['weight_gb_per_second']:.2f} GB/s of weights",
        file=sys.stderr,
    )
    return {
        "text": running(args.model)(tokenizer.decode)(output, skip_special_tokens=True),
        **speed,
        "backends": backends_in_use(model),
        "recorded_steps": report(model),
    }, ""


def _new_tokens(asked: int | None, n_prompt: int, config: Any) -> int:
    """How many tokens at most. Raises `LlmqError` for an empty prompt and for more than the model
    has positions for."""
    from llmq.errors import LlmqError
    from llmq.models.arch import check_length, position_limit

    if n_prompt == 0:
        raise LlmqError("--prompt: no tokens; give some text to go on from")
    left = (position_limit(config) or n_prompt + DEFAULT_NEW_TOKENS) - n_prompt
    n_new = asked or max(1, min(DEFAULT_NEW_TOKENS, left))
    remedy = f"give --max-new-tokens {left} or less" if left > 0 else "give a shorter --prompt"
    check_length(
        config, n_prompt + n_new, f"--prompt of {n_prompt} tokens and {n_new} new ones", remedy
    )
    return n_new


def _sampling(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """How `generate` picks a token, and a check of the first one's logits: the likeliest of NaNs is
    the first token of the vocabulary, and looks like an answer."""
    from transformers import LogitsProcessorList

    from llmq.errors import VerificationError
    from llmq.evaluation.perplexity import not_finite

    is_first = True

    def check(input_ids: Tensor, scores: Tensor) -> Tensor:
        nonlocal is_first
        # Minus infinity is how a generation config suppresses tokens.
        if is_first and not bool((scores < math.inf).all()):
            raise VerificationError(
                f"{args.model}: the logits after the prompt are {not_finite(dtype)}"
            )
        is_first = False
        return scores

    # Closer to 0 a score over the temperature leaves float32, and only the likeliest token is left
    # anyway.
    how = (
        {"do_sample": True, "temperature": args.temperature}
        if args.temperature > 1e-6
        else {"do_sample": False}
    )
    return {**how, "logits_processor": LogitsProcessorList([check])}


def _speed(model: PreTrainedModel, n_new: int, seconds: float) -> dict[str, Any]:
    weight_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    rate = n_new / seconds
    return {
        "new_tokens": n_new,
        "seconds": seconds,
        "tokens_per_second": rate,
        "weight_gb_per_second": rate * weight_bytes / 1e9,
    }
