"""Tiny model folders of every format, as small as loading and running them allows."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import llmq
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.recipe import Recipe
from llmq.storage.files import MANIFEST

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


@dataclass(frozen=True)
class Base:
    """family: of `_FAMILIES`. spec: what it is quantized to, None: not. format: that it is saved
    in. recipe: what else its recipe says. config: what else its config says."""

    family: str = "llama"
    spec: str | None = None
    format: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


_BY_TOKEN = {"activations": ActSpec("int8-token")}
_STATIC = {"activations": ActSpec("int8-static")}
_W8, _W4 = QuantSpec("int8", -1), QuantSpec("int4", 32)
FOLDERS = {
    "plain": Base(),
    "sharded": Base(),
    "gpt2": Base("gpt2"),
    "gemma": Base("gemma3_text"),
    "compressed": Base(spec="w4g32-asym", format="compressed-tensors"),
    "integers": Base(spec="w8", format="compressed-tensors", recipe=_STATIC),
    "by_token": Base(spec="w4g32", format="compressed-tensors", recipe=_BY_TOKEN),
    "head": Base(spec="w2g32", format="compressed-tensors", recipe={"head": _W8}),
    "gptq": Base(spec="w4g32", format="gptq"),
    "gptq_v2": Base(spec="w4g32-asym", format="gptq_v2"),
    "old_gptq": Base(spec="w4g32", format="gptq"),
    "auto_round": Base(spec="w4g32", format="gptq"),
    "awq": Base(spec="w4g32-asym", format="awq"),
    "bitnet": Base(spec="ternary-tensor", format="bitnet", recipe=_BY_TOKEN),
    "online": Base(),
    "native": Base(spec="w3g32-asym", format="llmq"),
    "tables": Base(spec="w4g32", format="llmq", recipe={"embeddings": _W4, "head": _W8}),
    "tied": Base(
        "gemma3_text", "w4g32", "llmq", {"embeddings": _W8}, {"tie_word_embeddings": True}
    ),
    "act_order": Base(spec="w8g16", format="llmq", recipe={"method": "gptq", "order": "act"}),
    "static": Base(spec="w8", format="llmq", recipe=_STATIC),
    "gguf": Base(spec="w4g32", format="llmq"),
}
QUANTIZED = [name for name, base in FOLDERS.items() if base.spec or name == "online"]
UNQUANTIZED = [name for name in FOLDERS if name not in QUANTIZED]
GGUF = "model.gguf"  # in the one folder that is given to commands as a file


def argument(name: str, folder: Path) -> str:
    """What a command is given of a folder."""
    return str(folder / GGUF if name == "gguf" else folder)


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
    for name, base in FOLDERS.items():
        tokenizer, model = make_tokenizer(name), _make_model(name, base)
        if base.spec is None:
            size = "20KB" if name == "sharded" else "1GB"
            model.save_pretrained(root / name, max_shard_size=size)
            tokenizer.save_pretrained(root / name)
        else:
            recipe = Recipe.uniform(base.spec, **{"method": "rtn", **base.recipe})
            llmq.quantize(model, recipe, torch.randint(2, 300, (4, 32)))
            llmq.save(model, root / name, tokenizer=tokenizer, format=base.format)
            (root / name / "report.json").write_text(json.dumps(REPORT))
        if name in _OTHERS:
            _OTHERS[name](root / name)
    (root / "text.txt").write_text(TEXT)
    rows = [json.dumps({"text": line, "n": i}) for i, line in enumerate(TEXT.splitlines())]
    (root / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (root / "rows.json").write_text(f"[{','.join(rows)}]")
    _write_parquet(root / "rows.parquet")
    recipe = Recipe.uniform("w4g32", method="rtn", samples=2, sequence_length=16)
    (root / "recipe.json").write_text(json.dumps(recipe.to_json()))


def _make_model(name: str, base: Base) -> PreTrainedModel:
    torch.manual_seed(len(name))
    settings = {**_COMMON, **_FAMILIES[base.family], **base.config}
    config = AutoConfig.for_model(base.family, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.08)
    return model


def _with_settings(folder: Path, settings: dict[str, Any] | None) -> None:
    """Other settings in config.json; the manifest was written for what it was before."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    (folder / MANIFEST).unlink(missing_ok=True)


def _as_auto_gptq(folder: Path) -> None:
    """Settings in a file of their own, and weights under another name."""
    _with_settings(folder, None)
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")


def _as_auto_round(folder: Path) -> None:
    (folder / "quantize_config.json").unlink()
    settings: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 32}
    settings |= {"sym": True, "packing_format": "auto_round:auto_gptq", "data_type": "int"}
    settings |= {"extra_config": {".*down_proj": {"bits": 4, "group_size": 32, "sym": True}}}
    _with_settings(folder, settings)


def _as_online(folder: Path) -> None:
    settings = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    settings |= {"quantization_mode": "online", "modules_to_not_convert": ["lm_head"]}
    _with_settings(folder, settings)


def _as_file(folder: Path) -> None:
    path = folder.with_name(GGUF)
    llmq.export(folder, path, "gguf")
    shutil.rmtree(folder)
    folder.mkdir()
    path.rename(folder / GGUF)


# Folders that other tools write, made of ours.
_OTHERS = {
    "old_gptq": _as_auto_gptq,
    "auto_round": _as_auto_round,
    "online": _as_online,
    "gguf": _as_file,
}


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
