"""`llmq completion SHELL`: a script that completes commands, options and choices.

It holds every word itself, so completing starts no Python; a new version of llmq writes a new one.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from llmq.commands.parser import Parser

HELP = (
    "Print a script that lets a shell complete commands, options and their choices. It answers "
    "without starting Python."
)
EXAMPLES = (
    'eval "$(llmq completion bash)"        # in ~/.bashrc',
    'eval "$(llmq completion zsh)"         # in ~/.zshrc, after compinit',
)
SHELLS = ("bash", "zsh")
_BASH = """\
# llmq completion for bash: eval "$(llmq completion bash)"
_llmq() {{
    local word="$2" before="$3" words=""
    COMPREPLY=()
    if (( COMP_CWORD == 1 )); then
        words={commands}
    elif [[ "$word" == -* ]]; then
        case "${{COMP_WORDS[1]}}" in
{options}
        esac
    else
        case "${{COMP_WORDS[1]}} $before" in
{choices}
        esac
    fi
    [[ -z "$words" ]] || COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _llmq llmq
"""
_ZSH = """\
#compdef llmq
# llmq completion for zsh: eval "$(llmq completion zsh)", after compinit
_llmq() {{
    local words_here=""
    if (( CURRENT == 2 )); then
        words_here={commands}
    elif [[ "$PREFIX" == -* ]]; then
        case "${{words[2]}}" in
{options}
        esac
    else
        case "${{words[2]}} ${{words[CURRENT-1]}}" in
{choices}
        esac
    fi
    if [[ -n "$words_here" ]]; then
        compadd -- ${{=words_here}}
    else
        _files
    fi
}}
compdef _llmq llmq
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that the script is for")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    script = completion(args.shell)
    return {"shell": args.shell, "script": script}, script.rstrip("\n")


def completion(shell: str) -> str:
    """The script for "bash" or "zsh"."""
    from llmq.commands.catalog import COMMANDS, command_parsers

    parsers = command_parsers()
    name = "words" if shell == "bash" else "words_here"
    return (_BASH if shell == "bash" else _ZSH).format(
        commands=_quoted([*COMMANDS, "--help", "--version"]),
        choices="\n".join(_choices(parsers, name)),
        options="\n".join(_options(parsers, name)),
    )


def _choices(parsers: dict[str, Parser], variable: str) -> Iterator[str]:
    """A case for each option, or first argument, that takes one of some words."""
    for command, parser in parsers.items():
        for action in _shown(parser):
            if action.choices is None:
                continue
            words = [str(choice) for choice in action.choices]
            places = action.option_strings or [command]  # an argument stands behind the command
            for place in places:
                yield f"            '{command} {place}') {variable}={_quoted(words)} ;;"


def _options(parsers: dict[str, Parser], variable: str) -> Iterator[str]:
    for command, parser in parsers.items():
        names = [name for action in _shown(parser) for name in action.option_strings]
        long = [name for name in names if name.startswith("--")]
        yield f"            {command}) {variable}={_quoted(long)} ;;"


def _shown(parser: Parser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.help is not argparse.SUPPRESS]


def _quoted(words: Sequence[str]) -> str:
    """Words as one word of a shell. They are names of ours; one that a shell would expand is a
    mistake here."""
    assert all(re.fullmatch(r"[\w.-]+", word) for word in words), words
    return shlex.quote(" ".join(words))
