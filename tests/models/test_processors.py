"""What processors make of pictures is bounded, by sides or by pixels."""

import json

import pytest
from picture_models import picture, save_multimodal

from llmq.errors import LlmqError
from llmq.models.processors import MAX_PIXELS, load_processor
from llmq.models.source import Source

FILE = "preprocessor_config.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_multimodal(tmp_path_factory.mktemp("qwen2_vl") / "model", "qwen2_vl")


def processor_with(folder, settings):
    path = folder / FILE
    plain = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(plain) | settings))
        return load_processor(Source.open(folder), "leave them out")
    finally:
        path.write_text(plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        {"min_pixels": 3136, "max_pixels": 12845056},
    ],
)
def test_a_large_picture_is_made_smaller(folder, settings):
    """By its own settings it would be 2500 tokens."""
    made = processor_with(folder, settings).image_processor(picture(0, (1400, 1400)))
    _, height, width = made["image_grid_thw"][0]
    assert 0.9 * MAX_PIXELS < int(height) * int(width) * 14 * 14 <= MAX_PIXELS


def test_a_smaller_bound_stays(folder):
    size = processor_with(folder, {}).image_processor.size
    assert size["longest_edge"] == 3136


@pytest.mark.parametrize("name", ["shortest_edge", "min_pixels"])
def test_small_pictures_are_not_made_huge(folder, name):
    settings = {"size": {name: 10**9, "longest_edge": 10**9}} if "edge" in name else {name: 10**9}
    with pytest.raises(
        LlmqError, match=f"{FILE}: {name} 1000000000, expected at most {MAX_PIXELS}"
    ):
        processor_with(folder, settings)
