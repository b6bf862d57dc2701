"""The parser that every command has: its errors are one line, its help shows what most people need,
and an option that became a key of recipe files names that key.

`--help` shows the options that `add_argument` adds, `--help-all` those of the group `more`, too."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from llmq.errors import LlmqError

RECIPE_PAGE = "llmq/recipes/README.md"


class Parser(argparse.ArgumentParser):
    """Raises its errors, so that bad usage is reported like bad input: one line, and as JSON where
    that was asked for. more: the group of options that few people need."""

    def __init__(self, **settings: Any) -> None:
        settings["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(**settings, add_help=False)
        self.add_argument("-h", "--help", action=_Help, help="show this and exit")
        self.more = self.add_argument_group("more options")

    def error(self, message: str) -> NoReturn:
        raise LlmqError(f"{message.removeprefix('argument ')}; see '{self.prog} --help'")

    def add_help_all(self) -> None:
        """The option that shows the group `more`, too."""
        self.add_argument("--help-all", action=_HelpAll, help="show every option and exit")

    def hide_more(self) -> None:
        """Leave the group `more` out of help and usage."""
        names = [action.option_strings[-1] for action in self._of_more()]
        for action in self._of_more():
            action.help = argparse.SUPPRESS
        if names:
            self.epilog = f"{len(names)} more options, such as {names[0]}: {self.prog} --help-all"

    def _of_more(self) -> list[argparse.Action]:
        actions = self.more._group_actions
        return [action for action in actions if action.help is not argparse.SUPPRESS]


class _HelpAll(argparse.Action):
    """Print the help with every option, and leave."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, nargs=0, default=argparse.SUPPRESS)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.print_help()
        parser.exit()


class _Help(_HelpAll):
    """Print the help without the group `more`, and leave."""

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
