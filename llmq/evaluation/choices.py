"""Multiple choice: which answer a model finds likeliest, and how answers change by quantization.

A file has one question per line, `{"question": ..., "choices": [...], "answer": 0}`; `context` may
stand for `question`. The score of a choice is the log-likelihood of its tokens behind the question,
divided by the UTF-8 bytes of the choice, since longer ones are less likely by themselves; the first
of the best is the answer.

Question and choice are tokenized together, a space between them unless one brings its own, because
tokens may reach over the place where they meet. What counts for all choices of a question begins
behind the tokens that the question alone and every choice of it have in common, so all are scored
behind the same tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmq.errors import LlmqError
from llmq.evaluation.perplexity import window_losses
from llmq.evaluation.protocols.base import Span, read_spans
from llmq.models.arch import check_length
from llmq.storage.boundary import check_regular, reading
from llmq.text.encoding import encode
from llmq.text.files import READERS, kind_of
from llmq.text.windows import Windows, resolve_bos

SCORE = "log-likelihood of a choice per byte of it"
CONTEXT = ("question", "context")
ROWS_TOGETHER = 64  # padded to the longest among them
_KINDS = (".jsonl", ".jsonl.gz")
_REMEDY = 'give one question per line: {"question": "...", "choices": ["...", "..."], "answer": 0}'


@dataclass(frozen=True)
class Question:
    """answer: which of the choices is right, counted from 0."""

    context: str
    choices: tuple[str, ...]
    answer: int

    @classmethod
    def parse(cls, row: Any, where: str) -> Question:
        """A question of a row. Raises `LlmqError` for anything else."""
        context = next((row[name] for name in CONTEXT if name in row), None)
        if not isinstance(context, str):
            raise _refused(where, "a text in 'question' or 'context'", context)
        choices = row.get("choices")
        if not isinstance(choices, list) or len(choices) < 2:
            raise _refused(where, "two or more texts in 'choices'", choices)
        for choice in choices:
            if not isinstance(choice, str) or not choice.strip():
                raise _refused(where, "texts that are not empty in 'choices'", choice)
        answer = row.get("answer")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise _refused(where, f"a number from 0 to {len(choices) - 1} in 'answer'", answer)
        return cls(context, tuple(choices), answer)


def _refused(where: str, expected: str, value: Any) -> LlmqError:
    return LlmqError(f"{where}: expected {expected}, got {value!r}; {_REMEDY}")


@dataclass(frozen=True)
class Row:
    """A question with one of its choices. tokens: int64 `[n]`, of which those from `first` on are
    scored. n_bytes: of the choice."""

    tokens: Tensor
    first: int
    n_bytes: int


@dataclass(frozen=True)
class ChoiceFile:
    """Questions of a file as a model reads them. rows: by question, one for each choice. bos: the
    policy that was applied."""

    name: str
    sha256: str
    bos: str
    questions: tuple[Question, ...]
    rows: tuple[tuple[Row, ...], ...]

    @property
    def answers(self) -> list[int]:
        """The right ones."""
        return [question.answer for question in self.questions]

    @property
    def n_rows(self) -> int:
        """Choices of all questions."""
        return sum(map(len, self.rows))

    def check_positions(self, config: Any) -> None:
        """Raise `LlmqError` for questions longer than a model has positions for."""
        for number, rows in enumerate(self.rows):
            n_tokens = max(len(row.tokens) for row in rows) - 1  # nothing is read behind the last
            where = f"{self.name}: row {number} of {n_tokens} tokens"
            check_length(config, n_tokens, where, "shorten the question, or leave it out")

    def identity(self) -> dict[str, Any]:
        """What a figure measured on it has to carry."""
        return {
            "file": self.name,
            "sha256": self.sha256,
            "questions": len(self.questions),
            "score": SCORE,
            "bos": self.bos,
        }


def read_questions(path: Path) -> list[Question]:
    """The questions of a `.jsonl` or `.jsonl.gz` file. Raises `LlmqError` that names file and
    row."""
    if kind_of(path) not in _KINDS:
        raise LlmqError(f"{path}: expected a {' or '.join(_KINDS)} file; {_REMEDY}")
    check_regular(path)
    with reading(path, f"not readable as {kind_of(path)}", _REMEDY):
        rows = list(READERS[kind_of(path)](path, None))
    if not rows:
        raise LlmqError(f"{path}: holds no question; {_REMEDY}")
    return [Question.parse(row, f"{path}: row {number}") for number, row in enumerate(rows)]


def read_choices(path: Path, tokenizer: PreTrainedTokenizerBase, config: Any) -> ChoiceFile:
    """The questions of a file, tokenized. Raises `LlmqError` for what is no question, and for one
    that is longer than the model has positions for."""
    questions = read_questions(path)
    policy, begin = resolve_bos("auto", tokenizer, config)
    rows = tuple(
        tokenized(question, tokenizer, begin, f"{path}: row {number}")
        for number, question in enumerate(questions)
    )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    found = ChoiceFile(path.name, digest, policy, tuple(questions), rows)
    found.check_positions(config)
    return found


def tokenized(
    question: Question, tokenizer: PreTrainedTokenizerBase, begin: int | None, where: str
) -> tuple[Row, ...]:
    """A question with each of its choices. begin: a token that stands before it, None for none.
    Raises `LlmqError` where nothing stands before what is scored, or nothing is scored."""
    alone = encode(question.context, tokenizer).begun_with(begin).tokens
    texts = [joined(question.context, choice) for choice in question.choices]
    rows = [encode(text, tokenizer).begun_with(begin).tokens for text in texts]
    first = min(n_common(alone, row) for row in rows)
    if first == 0:
        raise LlmqError(
            f"{where}: no token of the question comes before all of its choices, and the tokenizer "
            "adds no BOS; write a longer question"
        )
    if any(len(row) <= first for row in rows):
        raise LlmqError(f"{where}: a choice has no token of its own; write another")
    return tuple(
        Row(row, first, len(choice.encode("utf-8", "surrogatepass")))
        for row, choice in zip(rows, question.choices, strict=True)
    )


def joined(context: str, choice: str) -> str:
    """Question and choice, apart by a space unless one of them has white space there."""
    is_apart = not context or context[-1].isspace() or choice[0].isspace()
    return context + choice if is_apart else f"{context} {choice}"


def n_common(one: Tensor, other: Tensor) -> int:
    """How many tokens two rows begin with alike."""
    n = min(len(one), len(other))
    return int((one[:n] == other[:n]).long().cumprod(0).sum())


def choice_scores(
    model: PreTrainedModel,
    rows: Sequence[Row],
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Log-likelihood per byte of each row's choice in nats, float64 `[n]`, of rows of about one
    length together. on_batch: told how many are done, of how many."""
    scores = torch.zeros(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    for start in range(0, len(order), ROWS_TOGETHER):
        chosen = order[start : start + ROWS_TOGETHER]
        part = [rows[i] for i in chosen]
        means = window_losses(model, _windows(part))
        n_scored = torch.tensor([len(row.tokens) - row.first for row in part])
        n_bytes = torch.tensor([row.n_bytes for row in part])
        scores[chosen] = -means * n_scored / n_bytes
        on_batch(start + len(part), len(rows))
    return scores


def _windows(rows: Sequence[Row]) -> Windows:
    """Rows as windows with targets."""
    length = max(len(row.tokens) for row in rows) - 1
    read = [read_spans(row.tokens, [Span(0, row.first, len(row.tokens))], length) for row in rows]
    tokens, targets = (torch.cat(each) for each in zip(*read, strict=True))
    return Windows(tokens, "as given", None, None, targets=targets)


def chosen_answers(
    model: PreTrainedModel,
    file: ChoiceFile,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[int]:
    """The choice of each question that a model finds likeliest."""
    rows = [row for each in file.rows for row in each]
    scores = choice_scores(model, rows, on_batch)
    counts = [len(each) for each in file.rows]
    return [int(each.argmax()) for each in scores.split(counts)]
