"""How byte-level tokenizers cut a text into words before they merge: llama.cpp knows the ways by
name, `tokenizer.json` spells them out. A row for each that is written and read.

llama.cpp applies no Unicode normalization, so that a text that is not in the form NFC has other
tokens there than with a tokenizer that composes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmq.errors import LlmqError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST


@dataclass(frozen=True)
class Splitting:
    """name: in the field `tokenizer.ggml.pre`, the first of those that mean the same. pattern: a
    regular expression of words, None for GPT-2's. single_digits: every digit is a word.
    whole_words: a word that is a token is not merged from its letters. composes: whether published
    tokenizers of the kind apply NFC."""

    name: str
    pattern: str | None = None
    single_digits: bool = False
    whole_words: bool = False
    composes: bool = False
    others: tuple[str, ...] = ()

    def steps(self) -> list[dict[str, Any]]:
        """What is done to a text, as in tokenizer.json."""
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": self.pattern is None,
        }
        if self.pattern is not None:
            pattern = {"Regex": self.pattern}
            split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            return [split, byte_level]
        if self.single_digits:
            return [{"type": "Digits", "individual_digits": True}, byte_level]
        return [byte_level]


SPLITTINGS = (
    Splitting("gpt-2", others=("default", "olmo", "mpt")),
    Splitting("smollm", single_digits=True, others=("starcoder", "refact", "command-r")),
    Splitting("llama-bpe", _LLAMA3, whole_words=True, others=("llama3", "llama-v3")),
    Splitting("smaug-bpe", _LLAMA3),
    Splitting("qwen2", _QWEN2, composes=True, others=("deepseek-r1-qwen", "megrez")),
)


def splitting_named(name: object) -> Splitting:
    """A way by llama.cpp's name. Raises `LlmqError` for one that is not read."""
    for row in SPLITTINGS:
        if name == row.name or name in row.others:
            return row
    known = ", ".join(row.name for row in SPLITTINGS)
    raise LlmqError(
        f"GGUF: tokenizers of the kind {str(name)[:80]!r} (tokenizer.ggml.pre) are not read; known "
        f"are {known}. Take the model in safetensors"
    )


def splitting_of(tokenizer: dict[str, Any]) -> Splitting:
    """The way of a byte-level tokenizer, the object in tokenizer.json. Raises `LlmqError` for one
    that llama.cpp has no name for, as far as llmq knows."""
    stated = tokenizer.get("pre_tokenizer") or {}
    steps = stated["pretokenizers"] if stated.get("type") == "Sequence" else [stated]
    whole_words = bool(tokenizer["model"].get("ignore_merges"))
    for row in SPLITTINGS:
        is_same = [_essence(step) for step in steps] == [_essence(step) for step in row.steps()]
        if is_same and row.whole_words == whole_words:
            _check_normalizer(tokenizer.get("normalizer"))
            return row
    kinds = ", ".join(str(step.get("type")) for step in steps)
    raise LlmqError(
        f"GGUF: the tokenizer cuts texts into words in a way that llmq knows no name of llama.cpp "
        f"for ({kinds}); convert the original with llama.cpp, or export to another format"
    )


def _essence(step: dict[str, Any]) -> tuple[object, ...]:
    """What decides where a step cuts."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return kind, step.get("use_regex", True), step.get("add_prefix_space", True)
    if kind == "Digits":
        return kind, step.get("individual_digits", False)
    if kind == "Split":
        # To keep the matches and to remove what is between them are the same here: they cover all.
        keeps = (step.get("behavior"), step.get("invert", False))
        is_usual = keeps in (("Isolated", False), ("Removed", True))
        return kind, step.get("pattern", {}).get("Regex"), is_usual
    return kind, str(step)


def _check_normalizer(normalizer: dict[str, Any] | None) -> None:
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise LlmqError(
            f"GGUF: the tokenizer normalizes texts ({normalizer.get('type')}), which llama.cpp "
            "does not; export to another format"
        )
