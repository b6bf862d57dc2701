"""Pictures beside text: what a row of a data set says of them, and opening one.

A picture lies in a file whose path is relative to that of the rows, or in the row itself, as
`{"bytes": ..., "path": ...}` as datasets stores it or as an image of Pillow. Files of others come
in here: few formats are decoded, none by a program of its own, and what would take much memory is
refused by the size that its header states."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError
from llmq.storage.boundary import check_regular, reading

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 1 << 26  # 8192 x 8192: 200 MB as RGB
_REMEDY = f"give {', '.join(FORMATS)}, or leave the row out"


def check_pillow(where: str) -> None:
    """Raise `LlmqError` where nothing opens pictures. where: what has some."""
    if find_spec("PIL") is None:
        raise LlmqError(f"{where}: has pictures, which take Pillow to open: pip install pillow")


@dataclass(frozen=True)
class Picture:
    """content: encoded bytes, a path, or an image of Pillow. where: the row, for messages."""

    content: Any
    where: str

    def open(self) -> Any:
        """The picture as Pillow has it, upright and in RGB; of several frames the first. Raises
        `LlmqError` that names row and file."""
        check_pillow(self.where)
        from PIL import Image, ImageOps

        with reading(self._name, "no picture that can be opened", _REMEDY):
            if isinstance(self.content, Image.Image):
                self._check_size(self.content.size)
                image = self.content
            else:
                image = Image.open(io.BytesIO(self._bytes()), formats=FORMATS)
                self._check_size(image.size)
            upright = ImageOps.exif_transpose(image)
            return (upright or image).convert("RGB")

    def digest(self) -> str:
        """sha256 of what is decoded, to tell whether it is still the same."""
        if isinstance(self.content, bytes | Path):
            return hashlib.sha256(self._bytes()).hexdigest()
        return hashlib.sha256(self.content.tobytes()).hexdigest()

    @property
    def _name(self) -> str:
        named = f": {self.content}" if isinstance(self.content, Path) else ""
        return f"{self.where}{named}"

    def _bytes(self) -> bytes:
        if isinstance(self.content, bytes):
            return self.content
        check_regular(self.content)
        path: Path = self.content
        with reading(self._name, "no picture that can be opened", "check the path"):
            n_bytes = min(path.stat().st_size, MAX_FILE_BYTES + 1)
            data = path.read_bytes() if n_bytes <= MAX_FILE_BYTES else bytes(n_bytes)
        if len(data) > MAX_FILE_BYTES:
            raise LlmqError(f"{self._name}: larger than {MAX_FILE_BYTES} bytes; {_REMEDY}")
        return data

    def _check_size(self, size: tuple[int, int]) -> None:
        width, height = size
        if width * height > MAX_PIXELS:
            raise LlmqError(
                f"{self._name}: {width} x {height} pixels, more than the {MAX_PIXELS} that are "
                "decoded; give a smaller picture"
            )


def pictures_of(value: Any, folder: Path | None, where: str) -> Iterator[Picture]:
    """The pictures of one field of a row: one or a list of them, None for none. folder: that paths
    are relative to. Raises `LlmqError` for anything else."""
    if value is None:
        return
    if isinstance(value, list | tuple):
        for each in value:
            yield from pictures_of(each, folder, where)
        return
    yield Picture(_content(value, folder, where), where)


def _content(value: Any, folder: Path | None, where: str) -> Any:
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    path = value.get("path") if isinstance(value, dict) else value
    if isinstance(path, str) and path:
        if "://" in path or folder is None:
            raise LlmqError(f"{where}: {path}: a picture that is not here; store it in a file")
        return folder / path
    if hasattr(value, "tobytes") and hasattr(value, "convert"):
        return value  # an image of Pillow
    raise LlmqError(
        f"{where}: expected a picture, got {type(value).__name__}; give the path of a file, or "
        "{'bytes': ..., 'path': ...}"
    )


def count_pictures(value: Any) -> int:
    """How many pictures a field holds, whatever they are."""
    if isinstance(value, list | tuple):
        return sum(map(count_pictures, value))
    return int(value is not None)
