"""What help shows, and what becomes of options that recipe files have as keys."""

import json

import pytest

from llmq.commands.cli import build_parser, main
from llmq.commands.options import RECIPE_KEYS
from llmq.commands.qat_options import RECIPE_KEYS as QAT_KEYS
from llmq.recipes.files import read_recipe_file

ALWAYS = {"-h", "--help", "--help-all"}
FOLDED = [("quantize", option, key) for option, key in RECIPE_KEYS.items()]
FOLDED += [("plan", "--sweeps", RECIPE_KEYS["--sweeps"])]
FOLDED += [("qat", option, key) for option, key in QAT_KEYS.items()]


def subparsers():
    (commands,) = (action.choices for action in build_parser()._actions if action.dest == "command")
    return commands


def options_in(text):
    words = text.replace("[", " ").replace("]", " ").replace(",", " ").split()
    return {word for word in words if word.startswith("--")}


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", list(subparsers()))
def test_help_shows_ten_options_at_most_and_help_all_every_one(command, capsys):
    parser = subparsers()[command]
    hidden = set(QAT_KEYS if command == "qat" else RECIPE_KEYS)
    every = {option for action in parser._actions for option in action.option_strings} - hidden
    usage, shown = help_of(capsys, command, "--help").split("\noptions:")
    assert len(options_in(usage) - ALWAYS) <= 10
    assert "--json" in usage
    assert options_in(help_of(capsys, command, "--help-all")) | {"-h"} >= every
    n_more = len({action.dest for action in parser.more._group_actions})
    assert (f"{n_more} more options" in shown) == (n_more > 0)


@pytest.mark.parametrize(("command", "option", "key"), FOLDED)
def test_a_folded_option_names_its_key(command, option, key, capsys, tmp_path):
    value = {"--order": "static", "--activation-range": "minmax"}.get(option, "1")
    place = ["tiny"] if command == "plan" else ["tiny", str(tmp_path / "out")]
    for given in ([option, value], [f"{option}={value}"]):
        assert main([command, *place, *given, "--json"]) == 2
        found = capsys.readouterr()
        (line,) = found.err.splitlines()
        written = key.replace("{}", value)
        expected = f"llmq: {option} is a key of recipe files: '{written}' (see llmq/recipes/"
        assert line.startswith(expected)
        assert json.loads(found.out) == {"error": line.removeprefix("llmq: ")}
    path = tmp_path / "recipe.yaml"
    path.write_text(written)
    recipe = read_recipe_file(str(path))  # what the line says can be read
    assert recipe.qat if command == "qat" else recipe.recipe
    assert main([command, *place, option]) == 2
    assert "is a key of recipe files" in capsys.readouterr().err
