"""What is read of a source's head, and what a result's head has."""

import pytest
from huggingface_hub import ModelCard

from llmq.cards.head import carried, is_of_llmq, read_head, render_head
from llmq.errors import LlmqWarning

HEAD = """\
license: other
license_name: qwen-research
license_link: LICENSE
language: [en, no]
pipeline_tag: text-generation
tags: [chat, gptq, 4-bit, GGUF, w4a16, code]
base_model: a/b
extra_gated_prompt: sign here
model-index:
- name: x
  results: []
  date: 2024-01-01
"""


@pytest.fixture
def card(tmp_path):
    def write(text):
        (tmp_path / "README.md").write_text(text)
        return tmp_path / "README.md"

    return write


def test_licence_language_and_tags_are_carried_over(card):
    kept = carried(read_head(card(f"---\n{HEAD}---\n# a model\n")))
    assert kept == {
        "license": "other",
        "license_name": "qwen-research",
        "license_link": "LICENSE",
        "language": ["en", "no"],
        "pipeline_tag": "text-generation",
        "tags": ["chat", "code"],  # those of the source's own format are not the result's
    }
    written = ModelCard(render_head({**kept, "base_model": None}) + "text").data.to_dict()
    assert written == kept


@pytest.mark.parametrize("text", ["", "# no head", "---\nlicense: mit\n", "text\n---\na: b\n---\n"])
def test_a_card_without_a_head(text, card):
    assert read_head(card(text)) == {}


def test_no_card(tmp_path):
    assert read_head(tmp_path / "README.md") == {}


@pytest.mark.parametrize(
    "head", ["license: [", "- a list", "a: &x 1\nb: *x", "a: 1\na: 2", "\x00", "[1]: 2"]
)
def test_a_head_that_cannot_be_read_is_told_and_left_out(head, card):
    with pytest.warns(LlmqWarning, match="add them by hand"):
        assert read_head(card(f"---\n{head}\n---\n")) == {}


def test_values_that_are_no_text_are_left_out():
    assert carried({"license": 3, "language": [1, "en"], "tags": {"a": 1}}) == {"language": ["en"]}


def test_whose_card_it_is(card):
    assert is_of_llmq(card("---\ntags: [llmq, gguf]\n---\n"))
    assert not is_of_llmq(card("---\ntags: [gguf]\n---\n"))
    assert not is_of_llmq(card("my notes"))
