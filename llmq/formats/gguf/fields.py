"""The fields of a file, asked for by key and checked before anything acts on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmq.errors import LlmqError

MAX_COUNT = 1 << 24  # of anything that a model has: layers, columns, tokens


@dataclass(frozen=True)
class Fields:
    """values: by key. where: the file, for messages. prefix: before the keys of a model."""

    values: dict[str, Any]
    where: object
    prefix: str = ""

    def of(self, prefix: str) -> Fields:
        """The same for keys behind a prefix."""
        return Fields(self.values, self.where, f"{prefix}.")

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number from 0 up."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
            raise self.wrong(key, value, f"a whole number from 0 to {MAX_COUNT}")
        return value

    def maybe_count(self, key: str) -> int | None:
        """A whole number, or None where there is none."""
        return self.count(key) if self._has(key) else None

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) < float("inf"):
            raise self.wrong(key, value, "a finite number")
        return float(value)

    def maybe_real(self, key: str) -> float | None:
        """A finite number, or None where there is none."""
        return self.real(key) if self._has(key) else None

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a text")
        return value

    def maybe_text(self, key: str) -> str | None:
        return self.text(key) if self._has(key) else None

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def list_of(self, key: str, kind: type | tuple[type, ...]) -> list[Any]:
        """A list whose elements are of one type; empty where there is none."""
        value = self.values.get(self.prefix + key, [])
        if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
            raise self.wrong(key, value, "a list of one type")
        return value

    def get(self, key: str) -> Any:
        """Whatever is there, or None."""
        return self.values.get(self.prefix + key)

    def _has(self, key: str) -> bool:
        return self.prefix + key in self.values

    def _get(self, key: str, default: Any) -> Any:
        return self.values.get(self.prefix + key, default)

    def wrong(self, key: str, value: object, expected: str) -> LlmqError:
        """The error for a value that cannot be used."""
        found = "nothing" if value is None else repr(value)[:80]
        return LlmqError(
            f"{self.where}: field {self.prefix}{key} holds {found}, expected {expected}; the file "
            "is damaged, or of a model that llmq does not read"
        )
