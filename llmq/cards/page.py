"""The card of a result: one for `quantize`, `qat`, `export` and `llmq.save`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.cards import base as bases
from llmq.cards.base import Base
from llmq.cards.facts import GGUF, QAT, bits_tags, bits_words, kept_of, settings, sizes, specs_of
from llmq.cards.head import CARD, render_head
from llmq.cards.losses import losses
from llmq.cards.markdown import code, plain
from llmq.cards.usage import usages

if TYPE_CHECKING:
    from jinja2 import Template

_TEXT = "text-generation"


def card(report: Mapping[str, Any], base: Base, name: str) -> str:
    """README.md of a result.

    report: of `llmq quantize` or `llmq qat`, as it is or as an export left it; or those of its keys
    that are known: format, layers (name and spec of each), engines, stored_bytes and versions at
    least. base: what it was made of. name: of the folder or file."""
    head = _head(report, base)
    specs = specs_of(report)
    page = _template().render(
        title=f"{plain(base.name)}, {bits_words(specs)}",
        origin=_origin(report, base),
        sizes=sizes(report),
        losses=losses(report, name),
        usages=usages(report["engines"], name, head["pipeline_tag"]),
        settings=settings(report),
        closing=_closing(report),
    )
    return f"{render_head(head)}{page}"


def write_card(folder: Path, report: Mapping[str, Any], base: Base, name: str) -> None:
    """Put the card of a result into its folder. name: of the folder, where it will be."""
    (folder / CARD).write_text(card(report, base, name), encoding="utf-8")


def _head(report: Mapping[str, Any], base: Base) -> dict[str, Any]:
    fmt, method = str(report["format"]), report.get("method")
    tags = base.head.get("tags", [])
    bits = bits_tags(specs_of(report))
    own = ["llmq", *["quantized"] * bool(bits), *(method or "").split("+"), fmt, *bits]
    return {
        **base.head,
        "base_model": list(base.ids) if len(base.ids) > 1 else "".join(base.ids),
        "base_model_relation": base.relation if base.ids else None,
        "library_name": library_of(report),
        # Of a folder the Hub infers it from config.json.
        "pipeline_tag": base.head.get("pipeline_tag", _TEXT if fmt == GGUF else None),
        "tags": [tag for tag in dict.fromkeys([*_listed(tags), *own]) if tag],
    }


def library_of(report: Mapping[str, Any]) -> str:
    """What the Hub's button "Use this model" goes by: transformers only where it reads the result,
    by itself or with the package that the format is named after. Of a folder in llmq's own format
    its code would fill the layers with random numbers, so that no button is better."""
    if report["format"] == GGUF:
        return GGUF
    readers = [engine["engine"] for engine in report["engines"] if engine["reads"]]
    return "transformers" if any(each.startswith("transformers") for each in readers) else "llmq"


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _origin(report: Mapping[str, Any], base: Base) -> str:
    specs, n_kept = specs_of(report), len(kept_of(report))
    n_layers = sum(specs.values())
    share = f"{n_layers} of its {n_layers + n_kept}" if n_kept else f"its {n_layers}"
    what = f"with {share} linear layers in {bits_words(specs)}" if specs else "in full precision"
    return f"{_named(base)} This is the model {what}, made with llmq {report['versions']['llmq']}."


def _named(base: Base) -> str:
    """Where the model came from, and what says so."""
    ids = " and ".join(map(code, base.ids))
    if base.named_by == bases.CACHE:
        return f"Made from {ids}, commit {code(base.revision)}."
    folder = f"Made from a local folder, {code(base.name)}"
    if base.named_by == bases.IN_CARD:
        return f"{folder}, whose card names {ids} as what it was made from."
    if base.named_by == bases.CONFIG:
        return f"{folder}, whose config.json names {ids}."
    return (
        f"Made from {code(base.name)}, which says no name on the Hub: the head of this card names "
        "no base model."
    )


def _closing(report: Mapping[str, Any]) -> str:
    if report.get("method") is None:
        return "More is not recorded: this is what is stored of it."
    if report["format"] == GGUF:
        return "The report of the run is in the folder that this file was exported from."
    command = "qat" if report["method"] == QAT else "quantize"
    return (
        "`report.json` has every setting and what became of every layer, and is a recipe, too: "
        f"`llmq {command} MODEL OUT --recipe report.json`."
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    # Markdown: what may hold marks of it is escaped where it is put together.
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    text = files("llmq.cards").joinpath("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(text)
