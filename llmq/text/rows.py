"""From rows of a data set to documents: which columns hold the text, and what becomes of chats.

A data set is laid out in one of these ways, tried in this order:

text, content                                  a string
messages, conversations, conversation          turns: {role, content} or ShareGPT's {from, value}
prompt + response or completion, question +    a question and its answer; `input` or `context` go
answer, instruction + output (alpaca), ...     behind the question, `system` before it

Beside it `images` or `image` may hold pictures (see `llmq.text.illustrated`).

Chats go through the model's own chat template where its tokenizer has one; without one they are
their contents, one paragraph each. Rows without content are left out and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmq.errors import LlmqError
from llmq.messages import brief
from llmq.text.chat import document_text, has_template
from llmq.text.illustrated import COLUMNS, MARK, IllustratedRow, illustrated_row
from llmq.text.pictures import count_pictures, pictures_of

TEXT = ("text", "content")
CHAT = ("messages", "conversations", "conversation")
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "answer"),
    ("query", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
_SYSTEM = ("system", "system_prompt")
_CONTEXT = ("input", "context")
# ShareGPT's names of the speakers.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}

LEFT_OUT = "pictures_left_out"  # of a report: rows by reason
MAX_ILLUSTRATED = 1024  # rows whose pictures are kept, which may be in memory

Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Layout:
    """kind: "text", "chat" or "pair". columns: those with text that are read; of a pair question
    and answer first, then system and context where there are such. pictures: the column of
    these."""

    kind: str
    columns: tuple[str, ...]
    pictures: str | None = None

    @property
    def read(self) -> list[str]:
        """All columns that are read."""
        return [*self.columns, *([self.pictures] if self.pictures else [])]


def layout_of(names: Iterable[object], column: str | None = None) -> Layout | None:
    """How rows with columns of these names are laid out, None where none holds text. column: the
    one that was asked for, with strings or turns; nothing else is read then."""
    found = set(names)
    if column is not None:
        return Layout("text", (column,)) if column in found else None
    pictures = next((name for name in COLUMNS if name in found), None)
    for kind, known in (("text", TEXT), ("chat", CHAT)):
        for name in known:
            if name in found:
                return Layout(kind, (name,), pictures)
    for pair in PAIRS:
        if found.issuperset(pair):
            others = [name for name in (*_SYSTEM, *_CONTEXT) if name in found]
            return Layout("pair", (*pair, *others), pictures)
    return None


@dataclass
class Documents:
    """Documents collected from rows. tokenizer: whose chat template is used, None for none. column:
    see `layout_of`. n_rows: all that were seen; n_empty: documents without a word, which stay as
    blank lines (a third of WikiText-2's rows are such); skipped: rows that are left out, by
    reason. with_pictures: keep the rows that have any, too; their text is a document all the
    same. not_illustrated: rows whose pictures are left aside, by reason."""

    tokenizer: PreTrainedTokenizerBase | None = None
    column: str | None = None
    with_pictures: bool = False
    found: list[str] = field(default_factory=list)
    n_rows: int = 0
    n_empty: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    layouts: dict[Layout, None] = field(default_factory=dict)  # a set that keeps its order
    has_chats: bool = False
    refusal: str = ""  # the first that the chat template gave
    illustrated: list[IllustratedRow] = field(default_factory=list)
    n_pictures: int = 0
    not_illustrated: Counter[str] = field(default_factory=Counter)

    @property
    def template(self) -> bool | None:
        """Whether chats went through a chat template; None where there were none."""
        return has_template(self.tokenizer) if self.has_chats else None

    def add(self, rows: Iterable[Any], where: str, folder: Path | None = None) -> None:
        """The documents of rows of one data set. folder: that paths of pictures are relative to.
        Raises `LlmqError` that names the row where a column is missing, or holds something else
        than its name says."""
        layout = None
        for number, row in enumerate(rows):
            if layout is None and isinstance(row, dict):
                layout = layout_of(row, self.column)
            if layout is None or not isinstance(row, dict) or layout.columns[0] not in row:
                raise LlmqError(self._without_text(row, number, where, layout))
            self.layouts[layout] = None
            self.n_rows += 1
            self._add_row(layout, row, f"{where}: row {number}", folder)

    def add_text(self, text: str) -> None:
        """A document that is a whole file."""
        self.n_rows += 1
        self.n_empty += not text.strip()
        self.found.append(text)

    def _without_text(self, row: Any, number: int, where: str, layout: Layout | None) -> str:
        wanted = self.column or (layout and layout.columns[0])
        expected = f"a column '{wanted}'"
        if wanted is None:
            chats = ", ".join(CHAT[:2])
            expected = f"a column 'text' with strings (or content, {chats}, prompt + response)"
        columns = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        hint = "" if self.column else f"; name the column with text: {where}#COLUMN"
        return f"{where}: expected {expected}, found columns {columns} in row {number}{hint}"

    def _add_row(
        self, layout: Layout, row: dict[str, Any], where: str, folder: Path | None
    ) -> None:
        n_needed = 2 if layout.kind == "pair" else 1
        if any(row.get(name) is None for name in layout.columns[:n_needed]):
            self.skipped["null"] += 1
            return
        value = row[layout.columns[0]]
        shown = self._pictures(row)
        n_pictures = count_pictures(shown)
        is_chat = layout.kind != "text" or isinstance(value, list)
        if not is_chat:
            if not isinstance(value, str):
                raise _not_of_type(where, layout.columns[0], "a string", value)
            turns = [{"role": "user", "content": value}]
            text: str | None = value
            self.n_empty += not value.strip()
        elif layout.kind == "text" and self.column is None:
            raise _not_of_type(where, layout.columns[0], "a string", value)
        else:
            self.has_chats = True
            turns = _pair(layout, row, where) if layout.kind == "pair" else _turns(value, where)
            if not any(turn["content"].strip() for turn in turns):
                self.skipped["empty"] += 1
                return
            text = self._chat(turns)
        if text is not None:
            self._keep(text.replace(MARK, "") if n_pictures else text, where)
        if n_pictures:
            self.n_pictures += n_pictures
            if layout.kind == "chat":
                turns = _turns(value, where, with_parts=True)
            self._illustrate(turns, is_chat, shown, where, folder)

    def _pictures(self, row: dict[str, Any]) -> Any:
        """What a row has of pictures, whether or not the first row had any."""
        if self.column is not None:
            return None
        return next((row[name] for name in COLUMNS if row.get(name) is not None), None)

    def _illustrate(
        self, turns: Turns, is_chat: bool, value: Any, where: str, folder: Path | None
    ) -> None:
        """Keep a row with its pictures."""
        if not self.with_pictures:
            return
        if len(self.illustrated) == MAX_ILLUSTRATED:
            self.not_illustrated[f"behind the first {MAX_ILLUSTRATED}"] += 1
            return
        pictures = list(pictures_of(value, folder, where))
        found = illustrated_row(turns, pictures, where, is_chat=is_chat)
        if found is None:
            self.not_illustrated["places for another number of pictures"] += 1
        else:
            self.illustrated.append(found)

    def _keep(self, text: str, where: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise LlmqError(
                f"{where} holds half of a surrogate pair at character {error.start}, which is no "
                "text; repair or leave out this row"
            ) from None
        self.found.append(text)

    def _chat(self, turns: Turns) -> str | None:
        """Turns as the model reads them; None where its template refuses them."""
        if self.tokenizer is None or not has_template(self.tokenizer):
            return "\n\n".join(turn["content"] for turn in turns if turn["content"].strip())
        try:
            return document_text(self.tokenizer, turns)
        except Exception as error:  # whatever a template and its filters do
            refused = error
        if turns[0]["role"] == "system" and len(turns) > 1:
            try:  # some families have no system role; their own advice is to begin the question so
                return document_text(self.tokenizer, _without_system(turns))
            except Exception as error:
                refused = error
        self.skipped["refused by the chat template"] += 1
        self.refusal = self.refusal or brief(refused)
        return None

    def summary(self) -> str:
        """How many rows there were, and why some are left out, for messages."""
        reasons = [f"{n} {reason}" for reason, n in self.skipped.items()]
        if self.n_empty:
            reasons.append(f"{self.n_empty} empty")
        text = f"{self.n_rows} rows"
        if reasons:
            text += f": {', '.join(reasons)}"
        return f"{text} ({self.refusal})" if self.refusal else text

    def to_json(self) -> dict[str, Any]:
        """What was read, for a report."""
        return {
            "rows": self.n_rows,
            "skipped_rows": dict(self.skipped),
            "empty_rows": self.n_empty,
            "columns": [list(layout.columns) for layout in self.layouts],
            "chat_template": self.template,
            **({} if not self.n_pictures else {"pictures_in_rows": self.n_pictures}),
            **({} if not self.not_illustrated else {LEFT_OUT: dict(self.not_illustrated)}),
        }


def _without_system(turns: Turns) -> Turns:
    """The system's text at the head of the first question."""
    system, first, *rest = turns
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def _turns(value: Any, where: str, *, with_parts: bool = False) -> Turns:
    """Turns in the form of chat templates, whoever wrote them down. with_parts: their contents as
    they are, else as text."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise LlmqError(
            f"{where}: expected a list of turns, got {type(value).__name__}; each turn is "
            '{"role": ..., "content": ...} or {"from": ..., "value": ...}'
        )
    return [_turn(turn, where, with_parts) for turn in value]


def _turn(turn: Any, where: str, with_parts: bool) -> dict[str, Any]:
    """One turn with a role and its content; calls of tools stay beside it."""
    for role, content in (("role", "content"), ("from", "value")):
        if isinstance(turn, dict) and role in turn and content in turn:
            name = turn[role]
            if not isinstance(name, str):
                raise _not_of_type(where, role, "a string", name)
            more = {key: turn[key] for key in ("name", "tool_calls") if turn.get(key)}
            given = turn[content] if with_parts else _content(turn[content], where)
            return {"role": _ROLES.get(name.lower(), name.lower()), "content": given, **more}
    found = ", ".join(map(str, turn)) if isinstance(turn, dict) else type(turn).__name__
    raise LlmqError(
        f"{where}: expected turns with role and content, or from and value, got {found}"
    )


def _content(value: Any, where: str) -> str:
    """The text of a turn; of one in parts, its parts of text."""
    if value is None:  # a call of a tool
        return ""
    if isinstance(value, list):
        parts = [part.get("text") for part in value if isinstance(part, dict)]
        return "\n".join(part for part in parts if isinstance(part, str))
    if not isinstance(value, str):
        raise _not_of_type(where, "content", "a string", value)
    return value


def _pair(layout: Layout, row: dict[str, Any], where: str) -> Turns:
    """Question and answer as turns. Both may be turns themselves."""
    question, answer = (row[name] for name in layout.columns[:2])
    if isinstance(question, list) and isinstance(answer, list):
        return _turns([*question, *answer], where)
    given = {name: row.get(name) or "" for name in layout.columns}
    for name, value in given.items():
        if not isinstance(value, str):
            raise _not_of_type(where, name, "a string", value)
    asked = [given[name] for name in (layout.columns[0], *_CONTEXT) if given.get(name)]
    turns = [
        {"role": "user", "content": "\n\n".join(asked)},
        {"role": "assistant", "content": given[layout.columns[1]]},
    ]
    system = next((given[name] for name in _SYSTEM if given.get(name)), "")
    return [{"role": "system", "content": system}, *turns] if system else turns


def _not_of_type(where: str, name: str, expected: str, value: Any) -> LlmqError:
    return LlmqError(f"{where}: expected {expected} in '{name}', got {type(value).__name__}")
