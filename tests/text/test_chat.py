"""What a conversation becomes: tokens by the chat template, the end of a turn, refusals."""

import copy

import pytest

from llmq.errors import LlmqError
from llmq.text.chat import has_template, template_ids, template_text, turn_end

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASKED = [{"role": "user", "content": "who?"}]


@pytest.fixture
def chatty(tokenizer):
    """A function that gives the tokenizer a template and the token `<|turn|>`."""

    def make(template=TEMPLATE):
        found = copy.deepcopy(tokenizer)
        found.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
        found.chat_template = template
        return found

    return make


def test_the_template_writes_all_special_tokens(chatty):
    tokenizer = chatty()
    assert has_template(tokenizer)
    assert template_text(tokenizer, ASKED, "m") == "<|user|>who?<|turn|>\n<|assistant|>"
    ids = template_ids(tokenizer, ASKED, "m")
    own = tokenizer.apply_chat_template(
        ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert ids.tolist() == own["input_ids"].tolist()


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (TEMPLATE, "<|turn|>"),
        ("{{ messages[-1].content }} \n <|endoftext|>", "<|endoftext|>"),
        ("{{ messages[-1].content }}\n### Question:", None),
        ("{{ messages[0].content }}", None),
        ("{{ raise_exception('users only') if messages[1] }}", None),
    ],
)
def test_the_token_behind_an_answer_ends_it(chatty, template, token):
    tokenizer = chatty(template)
    expected = None if token is None else tokenizer.convert_tokens_to_ids(token)
    assert turn_end(tokenizer) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{% for %}", "cannot write this conversation"),
        ("{{ messages[1].content }}", "no place for a system message"),
    ],
)
def test_what_a_template_cannot_say_is_told_in_one_line(chatty, template, message):
    system = [{"role": "system", "content": "be brief"}, *ASKED]
    with pytest.raises(LlmqError, match=message) as caught:
        template_text(chatty(template), system, "m")
    assert "--system" in str(caught.value)
