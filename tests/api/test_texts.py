"""Texts and token ids become windows, each form as the others."""

import numpy
import pytest
import torch
from conftest import make_model

import llmq
from llmq.errors import LlmqError
from llmq.models.source import Source
from llmq.text.documents import TokenSet

TEXTS = [f"line {i}: value = {i * i % 97}" for i in range(60)]
IDS = torch.randint(2, 2048, (6, 20), generator=torch.Generator().manual_seed(0))


def test_texts_as_calibration_windows(model_folder, tokenizer):
    folder = model_folder()
    model = llmq.load(folder)
    found = llmq.calibration_windows(model, TEXTS, samples=5, sequence_length=16, seed=2)
    assert found.tokens.shape == (5, 16)
    assert found.tokenizer_sha256
    for named in (folder, Source.open(folder)):
        again = llmq.calibration_windows(named, TEXTS, samples=5, sequence_length=16, seed=2)
        assert again.sha256 == found.sha256
    ids = tokenizer("\n\n".join(TEXTS), add_special_tokens=False)["input_ids"]
    for row in (ids, torch.tensor(ids), numpy.array(ids)):  # one row, cut in the same places
        again = llmq.calibration_windows(model, row, samples=5, sequence_length=16, seed=2)
        assert again.sha256 == found.sha256
    usual = llmq.calibration_windows(model, ids * 2, samples=1)
    assert usual.tokens.shape == (1, 128)  # what the model has positions for


def test_windows_of_ids_are_taken_as_they_are():
    model = make_model()
    for rows in (IDS, IDS.tolist(), IDS.to(torch.int32), IDS.numpy()):
        assert torch.equal(llmq.calibration_windows(model, rows).tokens, IDS)
        windows = llmq.evaluation_windows(model, rows)
        assert torch.equal(windows.tokens, IDS)
        assert llmq.evaluation_windows(model, windows) is windows
    assert windows.identity()["text_sha256"] is None
    row = llmq.evaluation_windows(model, IDS.flatten(), sequence_length=50)
    assert torch.equal(row.tokens, IDS.flatten()[:100].view(2, 50))


def test_a_family_that_needs_bos_gets_it(tokenizer):
    model = make_model("gemma2", bos_token_id=1)
    windows = llmq.calibration_windows(
        model, IDS.flatten(), tokenizer=tokenizer, samples=3, sequence_length=8
    )
    assert len(windows.tokens[:, 0].unique()) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data: expected a text, a list of texts, or token ids"),
        (["a", 1], "got a list with str"),
        ([[1, 2], [3]], "rows of 1 to 2 token ids; expected rows of one length"),
        ([True], "got a list with bool"),
        (torch.zeros(2, 3), r"got torch.float32 of shape \[2, 3\]"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"of shape \[1, 2, 3\]"),
        (torch.full((2, 4), 5000), "token id 5000 is beyond"),
        (torch.zeros(2, 200, dtype=torch.int64), "positions for 128 tokens only"),
    ],
    ids=str,
)
def test_what_is_neither_text_nor_ids(data, message):
    with pytest.raises(LlmqError, match=message):
        llmq.evaluation_windows(make_model(), data)


def test_tokenizers_of_models(model_folder, tokenizer):
    folder = model_folder()
    for model in (folder, str(folder), llmq.load(folder), Source.open(folder)):
        assert llmq.load_tokenizer(model).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(LlmqError, match=r"was not loaded from a folder.*give tokenizer="):
        llmq.evaluation_windows(make_model(), "text")
    other = make_model(vocab_size=64)
    with pytest.raises(LlmqError, match="does not belong to this model"):
        llmq.evaluation_windows(other, "text", tokenizer=tokenizer)


def test_windows_with_pictures_are_no_text_for_a_model_in_memory():
    """Only their tokens would be used."""
    windows = TokenSet(torch.ones(2, 8, dtype=torch.int64), "rows", pictures=object())
    with pytest.raises(LlmqError, match="windows with pictures are for folders"):
        llmq.quantize(make_model(), "w4g32", windows)
