"""The documentation that every Python carries: English prose that nobody has to download.

It is the topics of the language reference (what `help()` shows) and the docstrings of the standard
library. Sources of programs, which are there as well, calibrate a model of natural language badly:
figures in the README of `llmq/ptq`. The text differs a little between Python versions; each result
carries the hash of its tokens."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from llmq.text.corpus import modules, split_of

DOCUMENTATION = "python-docs"
LEAST_CHARACTERS = 200  # of a docstring that says more than its function's name


@cache
def documentation_documents(*, is_evaluation: bool = False) -> tuple[str, ...]:
    """One document per topic, and one per module with its docstrings. is_evaluation: the docstrings
    of the modules that the bundled text holds back for evaluation, and nothing else; without, all
    the others."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [name for name in sorted(modules(root)) if (split_of(name) == "eval") == is_evaluation]
    seen: set[str] = set()
    documents = [] if is_evaluation else topics_of_the_language()
    for name in names:
        texts = [text for text in _docstrings(root / name) if text not in seen]
        seen.update(texts)
        if texts:
            documents.append("\n\n".join(texts))
    return tuple(documents)


def topics_of_the_language() -> list[str]:
    """What `help()` says of the language, one document per topic."""
    from pydoc_data.topics import topics  # half a megabyte

    return [topics[name] for name in sorted(topics)]


def _docstrings(path: Path) -> Iterator[str]:
    """Those of a module, its classes and its functions that are long enough."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError):  # templates of code that lie beside it
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= LEAST_CHARACTERS:
                yield text
