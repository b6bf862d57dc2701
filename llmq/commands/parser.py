"""The parser that every command has: its help is grouped and shows what most people need, its
errors are one line and know what was meant, and an option that became a key of recipe files names
that key.

`--help` shows the options that `add_argument` adds, `--help-all` those of `more`, too."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from llmq.errors import LlmqError
from llmq.messages import did_you_mean

RECIPE_PAGE = "llmq/recipes/README.md"
WIDTH = 80  # columns of help, on a wider terminal, too


class Parser(argparse.ArgumentParser):
    """Raises its errors, so that bad usage is reported like bad input: one line, and as JSON where
    that was asked for. No option can be abbreviated: a script would change its meaning with the
    next option that begins alike. examples: command lines for the end of the help. more: adds
    options that few people need."""

    def __init__(self, *, examples: Sequence[str] = (), **settings: Any) -> None:
        settings |= {"formatter_class": _Formatter, "allow_abbrev": False, "add_help": False}
        super().__init__(**settings)
        self._positionals.title = "arguments"
        self.examples = tuple(examples)
        self.more = More(self)
        self._sections: dict[str, argparse._ArgumentGroup] = {}
        self._section: argparse._ArgumentGroup | None = None

    def section(self, title: str) -> None:
        """Options that are added from here on stand below this title; one that was there already
        goes on."""
        if title not in self._sections:
            self._sections[title] = self.add_argument_group(title)
        self._section = self._sections[title]

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        is_option = bool(names) and str(names[0]).startswith("-")
        if is_option and self._section is not None:
            return self._section.add_argument(*names, **settings)
        return super().add_argument(*names, **settings)

    def add_help_options(self) -> None:
        """The options that show help."""
        self.add_argument("-h", "--help", action=_Help, help="show this and exit")
        shown = "show every option and exit" if self.more.actions else argparse.SUPPRESS
        self.add_argument("--help-all", action=_HelpAll, help=shown)

    def format_usage(self) -> str:
        self.usage = self._short_usage()
        return super().format_usage()

    def format_help(self) -> str:
        """Usage, arguments, options by section, examples."""
        self.usage = self._short_usage()
        self.epilog = "\n\n".join(filter(None, (self._shown_examples(), self._hint())))
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise LlmqError(f"{message.removeprefix('argument ')}; see '{self.prog} --help'")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._subparsers is None and args is not None:
            self.check_options(args)  # before argparse takes their values for arguments
        return super().parse_known_args(args, namespace)

    def hide_more(self) -> None:
        """Leave the options of `more` out of help and usage."""
        for action in self.more.actions:
            action.help = argparse.SUPPRESS

    def check_options(self, args: Iterable[str]) -> None:
        """Raise `LlmqError` for an option that there is not, with the one that was meant."""
        known = self._option_string_actions
        for text in args:
            if text == "--":
                return
            name = text.partition("=")[0]
            # argparse takes what holds a space for a value
            if name.startswith("--") and name not in known and " " not in text:
                self.error(f"unrecognized option {name}{did_you_mean(name, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse, which lists the choices and does not say which was meant."""
        choices = None if action.choices is None else [str(choice) for choice in action.choices]
        if choices is not None and str(value) not in choices:
            expected = " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
            meant = did_you_mean(str(value), choices)
            raise argparse.ArgumentError(action, f"expected {expected}, got {str(value)!r}{meant}")

    def _short_usage(self) -> str:
        needed = [a for a in self._actions if a.required and a.option_strings]
        arguments = [a for a in self._actions if not a.option_strings]
        words = [f"{a.option_strings[-1]} {a.metavar or a.dest.upper()}" for a in needed]
        words += [str(a.metavar or a.dest) if a.required else f"[{a.dest}]" for a in arguments]
        return " ".join(("%(prog)s", *words, "[options]"))

    def _shown_examples(self) -> str:
        return "\n  ".join(("examples:", *self.examples)) if self.examples else ""

    def _hint(self) -> str:
        hidden = [a for a in self.more.actions if a.help is argparse.SUPPRESS]
        if not hidden:
            return ""
        example = hidden[0].option_strings[-1]
        return f"{len(hidden)} more options, such as {example}: {self.prog} --help-all"


class More:
    """Adds options to the section of a parser that is open, for `--help-all` alone."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self.actions: list[argparse.Action] = []

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        action = self._parser.add_argument(*names, **settings)
        self.actions.append(action)
        return action


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Fills the description, and leaves the lines of the examples as they are."""

    def __init__(self, prog: str, **settings: Any) -> None:
        import shutil

        columns = min(shutil.get_terminal_size().columns, WIDTH)
        settings |= {"width": columns - 2, "max_help_position": 26}
        super().__init__(prog, **settings)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


class _HelpAll(argparse.Action):
    """Print the help with every option, and leave."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, nargs=0, default=argparse.SUPPRESS)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.print_help()
        parser.exit()


class _Help(_HelpAll):
    """Print the help without the options of `more`, and leave."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, Parser)
        parser.hide_more()
        super().__call__(parser)


class RecipeKey(argparse.Action):
    """An option that became a key of recipe files. const: how it is written there, with `{}` in the
    place of the value."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        value = "VALUE" if values is self.const else values
        example = str(self.const).replace("{}", str(value))
        raise LlmqError(
            f"{option_string} is a key of recipe files: '{example}' (see {RECIPE_PAGE})"
        )


def fold_into_recipes(parser: Parser, keys: dict[str, str]) -> None:
    """Let each of these options end with a line that names its key. keys: how the key is written,
    by option."""
    for option, key in keys.items():
        parser.add_argument(option, action=RecipeKey, const=key)
