"""Tiny model folders of every format, as small as loading and running them allows."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import llmq
from llmq.grid.spec import ActSpec
from llmq.recipe import Recipe

TEXT = "def add(a, b):\n    return a + b\n\nThe quick brown fox; 12 + 30 = 42.\n" * 40
_COMMON = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 320},
    "gemma3_text": {
        "num_hidden_layers": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 32,
    },
}
# Name -> family, what it is quantized to (None: not), and the format it is saved in.
FOLDERS: dict[str, tuple[str, str | None, str]] = {
    "plain": ("llama", None, ""),
    "sharded": ("llama", None, ""),
    "gpt2": ("gpt2", None, ""),
    "gemma": ("gemma3_text", None, ""),
    "compressed": ("llama", "w4g32-asym", "compressed-tensors"),
    "integers": ("llama", "w8", "compressed-tensors"),
    "gptq": ("llama", "w4g32", "gptq"),
    "gptq_v2": ("llama", "w4g32-asym", "gptq_v2"),
    "bitnet": ("llama", "ternary-tensor", "bitnet"),
    "native": ("llama", "w3g32-asym", "llmq"),
    "act_order": ("llama", "w8g16", "llmq"),
    "static": ("llama", "w8", "llmq"),
}
QUANTIZED = [name for name, (_, spec, _) in FOLDERS.items() if spec]
UNQUANTIZED = [name for name in FOLDERS if name not in QUANTIZED]


def _byte_level() -> Tokenizer:
    """Bytes and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("r", "e")]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _unigram() -> Tokenizer:
    """Characters with scores, as SentencePiece has them."""
    characters = [chr(code) for code in range(33, 127)]
    pieces = ["<s>", "</s>", "<unk>", "\u2581", "\u2581the", *characters]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    tokenizer.normalizer = normalizers.Replace("\n", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _split() -> Tokenizer:
    """As newer models have it: a regular expression, then bytes."""
    tokenizer = _byte_level()
    pattern = Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    split = pre_tokenizers.Split(pattern, "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    template = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=template)
    return tokenizer


def make_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder."""
    made = {"gemma": _unigram, "sharded": _split, "gptq": _split}.get(name, _byte_level)()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def make_folders(root: Path) -> None:
    """Every folder of `FOLDERS` below `root`, and texts and a recipe to give to commands."""
    for name, (family, spec, fmt) in FOLDERS.items():
        tokenizer = make_tokenizer(name)
        torch.manual_seed(len(name))
        config = AutoConfig.for_model(family, **{**_COMMON, **_FAMILIES[family]})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(std=0.08)
        if spec is None:
            model.save_pretrained(
                root / name, max_shard_size="20KB" if name == "sharded" else "1GB"
            )
            tokenizer.save_pretrained(root / name)
            continue
        kinds = {"bitnet": "int8-token", "static": "int8-static", "integers": "int8-static"}
        is_act_order = name == "act_order"
        recipe = Recipe.uniform(
            spec,
            method="gptq" if is_act_order else "rtn",
            order="act" if is_act_order else "group",
            activations=ActSpec(kinds.get(name, "none")),  # type: ignore[arg-type]
        )
        llmq.quantize(model, recipe, torch.randint(2, 300, (4, 32)))
        llmq.save(model, root / name, tokenizer=tokenizer, format=fmt)
        (root / name / "report.json").write_text(json.dumps(REPORT))
    (root / "text.txt").write_text(TEXT)
    rows = [json.dumps({"text": line, "n": i}) for i, line in enumerate(TEXT.splitlines())]
    (root / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (root / "rows.json").write_text(f"[{','.join(rows)}]")
    _write_parquet(root / "rows.parquet")
    recipe = Recipe.uniform("w4g32", method="rtn", samples=2, sequence_length=16)
    (root / "recipe.json").write_text(json.dumps(recipe.to_json()))


def _write_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"text": TEXT.splitlines(), "n": [1] * len(TEXT.splitlines())}), path
    )


REPORT = {
    "method": "rtn",
    "seconds": 1.0,
    "versions": {"llmq": "0"},
    "calibration": {"windows": [2, 16], "source": "bundled", "sha256": "0" * 64},
    "fallbacks": [],
    "notes": {},
    "layers": [{"name": "model.layers.0.mlp.up_proj", "spec": "w4g32"}],
}
