"""What a `quantization_config` and a generation config may say, by type."""

import json

import pytest
from conftest import make_model

import llmq
from llmq.errors import LlmqError
from llmq.formats.setting_types import as_settings
from llmq.formats.settings import quantization_settings
from llmq.ptq.job import prepare
from llmq.recipe import Recipe

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "dynamic": {}}


@pytest.mark.parametrize(
    "change",
    [
        {"bits": "4"},
        {"bits": 4.0},
        {"group_size": 32.0},
        {"group_size": None},
        {"sym": "true"},
        {"quant_method": ["gptq"]},
        {"checkpoint_format": ["gptq"]},
        {"dynamic": ["+:.*"]},
        {"dynamic": {"+:.*": 4}},
        {"dynamic": {"+:.*": {"bits": "8"}}},
        {"exceptions": []},
        {"spec": "w4"},
        {"activations": "int8-token"},
        {"modules_to_not_convert": "lm_head"},
        {"modules_to_not_convert": [1]},
    ],
    ids=str,
)
def test_settings_of_other_types_are_refused(change):
    assert as_settings(GPTQ) == GPTQ
    with pytest.raises(LlmqError, match=rf"quantization_config: {next(iter(change))}"):
        as_settings({**GPTQ, **change})


@pytest.mark.parametrize("stored", [[], "gptq", 4, True])
def test_settings_that_are_no_object_are_refused(stored):
    config = make_model().config
    config.quantization_config = stored
    with pytest.raises(LlmqError, match="quantization_config: expected an object"):
        quantization_settings(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a generation config"),
        ('{"num_beams": 1000000}', "num_beams is 1000000; expected a whole number from 1 to 4096"),
        ('{"num_return_sequences": "2"}', "generation_config"),
        ("{", "generation_config"),
    ],
)
def test_generation_configs_are_checked_before_the_model_is_loaded(content, message, model_folder):
    folder = model_folder()
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(LlmqError, match=message):
        llmq.load(folder)
    with pytest.raises(LlmqError, match=message):  # or the result could not be loaded
        prepare(str(folder), Recipe.uniform("w4g32", method="rtn"))


def test_a_damaged_report_is_left_out_with_a_warning(tmp_path, tokenizer, capsys):
    from llmq.commands import cli

    model = make_model()
    llmq.quantize(model, Recipe.uniform("w4g32", method="rtn"))
    llmq.save(model, tmp_path / "out", tokenizer=tokenizer)
    for content in ("[" * 1000, "{}", json.dumps({"layers": 3})):
        (tmp_path / "out" / "report.json").write_text(content)
        assert cli.main(["inspect", str(tmp_path / "out"), "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["report"] is None
        assert "not a report of llmq" in result["warnings"][0]
