"""Small multimodal models of random weights with their processors, and pictures to show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import make_model
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from llmq.models.source import resolve

N_TOKENS = 2112  # of the tokenizer and what is added to it
MARKS = {
    "llava": {"image_token": "<image>"},
    "llava_next": {"image_token": "<image>"},  # more tiles for larger pictures
    "gemma3": {"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
    "qwen2_vl": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    },
}
MARKS |= {"qwen3_vl": MARKS["qwen2_vl"], "qwen3_5": MARKS["qwen2_vl"]}
# Parts alone, as most templates of multimodal models have them.
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}PLACE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}"
)
_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_CLIP |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_QWEN = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2}
_QWEN |= {"temporal_patch_size": 2}
_BY_SIZE = {"do_resize": True, "size": {"height": 28, "width": 28}}
_BY_PIXELS = {"size": {"shortest_edge": 784, "longest_edge": 3136}, "patch_size": 14}
_BY_PIXELS |= {"merge_size": 2, "temporal_patch_size": 2}
_TILES = [[28, 56], [56, 28], [56, 56]]
IMAGE_PROCESSORS: dict[str, dict[str, Any]] = {
    "llava": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
    },
    "llava_next": {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        "image_grid_pinpoints": _TILES,
    },
    "gemma3": {"image_processor_type": "Gemma3ImageProcessor", **_BY_SIZE},
    "qwen2_vl": {"image_processor_type": "Qwen2VLImageProcessor", **_BY_PIXELS},
    "qwen3_vl": {"image_processor_type": "Qwen2VLImageProcessor", **_BY_PIXELS},
    "qwen3_5": {"image_processor_type": "Qwen2VLImageProcessor", **_BY_PIXELS},
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "llava": {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    },
    "llava_next": {
        "processor_class": "LlavaNextProcessor",
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    },
    "gemma3": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    "qwen2_vl": {"processor_class": "Qwen2VLProcessor"},
    "qwen3_vl": {"processor_class": "Qwen3VLProcessor"},
    "qwen3_5": {"processor_class": "Qwen3VLProcessor"},
}


def save_multimodal(folder: Path, kind: str, *, template: bool = True) -> Path:
    """A folder with model, tokenizer and processor, as they are published."""
    marks = MARKS[kind]
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny"), extra_special_tokens=marks)
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    place = "<boi>" if kind == "gemma3" else marks["image_token"]
    if "vision_start_token" in marks:
        place = marks["vision_start_token"] + place + marks["vision_end_token"]
    if template:
        tokenizer.chat_template = TEMPLATE.replace("PLACE", place)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config_of(kind, ids), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.08)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, settings in (("preprocessor", IMAGE_PROCESSORS), ("processor", PROCESSORS)):
        content = {**settings[kind], "processor_class": PROCESSORS[kind]["processor_class"]}
        (folder / f"{name}_config.json").write_text(json.dumps(content))
    return folder


def config_of(kind: str, ids: dict[str, int]) -> Any:
    """The config of a small model whose marks have these tokens."""
    if kind in ("llava", "llava_next"):
        more = {} if kind == "llava" else {"image_grid_pinpoints": _TILES}
        return AutoConfig.for_model(
            kind,
            text_config=make_model(vocab_size=N_TOKENS).config,
            vision_config=AutoConfig.for_model("clip_vision_model", **_CLIP),
            image_token_index=ids["image_token"],
            vision_feature_layer=-1,
            **more,
        )
    if kind == "gemma3":
        return AutoConfig.for_model(
            "gemma3",
            text_config=make_model("gemma3_text", vocab_size=N_TOKENS).config.to_dict(),
            vision_config={"model_type": "siglip_vision_model", **_CLIP},
            mm_tokens_per_image=4,
            image_token_index=ids["image_token"],
            boi_token_index=ids["boi_token"],
            eoi_token_index=ids["eoi_token"],
        )
    like = {"layer_types": None, "use_sliding_window": False} if kind != "qwen3_5" else {}
    text = make_model("qwen3_5_text" if kind == "qwen3_5" else "qwen2", vocab_size=N_TOKENS, **like)
    settings = text.config.to_dict() | {"model_type": f"{kind}_text", **like}
    settings |= {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}}
    settings["rope_parameters"]["rope_theta"] = 10000.0
    vision = {**_QWEN, "embed_dim": 32, "hidden_size": 64}
    if kind != "qwen2_vl":
        settings = {key: value for key, value in settings.items() if value is not None}
        vision = {**_QWEN, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
        vision |= {"num_position_embeddings": 16}
    if kind == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0, 1]}
    return AutoConfig.for_model(
        kind,
        text_config=settings,
        vision_config=vision,
        **{f"{name}_id": token for name, token in ids.items()},
    )


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_rows(folder: Path, n: int = 6, seed: int = 0) -> Path:
    """Questions about pictures and one row of text, with the pictures beside the file."""
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index in range(n):
        name = f"{index}.png"
        size = (40 + index, 30 + 50 * (index % 2))
        picture(100 * seed + index, size).save(folder / name)
        rows.append({"prompt": f"What is number {index}?", "response": "Noise.", "images": [name]})
    rows.append({"prompt": "How long?", "response": "for i in range(80): go on\n" * 40})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def without_pictures(rows: Path) -> Path:
    """The same rows as text alone, in another file."""
    kept = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        row.pop("images", None)
        kept.append(json.dumps(row) + "\n")
    path = rows.with_name("text.jsonl")
    path.write_text("".join(kept))
    return path
