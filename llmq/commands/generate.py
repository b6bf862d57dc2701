"""`llmq generate MODEL --prompt TEXT`: one answer, or where there is no chat template a text that
goes on. What decides how it is written stands in `writing.py`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from llmq.commands import options, streaming, writing, writing_options
from llmq.commands.parser import Parser
from llmq.errors import LlmqError

if TYPE_CHECKING:
    from torch import Tensor

HELP = (
    "Answer a prompt, through the model's chat template when it has one. Streams text to stdout, "
    "prints tokens/s and weight GB/s to stderr. In --json, 'text' is what the model wrote, without "
    "the prompt and without special tokens."
)
EXAMPLES = (
    "llmq generate tiny --prompt 'def main():'",
    "llmq generate tiny --prompt 'def' --temperature 0.7 --top-p 0.9 --seed 1",
    "echo 'import os' | llmq generate tiny --stop return --max-new-tokens 20",
)
STDIN = "-"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", help=options.MODEL_HELP)
    parser.section("text")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        default=STDIN,
        help="what to answer; without it, or with -, standard input, but for its last line break",
    )
    writing_options.add_writing_arguments(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str] | None:
    """The result as JSON-able data and as text; None where the text is printed already."""
    start = writing.Start.of(args)
    prompt = _read_prompt(args, start.tokenizer, start.is_templated)
    max_new_tokens = start.room.new_tokens(prompt.shape[1])  # before any weight is read
    return _answer(args, start.writer(), prompt, max_new_tokens, start.is_templated)


def _read_prompt(args: argparse.Namespace, tokenizer: Any, is_templated: bool) -> Tensor:
    """Token ids of the prompt, int64 `[1, T]`, with what the chat template puts around it."""
    from llmq.text.chat import template_ids, text_ids

    text = _stdin_text() if args.prompt == STDIN else args.prompt
    if not is_templated:
        return text_ids(tokenizer, text, args.model)
    if not text.strip():
        raise LlmqError("--prompt: empty; give some text to answer")
    messages = [{"role": "user", "content": text}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    return template_ids(tokenizer, messages, args.model)


def _stdin_text() -> str:
    """All of standard input, without the line break that a shell puts at its end."""
    from llmq.storage.boundary import reading

    if sys.stdin.isatty():
        print("prompt (end it with Ctrl-D on a line of its own):", file=sys.stderr)
    with reading("standard input", "not a text", "give one in UTF-8, or use --prompt TEXT"):
        return sys.stdin.read().removesuffix("\n")


def _answer(
    args: argparse.Namespace,
    writer: writing.Writer,
    prompt: Tensor,
    max_new_tokens: int,
    is_templated: bool,
) -> tuple[dict[str, Any], str] | None:
    """Generate, print the text where it is not the JSON that is asked for, and report."""
    from llmq.inference.module import backends_in_use
    from llmq.inference.step import report

    is_streamed = writer.is_one and not args.json
    streamer = streaming.Streamer(writer.tokenizer, stops=args.stop, shows_prompt=not is_templated)
    answer = writer.write(prompt, max_new_tokens, streamer if is_streamed else None)
    found = writing.speed(writer.model, answer.n_new, answer.seconds)
    if not args.json and not is_streamed:
        texts = answer.texts if is_templated else answer.whole_texts
        print(streaming.shown("\n".join(texts), sys.stdout), flush=True)
    writing.tell_speed(found, answer.remark)
    if not args.json:
        return None
    result = {
        "text": answer.text,
        "texts": answer.texts,
        "finish_reason": answer.finish_reason,
        "chat_template": is_templated,
        "prompt_tokens": answer.n_prompt,
        **found,
        "backends": backends_in_use(writer.model),
        "recorded_steps": report(writer.model),
    }
    return result, ""
