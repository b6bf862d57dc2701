"""How a model writes, as `generate` and `chat` are told: their options, whether there is a chat
template, and how many tokens there may be."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmq.commands import options
from llmq.commands.options import real, whole
from llmq.commands.parser import Parser
from llmq.errors import LlmqError

DEFAULT_NEW_TOKENS = 64  # where a text goes on
DEFAULT_ANSWER_TOKENS = 512  # of an answer, which has an end of its own
# Closer to 0 a score over the temperature leaves float32, and only the likeliest token is left
# anyway.
NO_TEMPERATURE = 1e-6


def add_writing_arguments(parser: Parser) -> None:
    """How a model writes, and when it stops."""
    parser.section("text")
    parser.add_argument("--system", metavar="TEXT", help="what the chat template says first")
    parser.add_argument(
        "--raw", action="store_true", help="no chat template, though there is one: text goes on"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1),
        metavar="N",
        help="(default: max_new_tokens of the model's generation config, else "
        f"{DEFAULT_ANSWER_TOKENS} for a chat template and {DEFAULT_NEW_TOKENS} without; at most "
        "what it has positions for)",
    )
    parser.add_argument(
        "--temperature",
        type=real(),
        default=0.0,
        help="0: the likeliest token each time, or the likeliest beam (default, whatever the "
        "generation config says of sampling); above, samples with its top_k, top_p and so on",
    )
    parser.more.add_argument(
        "--top-p",
        type=real(0, 1),
        metavar="P",
        help="sample from the likeliest tokens that have this share of the probability together",
    )
    parser.more.add_argument(
        "--top-k",
        type=whole(0),
        metavar="K",
        help="sample from the K likeliest tokens; 0: from all",
    )
    parser.add_argument(
        "--stop",
        type=_stop,
        action="append",
        default=[],
        metavar="TEXT",
        help="stop before this text, which is not printed; may be given several times",
    )
    parser.more.add_argument("--seed", type=whole(0), default=0, help="of sampling (default: 0)")
    parser.section("how it runs")
    parser.more.add_argument(
        "--dtype",
        choices=options.DTYPES,
        default="auto",
        metavar="DTYPE",
        help="auto, float32, bfloat16 or float16 (default: auto, as stored)",
    )
    options.add_inference_arguments(parser)


def _stop(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected a text, got '', in which every text ends")
    return text


def is_sampled(args: argparse.Namespace) -> bool:
    """Whether tokens are drawn."""
    return bool(args.temperature > NO_TEMPERATURE)


def check_options(args: argparse.Namespace) -> None:
    """Raise `LlmqError` for options that would change nothing, and for a device that is not
    there."""
    options.check_device(args.device)
    for name in ("top_p", "top_k"):
        value = getattr(args, name)
        if value is not None and not is_sampled(args):
            raise LlmqError(
                f"--{name.replace('_', '-')} {value}: nothing is drawn at temperature 0; add "
                "--temperature 0.7"
            )


def uses_template(args: argparse.Namespace, tokenizer: Any) -> bool:
    """Whether prompts go through the chat template. Raises `LlmqError` where `--system` has no
    place."""
    from llmq.text.chat import has_template

    is_templated = has_template(tokenizer) and not args.raw
    if args.system is not None and not is_templated:
        reason = "--raw leaves the chat template out" if args.raw else "it has no chat template"
        raise LlmqError(f"--system, {args.model}: {reason}; say it in the prompt")
    return is_templated


@dataclass(frozen=True)
class Room:
    """How many tokens there may be. asked: by the user. default: where nobody says. what: the name
    of the prompt in messages, and remedy what to do when it is too long. is_most: where fewer are
    left than were asked for, those have to do."""

    config: Any
    stored: Mapping[str, Any]
    asked: int | None
    default: int
    what: str = "--prompt"
    remedy: str = "give a shorter --prompt"
    is_most: bool = False

    @classmethod
    def of(
        cls, args: argparse.Namespace, config: Any, stored: Mapping[str, Any], is_templated: bool
    ) -> Room:
        """By the options. stored: the generation config."""
        default = DEFAULT_ANSWER_TOKENS if is_templated else DEFAULT_NEW_TOKENS
        return cls(config, stored, args.max_new_tokens, default)

    def new_tokens(self, n_prompt: int) -> int:
        """How many at most behind a prompt: those asked for, else those that the generation config
        says. Raises `LlmqError` for an empty prompt and for more than the model has positions
        for."""
        from llmq.models.arch import check_length, position_limit

        if n_prompt == 0:
            raise LlmqError(f"{self.what}: no tokens; give some text to go on from")
        left = (position_limit(self.config) or n_prompt + self.default) - n_prompt
        n_new = self.asked or max(1, min(self._stored(n_prompt), left))
        if self.is_most:
            n_new = max(1, min(n_new, left))
        remedy = f"give --max-new-tokens {left} or less" if left > 0 else self.remedy
        what = f"{self.what} of {n_prompt} tokens and {n_new} new ones"
        check_length(self.config, n_prompt + n_new, what, remedy)
        return n_new

    def _stored(self, n_prompt: int) -> int:
        """By the generation config: its `max_new_tokens`, else the default within its
        `max_length`."""
        n_new, most = self.stored["max_new_tokens"], self.stored["max_length"]
        if n_new is not None:
            return int(n_new)
        if most is not None and most <= n_prompt:
            raise LlmqError(
                f"{self.what} of {n_prompt} tokens: the generation config has max_length {most}, "
                "with the prompt; give --max-new-tokens, which goes before it"
            )
        return self.default if most is None else min(self.default, most - n_prompt)
