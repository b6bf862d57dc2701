"""Completion, by the shells that it is for."""

import shutil
import subprocess

import pytest

from llmq.commands.catalog import COMMANDS, command_parsers
from llmq.commands.completion import completion


def shell(name, program, cwd):
    """What a shell prints that has neither llmq nor Python to ask."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    options = ["--norc", "--noprofile"] if name == "bash" else ["-f"]
    done = subprocess.run(
        [path, *options, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env={"PATH": "/nowhere", "HOME": str(cwd)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def bash_words(tmp_path, *words):
    """The completions of a command line whose last word is being typed."""
    quoted = " ".join(f"'{word}'" for word in words)
    program = (
        f"{completion('bash')}\nCOMP_WORDS=({quoted})\nCOMP_CWORD={len(words) - 1}\n"
        f"_llmq llmq '{words[-1]}' '{words[-2]}'\necho \"${{COMPREPLY[@]}}\""
    )
    return shell("bash", program, tmp_path)


# What zsh's own functions would do with the words, so that the script runs where no one types.
ZSH_STAND_INS = "compdef() { }\n_files() { }\ncompadd() { shift; print -l -- ${(M)@:#$PREFIX*} }\n"


def zsh_words(tmp_path, *words):
    quoted = " ".join(f"'{word}'" for word in words)
    program = (
        f"{ZSH_STAND_INS}{completion('zsh')}\nwords=({quoted}); CURRENT={len(words)}; "
        f"PREFIX='{words[-1]}'; _llmq"
    )
    return shell("zsh", program, tmp_path)


@pytest.mark.parametrize("complete", [bash_words, zsh_words])
def test_commands_options_and_choices_are_completed(complete, tmp_path):
    assert complete(tmp_path, "llmq", "")[: len(COMMANDS)] == list(COMMANDS)
    assert complete(tmp_path, "llmq", "qu") == ["quantize"]
    for command, parser in command_parsers().items():
        known = set(parser._option_string_actions)
        found = set(complete(tmp_path, "llmq", command, "--"))
        assert {"--json", "--help"} <= found <= known
    assert complete(tmp_path, "llmq", "quantize", "tiny", "out", "--as") == ["--asymmetric"]
    assert complete(tmp_path, "llmq", "plan", "tiny", "--bits", "t") == ["ternary"]
    assert complete(tmp_path, "llmq", "generate", "m", "--compute", "") == ["exact", "int8"]
    assert complete(tmp_path, "llmq", "completion", "") == ["bash", "zsh"]


@pytest.mark.parametrize("complete", [bash_words, zsh_words])
def test_elsewhere_files_are_completed_by_the_shell(complete, tmp_path):
    assert complete(tmp_path, "llmq", "quantize", "ti") == []
    assert complete(tmp_path, "llmq", "eval", "tiny", "--data", "") == []
    assert complete(tmp_path, "llmq", "no-command", "--") == []
    assert "complete -o default " in completion("bash")  # files, where there is no other word
