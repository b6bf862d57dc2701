"""Text as it is printed while it grows: whole characters, no special tokens, nothing of a stop."""

import io

import pytest
import torch

from llmq.commands import streaming

PROMPT = "def f():"
TEXT = " naïve \N{GRINNING FACE}\n  x = 'END' \N{CJK UNIFIED IDEOGRAPH-8A9E}"


def streamed(tokenizer, text, **settings):
    stream = io.StringIO()
    streamer = streaming.Streamer(tokenizer, stream, **settings)
    streamer.put(torch.tensor([tokenizer(PROMPT)["input_ids"]]))
    pieces = []
    for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]:
        streamer.put(torch.tensor([token]))
        pieces.append(stream.getvalue())
    streamer.end()
    assert all("\ufffd" not in piece for piece in pieces)
    return stream.getvalue(), pieces


def test_all_of_a_text_is_printed_as_it_comes(tokenizer):
    whole, pieces = streamed(tokenizer, TEXT)
    assert whole == TEXT + "\n"
    assert len(set(pieces)) > 5
    assert streamed(tokenizer, TEXT, shows_prompt=True)[0] == PROMPT + TEXT + "\n"


@pytest.mark.parametrize(
    ("stops", "end"), [(["END"], "'"), (["x =", "END'"], "  "), (["none"], "")]
)
def test_nothing_of_a_stop_is_printed(tokenizer, stops, end):
    whole, pieces = streamed(tokenizer, TEXT, stops=stops)
    expected = streaming.cut(TEXT, stops)
    assert whole == expected + "\n"
    assert whole.rstrip("\n").endswith(end)
    assert all(expected.startswith(piece) for piece in pieces)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abc", [], 3),
        ("ab E", ["END"], 3),
        ("ab EN", ["x", "END"], 3),
        ("ab E ", ["END"], 5),
        ("aab", ["aabx", "bx"], 0),
    ],
)
def test_what_may_begin_a_stop_waits(text, stops, expected):
    assert streaming.n_certain(text, stops) == expected


def test_a_row_ends_with_a_stop_of_its_own(tokenizer):
    prompt = tokenizer("say END")["input_ids"]
    rows = [[*prompt, *tokenizer(text)["input_ids"]] for text in (" the END", " the EN D")]
    length = min(map(len, rows))
    criterion = streaming.StopAt(tokenizer, len(prompt), ["END"])
    ends = [criterion.ends(row) for row in rows]
    assert ends == [True, False]
    assert not criterion(torch.tensor([row[:length] for row in rows])[:, : len(prompt)], None).any()
    criterion.is_asked_to = True
    assert criterion(torch.tensor([prompt]), None).all()
