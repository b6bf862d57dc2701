"""The names in the code of a card on its way to the Hub."""

from llmq.cards.names import USE, for_repository, with_download
from llmq.cards.usage import usages

ENGINES = [
    {"engine": name, "version": "1", "reads": True} for name in ("llmq", "transformers", "vLLM")
]


def page(name):
    codes = [f"```{each.language}\n{each.code}\n```\n" for each in usages(ENGINES, name)]
    return f'About "{name}".\n\n{USE}' + "\n".join(codes)


def test_code_names_the_repository_and_text_stays():
    for name in ("tiny-w4", "model", "llmq", 'a "b" \\ c'):
        expected = page("me/x").replace('About "me/x"', f'About "{name}"')
        assert for_repository(page(name), "me/x") == expected


def test_twice_is_once():
    assert for_repository(for_repository(page("a"), "me/x"), "me/y") == for_repository(
        page("a"), "me/y"
    )


def test_a_card_of_somebody_else_stays():
    assert for_repository("# mine\n```\nfoo\n```\n", "me/x") == "# mine\n```\nfoo\n```\n"


def test_a_file_is_downloaded_first():
    text = with_download(page("x.gguf"), "me/x", "x.gguf")
    first = text.partition(USE)[2].partition("```bash\n")[2].partition("\n")[0]
    assert first == "hf download me/x x.gguf --local-dir ."
    assert with_download("mine", "me/x", "x.gguf") == "mine"
