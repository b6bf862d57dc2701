"""Rows as people have them: which columns are read, what becomes of chats, and what is counted."""

import gzip
import json

import pandas
import pytest

from llmq.errors import LlmqError
from llmq.text.documents import read_text
from llmq.text.rows import Documents, layout_of

# Refuses a system's text, as Gemma's does; a turn each in angle brackets.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE, raising=False)
    return tokenizer


QUESTION = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SHARED = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]


@pytest.mark.parametrize(
    ("row", "with_template", "without"),
    [
        ({"text": "a", "content": "b"}, "a", "a"),
        ({"content": "b", "id": 1}, "b", "b"),
        ({"prompt": "p", "messages": QUESTION}, "<user>Why?<assistant>So.", "Why?\n\nSo."),
        ({"conversations": SHARED}, "<user>Why?<assistant>So.", "Why?\n\nSo."),
        ({"prompt": "Why?", "completion": "So."}, "<user>Why?<assistant>So.", "Why?\n\nSo."),
        (
            {"prompt": QUESTION[:1], "completion": QUESTION[1:]},
            "<user>Why?<assistant>So.",
            "Why?\n\nSo.",
        ),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            "<user>Add\n\n1 2<assistant>3",
            "Add\n\n1 2\n\n3",
        ),
        ({"instruction": "Add", "input": "", "output": "3"}, "<user>Add<assistant>3", "Add\n\n3"),
        (
            {"system": "Be brief.", "question": "Why?", "response": "So."},
            "<user>Be brief.\n\nWhy?<assistant>So.",  # the template has no system role
            "Be brief.\n\nWhy?\n\nSo.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"i": 1}]}]},
            "<user>Hi",
            "Hi",
        ),
    ],
)
def test_every_layout_of_rows(row, with_template, without, chat_tokenizer):
    for tokenizer, expected in ((chat_tokenizer, with_template), (None, without)):
        documents = Documents(tokenizer)
        documents.add([row], "rows")
        assert documents.found == [expected]
        has_chats = "text" not in row and "content" not in row
        assert documents.template == (tokenizer is not None if has_chats else None)


def test_null_and_empty_rows_are_counted(tmp_path, chat_tokenizer):
    system = [{"role": "system", "content": "s"}]
    rows = [{"messages": turns} for turns in (QUESTION, None, [], system, QUESTION)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = read_text(str(path), "calibration", chat_tokenizer)
    assert text.documents == ["<user>Why?<assistant>So."] * 2
    assert text.read == {
        "source": "rows.jsonl",
        "rows": 5,
        "skipped_rows": {"null": 1, "empty": 1, "refused by the chat template": 1},
        "empty_rows": 0,
        "columns": [["messages"]],
        "chat_template": True,
    }
    path.write_text('{"text": null}\n{"text": ""}\n{"text": "a"}\n')
    text = read_text(str(path), "calibration")
    assert text.documents == ["", "a"]  # blank rows make the blank lines of published figures
    assert text.read["skipped_rows"] == {"null": 1}
    assert text.read["empty_rows"] == 1


def test_nothing_but_rows_that_are_left_out_says_why(tmp_path, chat_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": null}\n{"messages": [{"role": "system", "content": "s"}]}\n')
    with pytest.raises(LlmqError, match=r"2 rows: 1 null, 1 refused .*\(.*no system role\)"):
        read_text(str(path), "calibration", chat_tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "a"}, r"columns body in row 0; name the column with text: rows#COLUMN"),
        ({"text": 1}, "row 0: expected a string in 'text', got int"),
        ({"text": ["a"]}, "row 0: expected a string in 'text', got list"),
        ({"messages": "hi"}, "row 0: expected a list of turns, got str"),
        ({"messages": [{"speaker": "a"}]}, "role and content, or from and value, got speaker"),
        ({"messages": [{"role": 1, "content": "a"}]}, "expected a string in 'role', got int"),
        ({"messages": [{"role": "user", "content": 1}]}, "expected a string in 'content', got int"),
        ({"prompt": "a", "response": 1}, "expected a string in 'response', got int"),
    ],
)
def test_rows_of_another_form_are_refused(row, message):
    with pytest.raises(LlmqError, match=message):
        Documents().add([row], "rows")


def test_a_column_can_be_named(tmp_path):
    path = tmp_path / "rows.parquet"
    pandas.DataFrame({"text": ["a"], "body": ["b"], "talk": [SHARED]}).to_parquet(path)
    for column, expected in (("body", "b"), ("talk", "Why?\n\nSo."), ("text", "a")):
        assert read_text(f"{path}#{column}", "calibration").documents == [expected]
    with pytest.raises(LlmqError, match="expected a column 'other', found columns text, body"):
        read_text(f"{path}#other", "calibration")
    (tmp_path / "a#b.txt").write_text("a mark in the name")
    assert read_text(str(tmp_path / "a#b.txt"), "calibration").read["source"] == "a#b.txt"


def test_packed_rows_and_markdown(tmp_path):
    rows = b'{"text": "a"}\n{"text": "b"}\n'
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(b'[{"text": "a"}, {"text": "b"}]'))
    (tmp_path / "page.md").write_text("# Title")
    for name in ("rows.jsonl.gz", "list.json.gz"):
        assert read_text(str(tmp_path / name), "calibration").documents == ["a", "b"]
    assert read_text(str(tmp_path / "page.md"), "calibration").documents == ["# Title"]
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(rows)[:-9])
    with pytest.raises(LlmqError, match=r"not readable as \.jsonl\.gz"):
        read_text(str(tmp_path / "cut.jsonl.gz"), "calibration")


def test_the_first_that_holds_text_is_taken():
    assert layout_of(["id", "conversations", "content"]).columns == ("content",)
    assert layout_of(["output", "instruction", "input"]).columns == (
        "instruction",
        "output",
        "input",
    )
    assert layout_of(["id", "label"]) is None
