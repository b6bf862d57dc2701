"""A tokenizer as GGUF has it: tokens with types, merges or scores. Two kinds are written and read:

gpt2    byte-level BPE with merges, and a name for how words are cut (`splitting.py`)
llama   SentencePiece's BPE: spaces are U+2581, unknown characters bytes, and neighbours are
        merged in the order of the score of what they make"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmq.errors import LlmqError
from llmq.formats.gguf.splitting import splitting_of
from llmq.formats.gguf.writer import Value

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
NEVER = -1e6  # the score of a token that no merge makes
SPECIAL = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unk_token_id": "unknown_token_id",
    "pad_token_id": "padding_token_id",
}


@dataclass
class Vocabulary:
    """kind: "gpt2" or "llama". pre: how words are cut ("default" for llama). merges: pairs, each
    joined by a space. scores: of the tokens, for llama. adds_space: before a text."""

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    adds_space: bool = False

    def fields(self) -> dict[str, Value]:
        """The fields of a file."""
        found: dict[str, Value] = {
            "tokenizer.ggml.model": self.kind,
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.types,
        }
        if self.scores:
            found["tokenizer.ggml.scores"] = self.scores
        if self.merges:
            found["tokenizer.ggml.merges"] = self.merges
        if self.kind == "llama":
            found["tokenizer.ggml.add_space_prefix"] = self.adds_space
        return found


def tokenizer_fields(tokenizer: PreTrainedTokenizerBase, n_rows: int) -> dict[str, Value]:
    """The fields of a tokenizer. n_rows: of the embeddings, as many as there have to be tokens.
    Raises `LlmqError` for a kind that llama.cpp does not have."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise LlmqError(
            "GGUF: the tokenizer has no tokenizer.json; save it once with transformers' "
            "AutoTokenizer"
        )
    fields = vocabulary_of(json.loads(backend.to_str()), n_rows).fields()
    for name, key in SPECIAL.items():
        token = getattr(tokenizer, name)
        if token is not None and token < n_rows:
            fields[f"tokenizer.ggml.{key}"] = int(token)
    ids = tokenizer("a", verbose=False)["input_ids"]
    fields["tokenizer.ggml.add_bos_token"] = ids[:1] == [tokenizer.bos_token_id]
    fields["tokenizer.ggml.add_eos_token"] = ids[-1:] == [tokenizer.eos_token_id]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, str):
        fields["tokenizer.chat_template"] = template
    return fields


def vocabulary_of(tokenizer: dict[str, Any], n_rows: int) -> Vocabulary:
    """The vocabulary of the object in a tokenizer.json."""
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise LlmqError(
            f"GGUF: a tokenizer of the kind {model.get('type')} is not written, only BPE; convert "
            "the original with llama.cpp"
        )
    if model.get("byte_fallback"):
        return _sentencepiece(tokenizer, n_rows)
    pre = splitting_of(tokenizer).name
    tokens, types = _tokens(tokenizer, n_rows)
    merges = [_joined(merge) for merge in model["merges"]]
    return Vocabulary("gpt2", pre, tokens, types, merges)


def _tokens(tokenizer: dict[str, Any], n_rows: int) -> tuple[list[str], list[int]]:
    """Tokens and their types, as many as there are rows: those without a token are unused, tokens
    without a row cannot be said."""
    tokens = [f"[PAD{index}]" for index in range(n_rows)]
    types = [UNUSED] * n_rows
    for token, index in tokenizer["model"]["vocab"].items():
        if index < n_rows:
            tokens[index], types[index] = token, NORMAL
    for added in tokenizer.get("added_tokens") or ():
        if (index := added["id"]) < n_rows:
            tokens[index] = added["content"]
            types[index] = CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _joined(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
    return left, right


def _sentencepiece(tokenizer: dict[str, Any], n_rows: int) -> Vocabulary:
    tokens, types = _tokens(tokenizer, n_rows)
    unknown = tokenizer["model"].get("unk_token")
    for index, token in enumerate(tokens):
        if token == unknown:
            types[index] = UNKNOWN
        elif types[index] == NORMAL and _BYTE.fullmatch(token):
            types[index] = BYTE
    pairs = [_pair(merge) for merge in tokenizer["model"]["merges"]]
    order = _ranks(pairs)
    scores = [-float(order[token]) if token in order else NEVER for token in tokens]
    found = Vocabulary("llama", "default", tokens, types, scores=scores)
    found.adds_space = _adds_space(tokenizer)
    if pairs_of(tokens, order) != pairs:  # for those who ask for merges; llama.cpp does not
        found.merges = [" ".join(pair) for pair in pairs]
    # llama.cpp looks for these in a text as it is written.
    for index, kind in enumerate(types):
        if kind == USER_DEFINED:
            tokens[index] = tokens[index].replace(SPACE, " ")
    return found


def _ranks(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Of each token that a merge makes: how early."""
    first: dict[str, float] = {}
    for rank, (left, right) in enumerate(pairs):
        first.setdefault(left + right, rank)
    return first


def pairs_of(tokens: list[str], order: dict[str, float]) -> list[tuple[str, str]]:
    """The merges that a vocabulary of SentencePiece implies: every pair of tokens that makes
    another, in the order of what is made, the longest left part first (as Gemma's tokenizer.json
    has them). order: of the tokens that are made."""
    known, found = set(tokens), []
    for token in sorted(order, key=order.__getitem__):
        for cut in range(len(token) - 1, 0, -1):
            pair = token[:cut], token[cut:]
            if pair[0] in known and pair[1] in known:
                found.append(pair)
    return found


def _adds_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a space is put before a text. Raises `LlmqError` for spaces that are no U+2581."""
    normalizer = tokenizer.get("normalizer") or {}
    steps = normalizer.get("normalizers") or [normalizer]
    kinds = [step.get("type") for step in steps]
    split = tokenizer.get("pre_tokenizer") or {}
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if kinds in (["Replace"], ["Prepend", "Replace"]) and steps[-1] == replaces:
        is_split = split.get("type") not in (None, "Split") or (
            split.get("type") == "Split" and split.get("pattern") != {"String": " "}
        )
        if not is_split:
            return kinds[0] == "Prepend"
    elif kinds == [None] and split.get("type") == "Metaspace" and not split.get("split", True):
        return bool(split.get("prepend_scheme", "always") != "never")
    raise LlmqError(
        f"GGUF: the tokenizer prepares texts in a way that SentencePiece does not ({kinds}, "
        f"{split.get('type')}); convert the original with llama.cpp"
    )
