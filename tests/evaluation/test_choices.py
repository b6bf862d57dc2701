"""Multiple choice against a plain computation, where question and choice meet, and files that are
refused."""

import copy
import json

import pytest
import torch
from conftest import make_model
from tokenizers.processors import TemplateProcessing

from llmq.errors import LlmqError
from llmq.evaluation import choices
from llmq.evaluation.choices import Question, chosen_answers, read_choices, tokenized

ROWS = [
    {"question": f"line {i}: the value of {i} is", "choices": ["one", f"{i * i}", "many of them"]}
    | {"answer": i % 3}
    for i in range(20)
]


@pytest.fixture
def write(tmp_path):
    """A function that writes rows into a file and returns its path."""

    def make(rows, name="questions.jsonl"):
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path

    return make


def flat(lists):
    return [value for each in lists for value in each]


@torch.no_grad()
def plain_scores(model, tokenizer, row, prefix=()):
    """Log-likelihood per byte of each choice, one at a time."""
    context = [*prefix, *tokenizer(row["question"], add_special_tokens=False)["input_ids"]]
    scores = []
    for choice in row["choices"]:
        text = f"{row['question']} {choice}"
        whole = [*prefix, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert whole[: len(context)] == context
        found = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
        total = sum(found[i - 1, whole[i]] for i in range(len(context), len(whole)))
        scores.append(float(total) / len(choice.encode()))
    return scores


@pytest.mark.parametrize("rows_together", [4, 64])
def test_scores_equal_a_plain_computation(write, tokenizer, monkeypatch, rows_together):
    monkeypatch.setattr(choices, "ROWS_TOGETHER", rows_together)
    model = make_model()
    file = read_choices(write(ROWS), tokenizer, model.config)
    expected = [plain_scores(model, tokenizer, row) for row in ROWS]
    seen = []
    rows = flat(file.rows)
    found = choices.choice_scores(model, rows, lambda done, total: seen.append((done, total)))
    assert found.tolist() == pytest.approx(flat(expected), rel=1e-4)
    assert chosen_answers(model, file) == [each.index(max(each)) for each in expected]
    assert seen[-1] == (60, 60)
    assert (file.answers[:4], file.n_rows, file.bos) == ([0, 1, 2, 0], 60, "none")
    assert file.identity()["questions"] == 20
    assert len(file.identity()["sha256"]) == 64


def test_bos_that_the_tokenizer_adds_stands_before_the_question(write, tokenizer):
    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    model = make_model()
    file = read_choices(write(ROWS[:4]), adding, model.config)
    assert file.bos == "start"
    found = choices.choice_scores(model, flat(file.rows))
    expected = [plain_scores(model, tokenizer, row, prefix=[0]) for row in ROWS[:4]]
    assert found.tolist() == pytest.approx(flat(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("context", "texts", "before", "behind"),
    [
        ("the answer is", ["self", "None"], "the answer is", [" self", " None"]),
        ("the answer is", [" self", " None"], "the answer is", [" self", " None"]),
        # The space becomes part of the choices' first tokens.
        ("the answer is ", ["self", "None"], "the answer is", [" self", " None"]),
        # A line break and spaces are one token, so the line break counts for the other choice, too.
        ("x =\n", ["    y", "z"], "x =", ["\n    y", "\nz"]),
    ],
)
def test_what_is_scored_begins_where_tokens_differ(tokenizer, context, texts, before, behind):
    rows = tokenized(Question(context, tuple(texts), 0), tokenizer, None, "row 0")
    assert len({row.first for row in rows}) == 1
    assert [tokenizer.decode(row.tokens[: row.first]) for row in rows] == [before] * 2
    assert [tokenizer.decode(row.tokens[row.first :]) for row in rows] == behind
    assert [row.n_bytes for row in rows] == [len(text) for text in texts]


def test_nothing_before_the_choices_is_refused(tokenizer):
    with pytest.raises(LlmqError, match="row 0: no token of the question comes before"):
        tokenized(Question("", ("a", "b"), 0), tokenizer, None, "row 0")
    rows = tokenized(Question("", ("a", "b"), 0), tokenizer, 0, "row 0")
    assert [row.first for row in rows] == [1, 1]


GOOD = {"question": "q", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": 3}, "row 1: expected a text in 'question' or 'context', got 3"),
        ({"choices": ["a"]}, r"row 1: expected two or more texts in 'choices', got \['a'\]"),
        ({"choices": ["a", ""]}, "row 1: expected texts that are not empty in 'choices', got ''"),
        ({"answer": 2}, "row 1: expected a number from 0 to 1 in 'answer', got 2"),
        ({"answer": True}, "row 1: expected a number from 0 to 1 in 'answer', got True"),
        ({"answer": "1"}, "row 1: expected a number from 0 to 1 in 'answer', got '1'"),
        ({"question": "long " * 200}, "row 1 of 400 tokens: llama has positions for 128 tokens"),
    ],
)
def test_rows_that_are_no_questions(write, tokenizer, change, message):
    path = write([GOOD, GOOD | change])
    with pytest.raises(LlmqError, match=message):
        read_choices(path, tokenizer, make_model().config)


def test_files_that_hold_no_questions(write, tmp_path, tokenizer):
    config = make_model().config
    for path, message in (
        (write([]), "holds no question"),
        (write([GOOD], "questions.txt"), "expected a .jsonl or .jsonl.gz file"),
        (tmp_path / "none.jsonl", "not readable as .jsonl"),
    ):
        with pytest.raises(LlmqError, match=message):
            read_choices(path, tokenizer, config)
    context = {"context": "q", "choices": ["a", "b"], "answer": 0}
    assert read_choices(write([context]), tokenizer, config).questions[0].context == "q"
