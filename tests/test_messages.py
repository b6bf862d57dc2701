"""Messages: one line, printable, of bounded length, with both ends of what is too long."""

import pytest

from llmq.errors import LlmqError, VerificationError
from llmq.messages import LIMIT, name_patterns, one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n  b\tc\r\n", "a b c"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("txt\u202egnp", r"txt\u202egnp"),
        ("half \ud800", r"half \ud800"),
        ("\x85\u2028\x00", r"\x85\u2028\x00"),
        ("Größe 中 😀", "Größe 中 😀"),
    ],
)
def test_what_is_not_printable_is_shown_as_an_escape(text, shown):
    assert one_line(text) == shown
    assert one_line(text).isprintable()


@pytest.mark.parametrize(
    "text", ["x" * 10**6, "word " * 1000, "\x1b" * 1000, "/" + "d" * 3000 + ": damaged; do this"]
)
def test_long_text_keeps_its_ends(text):
    line = one_line(text)
    assert len(line) <= LIMIT
    assert line.isprintable()
    assert line[0] == one_line(text[:1])[0]


def test_long_paths_give_way_before_sentences():
    message = f"/{'folder/' * 100}model.safetensors: damaged (a reason); download it again"
    line = one_line(message)
    assert len(line) <= LIMIT
    assert line.endswith("model.safetensors: damaged (a reason); download it again")


@pytest.mark.parametrize("kind", [LlmqError, VerificationError])
def test_errors_are_lines_from_the_start(kind):
    assert str(kind("a\x1b\nb")) == r"a\x1b b"
    assert len(str(kind("long " * 5000))) == LIMIT


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["h.0.attn", "h.1.attn"], ["h.*.attn"]),
        (["e.0.1.up", "e.0.2.up", "e.1.1.down"], ["e.*.*.{up,down}"]),
        (["lm_head", "embed"], ["lm_head", "embed"]),
    ],
)
def test_names_are_told_as_few_patterns(names, expected):
    assert name_patterns(names) == expected
