"""Text in a folder, of whichever kind: one written by `save_to_disk` of datasets, a clone of a data
set of the Hub (with `data/`, splits and configurations), or files that somebody put together."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError
from llmq.storage.boundary import check_folder, check_regular, reading
from llmq.text.address import Address, Purpose, choose_split
from llmq.text.files import READERS, TEXT_SUFFIXES, add_file, kind_of
from llmq.text.rows import Documents, layout_of

_REMEDY = "check its permissions"
# What libraries put beside data, which is none.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def add_folder(documents: Documents, address: Address, purpose: Purpose) -> dict[str, Any]:
    """Collect the documents of a folder, and return what was chosen of it: configuration, split,
    number of files. Raises `LlmqError` where there is nothing to read or too much to choose
    from."""
    folder = Path(address.name)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _add_saved(documents, folder, address, purpose)
    with reading(folder, "not a folder that can be listed", _REMEDY):
        paths = _files(folder)
    for path in paths:
        check_regular(path)
    rows = [path for path in paths if kind_of(path) in READERS]
    everything = [path for path in paths if path.suffix != ".md"] if rows else paths
    chosen: dict[str, Any] = {}
    if _is_of_one_format(rows) or address.config or address.split:
        chosen, paths = _of_split(folder, address, purpose)
    if not chosen:
        paths = everything  # beside rows .md files are cards, not data
    if not paths:
        raise LlmqError(f"{folder}: no .txt, .md, .jsonl or .parquet file in this folder")
    for path in paths:
        add_file(documents, path)
    return {**chosen, "files": len(paths), "files_left_out": len(everything) - len(paths)}


def _files(folder: Path) -> list[Path]:
    """The files with text of a folder and the folders in it, hidden ones left out, by path."""
    found = []
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith(".") for part in parts)
        is_text = path.suffix in TEXT_SUFFIXES or kind_of(path) in READERS
        if is_text and not is_hidden and path.name not in _NOT_DATA and not path.is_dir():
            found.append(path)
    return sorted(found)


def _is_of_one_format(rows: Sequence[Path]) -> bool:
    """Whether the files can be those of a data set with splits. Files of several formats are a
    collection, and all of them are read."""
    return len({kind_of(path).removesuffix(".gz").rstrip("l") for path in rows}) == 1


def _of_split(
    folder: Path, address: Address, purpose: Purpose
) -> tuple[dict[str, Any], list[Path]]:
    """Configuration and split that are chosen, and their files, as datasets tells them from names
    or from the card; nothing where there is nothing to choose between."""
    from datasets import get_dataset_config_names, load_dataset_builder

    problem = "datasets cannot tell its configurations and splits"
    remedy = "give one of its files"
    with quiet(), reading(folder, problem, remedy), tempfile.TemporaryDirectory() as cache:
        names = get_dataset_config_names(str(folder))
        if address.config and address.config not in names and not address.split:
            address = replace(address, config=None, split=address.config)  # FOLDER:SPLIT
        if address.config is None and len(names) > 1:
            raise which_config(address, names)
        builder = load_dataset_builder(str(folder), address.config, cache_dir=cache)
        files = {str(split): list(paths) for split, paths in builder.config.data_files.items()}
    if len(files) < 2 and not address.config and not address.split:
        return {}, []
    split = choose_split(address, sorted(files), purpose, str(folder))
    if split is None:
        raise LlmqError(f"{folder}: no .jsonl or .parquet file in this folder")
    chosen = {"config": address.config, "split": split}
    return chosen, [Path(path) for path in files[split]]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and remarks that datasets and its parts write to stderr."""
    import datasets

    logger = logging.getLogger("huggingface_hub")
    level, had_bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


def which_config(address: Address, names: Sequence[str]) -> LlmqError:
    """The error for a data set of which a configuration has to be named."""
    more = ", ..." if len(names) > 8 else ""
    return LlmqError(
        f"{address.name}: has the configurations {', '.join(names[:8])}{more}; name one, such as "
        f"{address.name}:{names[0]}"
    )


def _add_saved(
    documents: Documents, folder: Path, address: Address, purpose: Purpose
) -> dict[str, Any]:
    """Rows of a folder that `save_to_disk` wrote."""
    from datasets import DatasetDict, load_from_disk

    if address.config and not address.split:
        address = replace(address, config=None, split=address.config)  # FOLDER:SPLIT
    problem = "not readable as a data set that save_to_disk wrote"
    check_folder(folder)
    with reading(folder, problem, "write it again, or give a .jsonl or .parquet file"):
        data = load_from_disk(str(folder))
        split = None
        if isinstance(data, DatasetDict):
            split = choose_split(address, list(data), purpose, str(folder))
            data = data[split or ""]
        elif address.split is not None:
            raise LlmqError(f"{folder}: holds one data set without splits; leave out the split")
        layout = layout_of(data.column_names, documents.column)
        if layout is not None:  # nothing else of the rows is read
            data = data.select_columns(layout.read)
        rows = data if layout is None or layout.pictures is None else _undecoded(data)
        documents.add(rows, str(folder), folder)
    return {"config": None, "split": split, "files": 1}


def _undecoded(data: Any) -> Iterator[dict[str, Any]]:
    """The rows of a data set with pictures as they are stored."""
    for table in data.with_format("arrow").iter(batch_size=64):
        yield from table.to_pylist()
