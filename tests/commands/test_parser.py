"""What help shows, and what becomes of options that recipe files have as keys."""

import json

import pytest

from llmq.commands.catalog import COMMANDS, command_parsers
from llmq.commands.cli import main
from llmq.commands.options import RECIPE_KEYS
from llmq.commands.parser import Parser
from llmq.commands.qat_options import RECIPE_KEYS as QAT_KEYS
from llmq.recipes.files import read_recipe_file
from llmq.schema import SCHEMA_VERSION

ALWAYS = {"-h", "--help", "--help-all"}
FOLDED = [("quantize", option, key) for option, key in RECIPE_KEYS.items()]
FOLDED += [("plan", "--sweeps", RECIPE_KEYS["--sweeps"])]
FOLDED += [("qat", option, key) for option, key in QAT_KEYS.items()]


def options_in(text):
    words = text.replace("[", " ").replace("]", " ").replace(",", " ").split()
    return {word for word in words if word.startswith("--")}


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_ten_options_at_most_and_help_all_every_one(command, capsys):
    parser = command_parsers()[command]
    hidden = set(QAT_KEYS if command == "qat" else RECIPE_KEYS)
    every = {option for action in parser._actions for option in action.option_strings} - hidden
    options, _, examples = help_of(capsys, command, "--help").partition("\nexamples:\n")
    assert len(options_in(options) - ALWAYS) <= 10
    assert "--json" in options
    everything = help_of(capsys, command, "--help-all")
    assert options_in(everything) | ALWAYS >= every
    n_more = len(parser.more.actions)
    assert (f"{n_more} more options, such as" in examples) == (n_more > 0)
    assert "more options" not in everything


@pytest.mark.parametrize("columns", ["80", "300"])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    for option in ("--help", "--help-all"):
        text = help_of(capsys, *([command] if command else []), option)
        assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_options_stand_below_titles(command, capsys):
    text = help_of(capsys, command, "--help-all").partition("\nexamples:")[0]
    titles = [line for line in text.splitlines() if line.endswith(":") and line[0].isalpha()]
    assert titles[-1] == "general:"
    assert len(titles) == len(set(titles))
    assert "\noptions:" not in text


def test_sections_go_on_and_hold_what_few_people_need(capsys):
    parser = Parser(prog="x")
    parser.section("first")
    parser.add_argument("--one")
    parser.more.add_argument("--rare")
    parser.section("second")
    parser.add_argument("--two")
    parser.section("first")
    parser.add_argument("--three")
    words = parser.format_help().split()
    places = [words.index(word) for word in ("first:", "--one", "--rare", "--three", "second:")]
    assert places == sorted(places)
    parser.hide_more()
    assert "--rare" not in parser.format_help().partition("more options")[0]


MISSPELT = [
    (["quantize", "tiny", "out", "--bit", "4"], "option --bit (did you mean --bits?)"),
    (["quantize", "--bit=4", "tiny", "out"], "option --bit (did you mean --bits?)"),
    (["quantize", "tiny", "out", "--asym"], "option --asym (did you mean --asymmetric?)"),
    (["eval", "tiny", "--windows", "2"], "option --windows (did you mean --max-windows?)"),
    (["generate", "tiny", "--promt", "x"], "option --promt (did you mean --prompt?)"),
    (["plan", "tiny", "--bits", "7"], "--bits: expected 2, 3, 4, 5, 6, 8 or ternary, got '7'; see"),
    (["plan", "tiny", "--bits", "tenary"], "got 'tenary' (did you mean ternary?)"),
    (["plan", "tiny", "--method", "gpqt"], "got 'gpqt' (did you mean gptq?)"),
    (["eval", "tiny", "--head-bits", "5"], "--head-bits: expected 8 or 4, got '5'; see"),
    (["quantise", "tiny", "out"], "unknown command quantise (did you mean quantize?)"),
    (["xyz"], "unknown command xyz; 'llmq --help' lists them"),
    (["--verson"], "unrecognized option --verson (did you mean --version?); see 'llmq --help'"),
    (["doctor", "tiny", "now"], "unrecognized arguments: now; see 'llmq doctor --help'"),
]


@pytest.mark.parametrize(("arguments", "expected"), MISSPELT, ids=lambda value: value[-1])
def test_what_is_misspelt_is_refused_with_what_was_meant(arguments, expected, capsys):
    assert main([*arguments, "--json"]) == 2
    found = capsys.readouterr()
    (line,) = found.err.splitlines()
    assert expected in line
    assert json.loads(found.out)["error"] == line.removeprefix("llmq: ")


def test_values_that_look_like_options_are_values(capsys):
    parser = command_parsers()["generate"]
    for text in ("--a list with spaces", "-1"):
        assert parser.parse_args(["tiny", "--prompt", text]).prompt == text
    assert parser.parse_args(["tiny", "--prompt=--bit"]).prompt == "--bit"
    assert parser.parse_args(["--prompt", "x", "--", "--odd-folder"]).model == "--odd-folder"


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
        error = {"schema_version": SCHEMA_VERSION, "error": line.removeprefix("llmq: ")}
        assert json.loads(found.out) == error
    path = tmp_path / "recipe.yaml"
    path.write_text(written)
    recipe = read_recipe_file(str(path))  # what the line says can be read
    assert recipe.qat if command == "qat" else recipe.recipe
    assert main([command, *place, option]) == 2
    assert "is a key of recipe files" in capsys.readouterr().err
