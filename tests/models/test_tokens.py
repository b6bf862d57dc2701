"""A tokenizer is that of its model, or is refused; a family that needs BOS gets one wherever text
is read."""

import json
import shutil

import pytest
import torch
from conftest import make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from llmq.errors import LlmqError, LlmqWarning
from llmq.models.arch import needs_bos
from llmq.models.source import Source
from llmq.models.tokens import (
    FINGERPRINT,
    check_same_tokenizer,
    check_size,
    first_token,
    own_tokenizer,
)
from llmq.ptq.calibration import windows
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe
from llmq.text.generate import generate_windows
from llmq.text.windows import cut_windows

TEXT = "def f(value):\n    return value + 1\n" * 200


def words(n, **special):
    """A tokenizer of n words."""
    vocabulary = {f"w{i}": i for i in range(n)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", **special)


@pytest.mark.parametrize("n_tokens", [50, 1500, 4000])
def test_a_tokenizer_of_another_size_is_refused(n_tokens, model_folder):
    folder = model_folder()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    words(n_tokens).save_pretrained(folder)
    with pytest.raises(LlmqError, match=rf"has {n_tokens} tokens and .* 2048; it does not"):
        own_tokenizer(Source(folder))
    recipe = Recipe.uniform("w4g32", samples=2, sequence_length=8)
    with pytest.raises(LlmqError, match="does not belong to this model"):
        prepare(str(folder), recipe)


@pytest.mark.parametrize(
    ("n_tokens", "n_rows"),
    [(259, 384), (50295, 51200), (100015, 102400), (151665, 151936), (32001, 32000)],
)
def test_padded_vocabularies_of_published_models_pass(n_tokens, n_rows):
    check_size(words(n_tokens), AutoConfig.for_model("llama", vocab_size=n_rows), "folder")


def test_special_tokens_that_all_differ_are_told(model_folder):
    folder = model_folder(bos_token_id=5, eos_token_id=6)
    with pytest.warns(LlmqWarning, match="bos_token_id 0 and config.json 5"):
        own_tokenizer(Source(folder))


def test_the_vocabulary_is_known_by_the_report(model_folder, calibration_file, tmp_path):
    folder = model_folder()
    recipe = Recipe.uniform("w4g32", samples=2, sequence_length=16)
    report = quantize_folder(
        prepare(str(folder), recipe, calibration=str(calibration_file)), tmp_path / "out"
    )
    tokenizer = own_tokenizer(Source(tmp_path / "out"))
    check_same_tokenizer(tokenizer, own_tokenizer(Source(folder)), ("a", "b"))
    assert len(report[FINGERPRINT]) == 64
    other = tmp_path / "out" / "tokenizer.json"
    data = json.loads(other.read_text())
    vocabulary = data["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    other.write_text(json.dumps(data))
    with pytest.raises(LlmqError, match="not the one that this model was quantized with"):
        own_tokenizer(Source(tmp_path / "out"))
    shutil.copy(other, folder / "tokenizer.json")
    with pytest.raises(LlmqError, match="has other tokens than that of base"):
        check_same_tokenizer(tokenizer, own_tokenizer(Source(folder)), ("base", "quant"))


@pytest.mark.parametrize(
    "model_type",
    ["gemma", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "recurrent_gemma", "vaultgemma"],
)
def test_gemma_and_its_relatives_need_bos(model_type):
    assert needs_bos(AutoConfig.for_model(model_type))


@pytest.mark.parametrize("where", ["tokenizer", "config"])
def test_every_window_begins_with_the_bos_of_tokenizer_or_config(where, tokenizer):
    config = make_model("gemma", bos_token_id=7).config
    if where == "config":
        tokenizer = words(2048)
        assert tokenizer.bos_token_id is None
    expected = {"tokenizer": 0, "config": 7}[where]
    assert first_token(tokenizer, config) == expected
    evaluated = cut_windows([TEXT], tokenizer, config, 16)
    assert evaluated.bos == "every-window"
    assert set(evaluated.tokens[:, 0].tolist()) == {expected}


def test_without_any_bos_a_family_that_needs_one_is_refused_everywhere(calibration_file):
    config = make_model("gemma", bos_token_id=2).config
    config.bos_token_id = None
    recipe = Recipe.uniform("w4g32", samples=2, sequence_length=8)
    for read in (
        lambda: first_token(words(2048), config),
        lambda: cut_windows([TEXT], words(2048), config, 16),
        lambda: windows(words(2048), config, recipe, str(calibration_file)),
    ):
        with pytest.raises(LlmqError, match="gemma needs a BOS token"):
            read()


def test_generated_text_begins_with_bos_where_it_is_needed(tmp_path):
    model = make_model("gemma", vocab_size=64)
    tokens = generate_windows(model, 3, 8, tmp_path, bos=5)
    assert tokens.shape == (3, 8)
    assert set(tokens[:, 0].tolist()) == {5}
    plain = generate_windows(model, 3, 8, tmp_path / "plain")
    assert torch.equal(tokens[:, 1], plain[:, 0])
