"""What llmq does not read is refused by its name, with the way around."""

import json

import pytest
from conftest import make_model

import llmq
from llmq.errors import LlmqError
from llmq.formats.foreign import METHODS
from llmq.formats.registry import all_formats
from llmq.formats.setting_types import as_settings
from llmq.formats.settings import quantization_settings
from llmq.models import low_precision
from llmq.models.compat import quantization_methods


class Config:
    def __init__(self, settings):
        self.quantization_config = settings


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_refused_by_name_with_a_way_around(method):
    what, way = METHODS[method]
    with pytest.raises(LlmqError) as caught:
        quantization_settings(Config({"quant_method": method, "bits": 4}))
    message = str(caught.value)
    assert method in message
    assert what in message
    assert way in message
    assert "\n" not in message
    assert len(message) < 400


def test_no_method_is_both_read_and_refused():
    settings = [as_settings({"quant_method": method}) for method in METHODS]
    assert not [each for each in settings if any(fmt.detects(each) for fmt in all_formats())]


def test_every_method_of_transformers_is_read_or_refused_by_name():
    read = {fmt.quant_method for fmt in all_formats()} | {"auto-round", *low_precision.METHODS}
    assert not set(quantization_methods()) - read - set(METHODS), "say what these are"


def test_what_nobody_knows_is_refused_with_what_is_read():
    with pytest.raises(LlmqError, match=r"'new-one': llmq loads .*gptq.*original model"):
        quantization_settings(Config({"quant_method": "new-one"}))
    with pytest.raises(LlmqError, match="MLX"):
        quantization_settings(Config({"bits": 4, "group_size": 64, "mode": "affine"}))


def test_a_folder_is_refused_before_anything_is_loaded(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(config))
    with pytest.raises(LlmqError, match=r"NF4.*dequantize"):
        llmq.load(tmp_path)
