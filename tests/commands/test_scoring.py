"""How much text `eval` and `compare` read where nobody says it."""

import pytest

from llmq.commands.catalog import build_parser
from llmq.commands.scoring import DEFAULT_TOKENS, evaluation_windows
from llmq.models.source import Source


def n_windows(source, *options):
    args = build_parser(["eval"]).parse_args(["eval", str(source.folder), *options])
    return len(evaluation_windows(args, source).tokens)


@pytest.fixture
def source(model_folder):
    return Source.open(model_folder(max_position_embeddings=2048))


def test_of_the_bundled_text_a_model_that_is_not_its_own_reads_a_part(source):
    assert n_windows(source) == DEFAULT_TOKENS // 2048
    assert n_windows(source, "--sequence-length", "512") == DEFAULT_TOKENS // 512
    assert n_windows(source, "--max-windows", "20") == 20


def test_text_that_is_given_is_read_to_its_end(source, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def main():\n    return 0\n" * 8000)
    assert n_windows(source, "--data", str(path)) > DEFAULT_TOKENS // 2048


def test_the_bundled_model_reads_all_of_its_own_text():
    source = Source.open("tiny")
    assert n_windows(source) > DEFAULT_TOKENS // 512
