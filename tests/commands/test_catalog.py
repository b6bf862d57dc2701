"""The table of commands is what there is, and nothing else is imported for one of them."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llmq.commands import catalog
from llmq.commands.cli import main
from llmq.schema import SCHEMA_VERSION


def leaves(capsys, *arguments):
    """Exit code and output of a command that leaves by itself."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return left.value.code, capsys.readouterr().out


def test_every_module_with_a_command_is_in_the_table():
    folder = Path(catalog.__file__).parent
    sources = {path.stem: path.read_text() for path in folder.glob("*.py")}
    modules = {name for name, source in sources.items() if "\ndef add_arguments(" in source}
    modules = {name for name in modules if "\nHELP = " in sources[name]}
    assert modules == set(catalog.COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--help-all"]], ids=str)
def test_llmq_alone_prints_the_commands(arguments, capsys):
    code, text = leaves(capsys, *arguments)
    assert code == 0
    lines = [line.split() for line in text.splitlines() if line.startswith("  ")]
    assert [words[0] for words in lines if words[0] in catalog.COMMANDS] == list(catalog.COMMANDS)


EXAMPLES = [
    (name, example)
    for name, parser in {"llmq": catalog, **catalog.command_parsers()}.items()
    for example in getattr(parser, "EXAMPLES", None) or parser.examples
]


def test_every_command_has_an_example():
    assert {name for name, _ in EXAMPLES} == {"llmq", *catalog.COMMANDS}


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_examples_are_commands(name, example, capsys):
    command = example.removeprefix('eval "$(').replace(')"', "").rpartition(" | ")[2]
    words = shlex.split(command, comments=True)
    assert words[0] == "llmq"
    if words[-1].startswith("--help"):
        leaves(capsys, *words[1:])
    else:
        assert catalog.read_arguments(words[1:]).command == words[1]
        assert name in ("llmq", words[1])


def test_a_command_imports_no_other():
    program = (
        "import sys\nbefore = {*sys.modules}\n"  # what measures coverage imports some of its own
        "from llmq.commands.catalog import read_arguments\n"
        "read_arguments(['verify', 'x'])\n"
        "print([name for name in sys.modules if name.startswith('llmq.commands.')])\n"
        "print({'asyncio', 'inspect'} & sys.modules.keys() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    modules, heavy = done.stdout.splitlines()
    assert "verify" in modules
    assert "quantize" not in modules
    assert heavy == "set()"


def test_every_json_object_has_the_version_of_its_schema(capsys):
    for arguments, code in (
        (["inspect", "tiny"], 0),
        (["inspect", "/nowhere"], 2),
        (["inspect"], 2),
        (["verify", "tiny"], 2),
        (["completion", "bash"], 0),
    ):
        assert main([*arguments, "--json"]) == code
        result = json.loads(capsys.readouterr().out)
        assert next(iter(result)) == "schema_version"
        assert result["schema_version"] == SCHEMA_VERSION
        assert ("error" in result) == (code == 2)
