"""Text for a text, a conversation or token ids."""

import pytest
import torch

import llmq
from llmq.errors import LlmqError

PROMPT = "def main():"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"


@pytest.fixture(scope="module")
def model():
    return llmq.load("tiny", dtype="float32")


def test_a_text_is_gone_on_from_as_it_is(model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert torch.equal(llmq.generate(model, ids, 9), expected)
    assert torch.equal(llmq.generate(model, ids[0], 9), expected)
    new = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert llmq.generate(model, PROMPT, max_new_tokens=9) == new
    assert llmq.generate("tiny", PROMPT, 9, tokenizer=tokenizer).startswith(new[:3])


def test_a_conversation_goes_through_the_template(model, tokenizer):
    conversation = [{"role": "user", "content": "def"}]
    with pytest.raises(LlmqError, match="has no chat template"):
        llmq.generate(model, conversation, 4, tokenizer=tokenizer)
    own = llmq.load_tokenizer("tiny")
    own.chat_template = TEMPLATE
    expected = llmq.generate(model, "user: def\nanswer:", 4, tokenizer=own)
    assert llmq.generate(model, conversation, 4, tokenizer=own) == expected


def test_a_conversation_ends_where_its_template_ends_a_turn(model, monkeypatch):
    """Whether or not the generation config names that token."""
    own = llmq.load_tokenizer("tiny")
    own.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    end_of_answer = "{% if m.role == 'assistant' %}<|turn|>{% endif %}\n{% endfor %}"
    own.chat_template = TEMPLATE.replace("\n{% endfor %}", end_of_answer)
    monkeypatch.setattr("llmq.api.models.check_size", lambda *_: None)  # one token more
    given = {}

    def generate(model, ids, max_new_tokens, **options):
        given.update(options)
        return ids

    monkeypatch.setattr("llmq.inference.decoding.generate", generate)
    llmq.generate(model, [{"role": "user", "content": "def"}], 8, tokenizer=own)
    turn, end = own.convert_tokens_to_ids("<|turn|>"), model.generation_config.eos_token_id
    assert set(given["eos_token_id"]) == {turn, end}
    given.clear()
    llmq.generate(model, PROMPT, 8, tokenizer=own)
    assert "eos_token_id" not in given


def test_a_seed_repeats_and_leaves_torch_alone(model):
    before = torch.get_rng_state()
    texts = [llmq.generate(model, PROMPT, 12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt: no tokens"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens: expected 1 or more, got 0"),
        (PROMPT, {"max_new_tokens": 5000}, "tokens only; give fewer max_new_tokens"),
        (PROMPT, {"temperature": -1.0}, "temperature: expected a number, at least 0, got -1.0"),
        (["two", "texts"], {}, "prompt: expected a text to go on from, a conversation"),
        (torch.tensor([[9999]]), {}, "token id 9999 is beyond"),
    ],
    ids=str,
)
def test_what_cannot_be_gone_on_from(model, prompt, options, message):
    with pytest.raises(LlmqError, match=message):
        llmq.generate(model, prompt, **options)
