"""The documentation of Python as text: much of it, prose, and none of what is held back."""

import pytest

from llmq.text.documentation import documentation_documents
from llmq.text.documents import load_documents, tokenize


def test_there_are_300_000_tokens_and_they_are_prose(tokenizer):
    documents = documentation_documents()
    # The bundled tokenizer makes more tokens of prose than those of language models do.
    assert sum(map(len, documents)) > 1_200_000
    letters = sum(each.isalpha() or each == " " for each in "".join(documents))
    assert letters / sum(map(len, documents)) > 0.75
    assert len(tokenize([documents[0]], tokenizer)) > 100


def test_what_is_held_back_for_evaluation_is_not_calibrated_on():
    calibration = "\n\n".join(load_documents("python-docs", "calibration"))
    held_back = load_documents("python-docs", "eval")
    assert held_back
    assert not any(document in calibration for document in held_back)


@pytest.mark.slow
def test_the_same_text_every_time():
    first = documentation_documents()
    documentation_documents.cache_clear()
    assert documentation_documents() == first
