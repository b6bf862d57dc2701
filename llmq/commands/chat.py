"""`llmq chat MODEL`: a conversation, each turn with all that came before.

On a terminal it asks and streams; from a file or a pipe every line is a turn. What earlier turns
have computed is kept where the model's cache allows it."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmq.commands import options, streaming, writing, writing_options
from llmq.commands.parser import Parser
from llmq.errors import LlmqError

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.inference.kept_cache import KeptCache
    from llmq.text.chat import Message

HELP = (
    "Talk to a model, through its chat template when it has one. Each line is a turn: from a "
    "terminal, a file or a pipe. /reset forgets what was said, /exit or the end of input ends. "
    "--json prints all turns at the end."
)
EXAMPLES = (
    "llmq chat Qwen/Qwen3-0.6B",
    "llmq chat Qwen/Qwen3-0.6B --system 'Answer in one line.' --temperature 0.7",
    "echo 'def main():' | llmq chat tiny --raw --json",
)
ASK = "> "


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", help=options.MODEL_HELP)
    writing_options.add_writing_arguments(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str] | None:
    """The result as JSON-able data and as text; None where the text is printed already."""
    from llmq.inference.module import backends_in_use
    from llmq.inference.step import report
    from llmq.messages import one_line

    talk = _start(args)
    is_asked = sys.stdin.isatty()
    turns: list[dict[str, Any]] = []
    n_resets = 0
    for line in _lines(is_asked, args.json):
        if line == "/reset":
            talk.reset()
            n_resets += 1
            continue
        try:
            turn = talk.turn(line, is_asked)
        except LlmqError as error:
            if not is_asked:
                raise
            print(one_line(error), file=sys.stderr)  # the conversation can go on
            continue
        turns.append({"conversation": n_resets, **turn})
    total = _total(talk.writer, turns)
    if turns:
        writing.tell_speed(total, f", {len(turns)} turns")
    if not args.json:
        return None
    result = {
        "model": args.model,
        "system": args.system,
        "chat_template": talk.is_templated,
        "turns": turns,
        **total,
        "backends": backends_in_use(talk.writer.model),
        "recorded_steps": report(talk.writer.model),
    }
    return result, ""


def _start(args: argparse.Namespace) -> Talk:
    """Everything that can be checked before weights are read, then the model."""
    from llmq.inference.kept_cache import KeptCache

    start = writing.Start.of(args)
    n_texts = start.stored["num_return_sequences"] or 1
    if n_texts > 1:
        raise LlmqError(
            f"{args.model}: its generation config asks for {n_texts} texts at once, and a "
            "conversation has one answer; use llmq generate"
        )
    room = replace(
        start.room,
        what="a conversation",
        remedy="begin anew with /reset",
        is_most=True,
    )
    writer = start.writer()
    if not start.is_templated and not args.raw:
        print(
            f"{args.model} has no chat template: what is said goes on as plain text",
            file=sys.stderr,
        )
    return Talk(args, writer, room, start.is_templated, KeptCache(writer.model))


def _lines(is_asked: bool, is_json: bool) -> Iterator[str]:
    """What the user says, a line at a time, up to `/exit`: all but empty lines and commands that
    there are not."""
    from llmq.storage.boundary import reading

    if is_asked:
        _use_line_editing()
        print("/reset forgets what was said, /exit ends", file=sys.stderr)
    while True:
        with reading("standard input", "not a text", "give one in UTF-8"):
            line = _asked(is_json) if is_asked else sys.stdin.readline()
        if not line:
            return
        line = line.strip()
        if line == "/exit":
            return
        if line.startswith("/") and line[1:].isalpha() and line != "/reset":
            print(f"{line}: no such command; there are /reset and /exit", file=sys.stderr)
        elif line:
            yield line


def _asked(is_json: bool) -> str:
    """A line from the terminal, "" at the end of input."""
    stream = sys.stderr if is_json or not sys.stdout.isatty() else sys.stdout
    try:
        if stream is sys.stdout:
            return input(ASK) + "\n"
        print(ASK, end="", file=stream, flush=True)
        return sys.stdin.readline()
    except EOFError:
        print()
        return ""


def _use_line_editing() -> None:
    """Arrow keys and earlier lines, where Python has them."""
    try:
        import readline  # noqa: F401, what it does it does when it is imported
    except ImportError:
        return


@dataclass
class Talk:
    """A conversation with a model. messages: what was said, the system's first."""

    args: argparse.Namespace
    writer: writing.Writer
    room: writing_options.Room
    is_templated: bool
    kept: KeptCache
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        system = self.args.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def turn(self, text: str, is_asked: bool) -> dict[str, Any]:
        """Say something and have it answered; what became of it. Raises `LlmqError`, and then
        nothing was said."""
        said: list[Message] = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt(said)
        ids = prompt[0].tolist()
        n_new = self.room.new_tokens(len(ids))
        cache, n_kept = self.kept.for_prompt(ids, n_new, self.writer.options)
        streamer = self._streamer(is_asked)
        with _interruptible(self.writer, is_asked):
            answer = self.writer.write(prompt, n_new, streamer, cache)
        if streamer is None and not self.args.json:  # of beams
            print(streaming.shown(answer.text, sys.stdout), flush=True)
        self.kept.keep(answer.ids)
        self.messages = [*said, {"role": "assistant", "content": answer.text}]
        if is_asked and answer.remark:
            print(answer.remark.removeprefix("; "), file=sys.stderr)
        return {
            "prompt": text,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.n_prompt,
            "kept_tokens": n_kept,
            "new_tokens": answer.n_new,
            "seconds": answer.seconds,
        }

    def _prompt(self, messages: list[Message]) -> Tensor:
        from llmq.text.chat import template_ids, text_ids

        if self.is_templated:
            return template_ids(self.writer.tokenizer, messages, self.args.model)
        return text_ids(self.writer.tokenizer, plain_text(messages), self.args.model)

    def _streamer(self, is_asked: bool) -> streaming.Streamer | None:
        """Prints the answer; with --json on a terminal, where a user waits for it, to stderr."""
        if not self.writer.is_one or (self.args.json and not is_asked):
            return None
        stream = sys.stderr if self.args.json else sys.stdout
        return streaming.Streamer(self.writer.tokenizer, stream, stops=self.args.stop)


def plain_text(messages: list[Message]) -> str:
    """A conversation without a template: what was said and what followed, a turn a line."""
    pieces = []
    for message in messages:
        is_answer = message["role"] == "assistant"
        pieces.append(message["content"] + ("\n" if is_answer else ""))
    return "".join(pieces)


@contextmanager
def _interruptible(writer: writing.Writer, is_asked: bool) -> Iterator[None]:
    """Let Ctrl-C end the answer and not the conversation, where somebody is there to go on."""
    if not is_asked:
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: writer.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _total(writer: writing.Writer, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    n_new = sum(turn["new_tokens"] for turn in turns)
    return writing.speed(writer.model, n_new, sum(turn["seconds"] for turn in turns))
