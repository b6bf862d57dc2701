"""Absurd sizes are refused from the config, in a second, and real ones are not."""

import json
import time

import pytest
from conftest import FAMILY_CONFIGS, make_model

import llmq
from llmq.errors import LlmqError
from llmq.models.sizes import check_sizes
from llmq.models.source import load_config
from llmq.ptq.job import prepare
from llmq.recipe import Recipe


def edited(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"num_hidden_layers": 10**6}),
        ("llama", {"num_hidden_layers": 9000}),
        ("llama", {"num_hidden_layers": -1}),
        ("llama", {"vocab_size": 2**40}),
        ("llama", {"vocab_size": 2**27, "hidden_size": 2**20}),
        ("llama", {"intermediate_size": 2**50}),
        ("llama", {"num_attention_heads": 10**9}),
        ("llama", {"max_position_embeddings": 10**400}),
        ("llama", {"num_labels": 10**9}),
        ("gpt2", {"n_layer": 10**6}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(next(iter(value.items())))[:40],
)
def test_absurd_sizes_are_refused_at_once(family, settings, model_folder):
    folder = edited(model_folder(family), **settings)
    started = time.process_time()
    with pytest.raises(
        LlmqError, match=rf"config\.json: .*({next(iter(settings))}|embeddings of|layers)"
    ):
        load_config(folder)
    assert time.process_time() - started < 2


def test_tables_of_positions_are_known_before_they_are_filled(tmp_path):
    settings = {"model_type": "gpt_neo", "hidden_size": 64, "num_heads": 2, "num_layers": 2}
    settings |= {"attention_types": [[["global"], 2]], "max_position_embeddings": 10**6}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(LlmqError, match="need a table of 1000000000000 elements in 2 layers"):
        load_config(tmp_path)


def test_a_model_without_blocks_is_refused(model_folder):
    with pytest.raises(LlmqError, match="expected one list of 0 blocks"):
        prepare(
            str(edited(model_folder(), num_hidden_layers=0, layer_types=None)),
            Recipe.uniform("w4g32", method="rtn"),
        )


def test_sizes_of_nested_configs_count(tmp_path):
    with pytest.raises(LlmqError, match=r"text_config\.num_hidden_layers = 1000000"):
        check_sizes({"text_config": {"num_hidden_layers": 10**6}}, tmp_path)


@pytest.mark.parametrize("value", ["64", 64.0, [64], {}, True, None, 0, -64])
def test_sizes_of_other_types_are_typed_errors(value, model_folder):
    with pytest.raises(LlmqError):
        llmq.load(edited(model_folder(), hidden_size=value))


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_long_contexts_are_no_absurdity(family, tmp_path):
    config = make_model(family).config
    config.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    check_sizes({**settings, "max_position_embeddings": 10_485_760}, tmp_path)
    assert load_config(tmp_path).model_type == family
