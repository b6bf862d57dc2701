"""`llmq chat` and `llmq generate` through a chat template: each answer is what transformers
generates for the same conversation, up to the token that ends a turn."""

import copy
import io
import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import make_model

from llmq.commands.chat import plain_text
from llmq.commands.cli import main
from llmq.commands.writing_options import Room
from llmq.errors import LlmqError

TEMPLATE = (
    "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NEW = 12
SAYS = ("def f(x):", "return 1")


@pytest.fixture
def talk(tokenizer, tmp_path):
    """Folder, model and tokenizer with a chat template, whose `<|turn|>` is what the model writes
    as its fifth token."""
    chatty = copy.deepcopy(tokenizer)
    chatty.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    chatty.chat_template = TEMPLATE
    model = make_model(vocab_size=2064, eos_token_id=None, max_position_embeddings=256)
    fifth = answered(model, chatty, [{"role": "user", "content": SAYS[0]}], None)[4]
    end = chatty.convert_tokens_to_ids("<|turn|>")
    model.lm_head.weight.data[end] = 2 * model.lm_head.weight.data[fifth]
    folder = tmp_path / "talk"
    model.save_pretrained(folder)
    chatty.save_pretrained(folder)
    return folder, model, chatty


@pytest.fixture
def llmq(capsys, monkeypatch):
    """A function that runs a command, with a text as standard input, and returns (exit code,
    stdout, stderr)."""

    def run(*arguments, stdin=""):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main([*map(str, arguments), "--max-new-tokens", str(NEW)])
        return code, *capsys.readouterr()

    return run


def answered(model, tokenizer, messages, ends):
    """New tokens by transformers' own way."""
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=ends,
        pad_token_id=0,
    )
    return output[0, prompt.shape[1] :].tolist()


def expected_turns(model, tokenizer, says, system=None):
    end = tokenizer.convert_tokens_to_ids("<|turn|>")
    messages = [] if system is None else [{"role": "system", "content": system}]
    texts, counts = [], []
    for text in says:
        messages.append({"role": "user", "content": text})
        ids = answered(model, tokenizer, messages, [end])
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
        counts.append(len(ids))
        messages.append({"role": "assistant", "content": texts[-1]})
    return texts, counts


def test_an_answer_ends_where_the_template_ends_a_turn(llmq, talk):
    folder, *own = talk
    texts, counts = expected_turns(*own, SAYS[:1])
    assert counts[0] < NEW
    code, stdout, stderr = llmq("generate", folder, "--prompt", SAYS[0], "--json")
    assert code == 0, stderr
    result = json.loads(stdout)
    assert (result["text"], result["new_tokens"]) == (texts[0], counts[0])
    assert (result["finish_reason"], result["chat_template"]) == ("end_token", True)
    code, stdout, _ = llmq("generate", folder, stdin=SAYS[0] + "\n")  # and not the prompt
    assert (code, stdout) == (0, texts[0] + "\n")
    code, stdout, _ = llmq("generate", folder, "--raw", "--prompt", SAYS[0])
    assert stdout.startswith(SAYS[0])


def test_a_conversation_is_answered_with_its_history(llmq, talk):
    folder, *own = talk
    texts, counts = expected_turns(*own, SAYS, "be brief")
    lines = "\n".join([SAYS[0], "", SAYS[1], "/reset", "/nothing", SAYS[0], "/exit", "more"])
    code, stdout, stderr = llmq("chat", folder, "--system", "be brief", "--json", stdin=lines)
    assert code == 0, stderr
    turns = json.loads(stdout)["turns"]
    assert [turn["text"] for turn in turns] == [*texts, texts[0]]
    assert [turn["new_tokens"] for turn in turns] == [*counts, counts[0]]
    assert [turn["conversation"] for turn in turns] == [0, 0, 1]
    assert turns[0]["kept_tokens"] == 0 < turns[2]["kept_tokens"] <= turns[1]["kept_tokens"]
    assert "/nothing: no such command" in stderr
    code, stdout, _ = llmq("chat", folder, "--system", "be brief", stdin="\n".join(SAYS))
    assert (code, stdout) == (0, "".join(text + "\n" for text in texts))


def test_without_a_template_text_goes_on(llmq, model_folder):
    folder = model_folder()
    code, stdout, stderr = llmq("chat", folder, "--json", stdin="\n".join(SAYS))
    assert (code, "has no chat template" in stderr) == (0, True)
    result = json.loads(stdout)
    assert (result["chat_template"], len(result["turns"])) == (False, 2)
    first, second = result["turns"]
    said = SAYS[0] + first["text"] + "\n" + SAYS[1]
    code, stdout, _ = llmq("generate", folder, "--prompt", said, "--json")
    assert json.loads(stdout)["text"] == second["text"]


def test_sampling_goes_by_its_options(llmq, talk):
    folder, *_ = talk
    drawn = ["generate", folder, "--prompt", SAYS[0], "--json", "--temperature", 2]

    def text(*more):
        return json.loads(llmq(*drawn, *more)[1])["text"]

    greedy = json.loads(llmq(*drawn[:-2])[1])["text"]
    assert text("--top-k", 1) == text("--top-p", 1e-6) == greedy
    assert text("--seed", 1) == text("--seed", 1) != text("--seed", 2)


def test_stops_are_not_part_of_the_text(llmq, model_folder):
    folder = model_folder()
    command = ["generate", folder, "--prompt", SAYS[0]]
    whole = json.loads(llmq(*command, "--json")[1])["text"]
    stop = whole[6:9]
    result = json.loads(llmq(*command, "--stop", "never", "--stop", stop, "--json")[1])
    assert result["text"] == whole[: whole.index(stop)]
    assert (result["finish_reason"], result["new_tokens"] < NEW) == ("stop_string", True)
    assert llmq(*command, "--stop", stop)[1] == SAYS[0] + result["text"] + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--top-p", 0.5], "--top-p 0.5: nothing is drawn at temperature 0"),
        (["--prompt", "x", "--top-k", 5], "--top-k 5: nothing is drawn at temperature 0"),
        (["--prompt", "x", "--top-p", 2], "from 0 to 1"),
        (["--prompt", "x", "--stop", ""], "expected a text"),
        (["--prompt", "x", "--raw", "--system", "y"], "--raw leaves the chat template out"),
        (["--prompt", " "], "--prompt: empty"),
        ([], "--prompt: empty"),
    ],
)
def test_what_would_change_nothing_is_refused_by_name(arguments, message, llmq, talk):
    code, _, stderr = llmq("generate", talk[0], *arguments)
    assert (code, stderr.count("\n"), message in stderr) == (2, 1, True), stderr


def test_a_conversation_that_has_no_room_is_refused(llmq, talk):
    code, _, stderr = llmq("chat", talk[0], stdin="x " * 400)
    assert (code, "begin anew with /reset" in stderr) == (2, True), stderr


def test_a_long_conversation_gets_the_tokens_that_are_left():
    says: dict = {"max_new_tokens": None, "max_length": None}
    room = Room(make_model().config, says, asked=100, default=64, is_most=True)
    assert (room.new_tokens(20), room.new_tokens(100)) == (100, 28)
    with pytest.raises(LlmqError, match="--max-new-tokens 28 or less"):
        replace(room, is_most=False).new_tokens(100)


def test_plain_text_is_what_was_said():
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, "abc", strict=True)]
    assert plain_text(messages) == "ab\nc"
