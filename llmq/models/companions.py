"""What belongs to a checkpoint beside its weights, and goes where they go: tokenizer, processor,
chat templates, generation config, licence and notices, and the code that `auto_map` names.

What is copied is known by its kind; everything else stays behind and is listed, with the reason.
Pickles, indexes, quantization settings and the source's README never come along: the first can run
code, the others describe the source. Code is copied as text and never run; an `auto_map` entry
whose code is not there is dropped, since it would refer to nothing."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llmq.models.identity import without_places
from llmq.storage.files import real_path, unwritable

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "encoder.json",
    "merges.txt",
    "bpe.codes",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.json",
    "chat_template*.jinja",
    "additional_chat_templates/*.jinja",
)
OTHERS = (
    "generation_config.json",
    "processor_config.json",
    "*preprocessor_config.json",
    "*image_processor_config.json",
    "*feature_extractor_config.json",
)
_LEGAL = re.compile(
    r"(.*[-_. ])?"
    r"(licen[sc]es?|copying|copyright|notices?|(acceptable[-_ ])?use[-_ ]policy)"
    r"([-_. ].*)?",
    re.IGNORECASE,
)
_TEXT_SUFFIXES = ("", ".txt", ".md", ".rst", ".html", ".pdf")
_TEMPLATES = "additional_chat_templates"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".msgpack", ".h5")
_SETTINGS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
MAX_BYTES = 256 * 1024 * 1024  # of one file: the largest tokenizers have a tenth of it
MAX_LISTED = 1000


@dataclass
class Companions:
    """files: what is copied, relative to the folder. left_behind: everything else, with the reason.
    dropped: references of `auto_map` whose code is not there."""

    files: list[str] = field(default_factory=list)
    left_behind: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def to_json(self) -> dict[str, Any]:
        return {
            "companions": sorted(self.files),
            "left_behind": dict(sorted(self.left_behind.items())),
            "dropped_auto_map": sorted(self.dropped),
        }

    def adapt(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config without the `auto_map` entries that are dropped."""
        auto_map = config.get("auto_map")
        if not self.dropped or not isinstance(auto_map, dict):
            return config
        kept = {
            name: value for name, value in auto_map.items() if self.dropped.isdisjoint(_refs(value))
        }
        rest = {key: value for key, value in config.items() if key != "auto_map"}
        return {**rest, "auto_map": kept} if kept else rest


def find_companions(source_dir: Path, weights: Collection[str] = ()) -> Companions:
    """What comes along from a folder. weights: names of files whose tensors were read."""
    found = Companions()
    for path in islice(_entries(source_dir), MAX_LISTED):
        name = path.relative_to(source_dir).as_posix()
        if name == "config.json" or name in weights:
            continue
        reason = _reason(name) or _unfit(path, source_dir)
        if reason is None:
            found.files.append(name)
        else:
            found.left_behind[name + "/" * path.is_dir()] = reason
    for reference in _references(source_dir, found.files):
        modules = _code(source_dir, reference)
        if modules is None:
            found.dropped.add(reference)
            continue
        for name in modules:
            found.left_behind.pop(name, None)
            if name not in found.files:
                found.files.append(name)
    return found


def copy_companions(
    source_dir: Path,
    target_dir: Path,
    weights: Collection[str] = (),
    *,
    tokenizer: bool = True,
) -> Companions:
    """Copy what comes along and say what does not. tokenizer: its files, too. Raises `WriteError`
    when the disk is full."""
    found = find_companions(source_dir, weights)
    if not tokenizer:
        found.files = [name for name in found.files if not _matches(name, TOKENIZER)]
    for name in found.files:
        target = target_dir / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if (data := _adapted(source_dir / name, found)) is None:
                shutil.copyfile(source_dir / name, target)
            else:
                target.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
        except OSError as error:
            raise unwritable(target, error.strerror or error) from None
    return found


def _entries(source_dir: Path) -> Iterator[Path]:
    """Files and folders of a folder, and the templates of the one folder that is known."""
    for path in sorted(source_dir.iterdir()):
        if path.name == _TEMPLATES and path.is_dir() and not path.is_symlink():
            yield from sorted(path.iterdir())
        else:
            yield path


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in patterns
    )


def _reason(name: str) -> str | None:
    """Why a file does not come along, by its name, or None."""
    suffix = Path(name).suffix.lower()
    if suffix in _PICKLES:
        return "pickled or binary weights, which may run code when they are read"
    if _matches(name, (*TOKENIZER, *OTHERS)):
        return None
    if "/" not in name and suffix in _TEXT_SUFFIXES and _LEGAL.fullmatch(name):
        return None
    lower = name.lower()
    if lower.startswith("readme"):
        return "the source's own card; the output has another"
    if lower.endswith(".index.json"):
        return "an index of the source's weight files"
    if lower in _SETTINGS:
        return "quantization settings of the source"
    if suffix in (".safetensors", ".gguf"):
        return "weights that were not read"
    if suffix == ".py":
        return "code that no auto_map names"
    return "not known to belong to a checkpoint"


def _unfit(path: Path, source_dir: Path) -> str | None:
    """Why a file of a kind that comes along does not, or None."""
    if not path.is_file():
        return "not a file"
    if not real_path(path).is_relative_to(_root(source_dir)):
        return "a link that leads out of the folder; put the file itself there"
    if path.stat().st_size > MAX_BYTES:
        return f"larger than {MAX_BYTES // 1024**2} MB"
    return None


def _root(source_dir: Path) -> Path:
    """Where links may lead: inside the folder, and in the Hub's cache to the blobs beside it."""
    source_dir = real_path(source_dir)
    in_cache = source_dir.parent.name == "snapshots" and source_dir.parent.parent.name.startswith(
        "models--"
    )
    return source_dir.parent.parent if in_cache else source_dir


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _refs(value: Any) -> list[str]:
    """The references of one entry of `auto_map`, which for tokenizers is a pair."""
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, str)]


def _references(source_dir: Path, names: Collection[str]) -> list[str]:
    """Every reference to code of this folder in its configs: "module.Class". Those of the form
    "OWNER/NAME--module.Class" lie elsewhere and stay as they are."""
    found: dict[str, None] = {}
    for name in ("config.json", *(name for name in names if name.endswith("_config.json"))):
        data = _read_json(source_dir / name)
        auto_map = data.get("auto_map") if isinstance(data, dict) else None
        for value in auto_map.values() if isinstance(auto_map, dict) else ():
            found |= dict.fromkeys(each for each in _refs(value) if "--" not in each)
    return list(found)


def _code(source_dir: Path, reference: str) -> list[str] | None:
    """The files of a reference and of what they import from beside them, or None where one is not
    there."""
    module, _, _ = reference.rpartition(".")
    waiting, found = [module.replace(".", "/") + ".py"], list[str]()
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = source_dir / name
        if (
            not re.fullmatch(r"[\w/]+\.py", name)
            or name.startswith("/")
            or _unfit(path, source_dir)
        ):
            return None
        found.append(name)
        imported = _relative_imports(path)
        if imported is None:
            return None
        waiting += [(Path(name).parent / each).as_posix() for each in imported]
    return found


def _relative_imports(path: Path) -> list[str] | None:
    """Files that a module imports from beside itself, or None for text that is no Python."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            found += [module.replace(".", "/") + ".py" for module in modules]
    return found


def _adapted(path: Path, found: Companions) -> Any:
    """A JSON file without paths of the machine it comes from and without references to code that is
    not there, or None where it can be copied as it is."""
    if not path.name.endswith("_config.json"):
        return None
    data = _read_json(path)
    if not isinstance(data, dict):
        return None
    adapted = found.adapt(without_places(data))
    return None if adapted == data else adapted
