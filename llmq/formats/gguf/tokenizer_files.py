"""From the vocabulary in a GGUF file to `tokenizer.json` and `tokenizer_config.json`: the inverse
of `vocabulary.py`."""

from __future__ import annotations

import re
from typing import Any

from llmq.formats.gguf.fields import Fields
from llmq.formats.gguf.splitting import splitting_named
from llmq.formats.gguf.vocabulary import (
    BYTE,
    CONTROL,
    NEVER,
    SPACE,
    SPECIAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    pairs_of,
)

_PAD = re.compile(r"\[PAD\d+\]")


def tokenizer_files(fields: Fields) -> dict[str, dict[str, Any]]:
    """The objects in the files by name. Raises `LlmqError` for a kind that is not read."""
    ggml = fields.of("tokenizer.ggml")
    kind = ggml.text("model")
    tokens, types = ggml.list_of("tokens", str), ggml.list_of("token_type", int)
    if len(tokens) < 2 or len(types) not in (0, len(tokens)):
        raise ggml.wrong("token_type", len(types), f"a type for each of {len(tokens)} tokens")
    types = types or [1] * len(tokens)
    special = _special(ggml, tokens)
    if kind == "gpt2":
        tokenizer = _byte_level(ggml, tokens, types)
    elif kind == "llama":
        tokenizer = _sentencepiece(ggml, tokens, types)
    else:
        raise ggml.wrong("model", kind, "gpt2 or llama")
    default = kind == "llama"
    prefix = ["bos_token"] if ggml.flag("add_bos_token", default) and "bos_token" in special else []
    suffix = ["eos_token"] if ggml.flag("add_eos_token", False) and "eos_token" in special else []
    tokenizer["post_processor"] = _post_processor(
        [special[name] for name in prefix], [special[name] for name in suffix], tokens
    )
    config: dict[str, Any] = {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if template := fields.maybe_text("tokenizer.chat_template"):
        config["chat_template"] = template
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _special(ggml: Fields, tokens: list[str]) -> dict[str, str]:
    """The special tokens that the file names."""
    found = {}
    for name, key in SPECIAL.items():
        index = ggml.maybe_count(key)
        if index is not None:
            if index >= len(tokens):
                raise ggml.wrong(key, index, f"one of {len(tokens)} tokens")
            found[name.removesuffix("_id")] = tokens[index]
    return found


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Tokens that are found in a text before it is cut."""
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN) and token
    ]


def _vocabulary(ggml: Fields, tokens: list[str], types: list[int]) -> dict[str, int]:
    """Index by token, without those that stand for rows of the embeddings alone."""
    kept = [
        (token, index)
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if not (kind == UNUSED and _PAD.fullmatch(token))
    ]
    vocabulary = dict(kept)
    if len(vocabulary) != len(kept):
        raise ggml.wrong("tokens", f"{len(kept) - len(vocabulary)} tokens twice", "each once")
    return vocabulary


def _byte_level(ggml: Fields, tokens: list[str], types: list[int]) -> dict[str, Any]:
    splitting = splitting_named(ggml.text("pre", "default"))
    vocabulary = _vocabulary(ggml, tokens, types)
    merges = [merge.split(" ") for merge in ggml.list_of("merges", str)]
    _check_merges(ggml, merges, vocabulary)
    tokenizer = _tokenizer(tokens, types)
    tokenizer["normalizer"] = {"type": "NFC"} if splitting.composes else None
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": splitting.steps()}
    tokenizer["decoder"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer["model"] = _bpe(vocabulary, merges) | {"ignore_merges": splitting.whole_words}
    return tokenizer


def _sentencepiece(ggml: Fields, tokens: list[str], types: list[int]) -> dict[str, Any]:
    scores = ggml.list_of("scores", (float, int))
    if len(scores) != len(tokens):
        raise ggml.wrong("scores", len(scores), f"a score for each of {len(tokens)} tokens")
    # Spaces as merges make them; a token that only a text as it is written has stays as it is.
    spelled = [
        token.replace(" ", SPACE) if kind == USER_DEFINED else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    vocabulary = _vocabulary(ggml, spelled, types)
    stored = ggml.list_of("merges", str)
    if stored:
        merges = [merge.split(" ") for merge in stored]
        _check_merges(ggml, merges, vocabulary)
    else:
        mergeable = zip(spelled, scores, types, strict=True)
        order = {
            token: -score
            for token, score, kind in mergeable
            if score > NEVER and kind not in (BYTE, CONTROL, UNKNOWN, UNUSED)
        }
        merges = [list(pair) for pair in pairs_of(spelled, order)]
    tokenizer = _tokenizer(tokens, types)
    adds_space = ggml.flag("add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    steps = [prepend, replace] if adds_space else [replace]
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": steps}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders: list[dict[str, Any]] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if adds_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    tokenizer["decoder"] = {"type": "Sequence", "decoders": decoders}
    unknown = next(
        (token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), ""
    )
    tokenizer["model"] = _bpe(vocabulary, merges) | {
        "unk_token": unknown or None,
        "fuse_unk": True,
        "byte_fallback": True,
    }
    return tokenizer


def _check_merges(ggml: Fields, merges: list[list[str]], vocabulary: dict[str, int]) -> None:
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise ggml.wrong("merges", " ".join(merge), "two tokens that make another")


def _tokenizer(tokens: list[str], types: list[int]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
    }


def _bpe(vocabulary: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def _post_processor(prefix: list[str], suffix: list[str], tokens: list[str]) -> dict[str, Any]:
    """Puts tokens around a text."""

    def piece(token: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": kind}}

    def text(name: str, kind: int) -> list[dict[str, Any]]:
        inner = {"Sequence": {"id": name, "type_id": kind}}
        return [*(piece(t, kind) for t in prefix), inner, *(piece(t, kind) for t in suffix)]

    special = {
        token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]}
        for token in dict.fromkeys([*prefix, *suffix])
    }
    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": [*text("A", 0), *text("B", 1)],
        "special_tokens": special,
    }
