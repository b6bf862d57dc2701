"""Something to do when another package is imported, without importing it.

wrapt's `when_imported` did the same, and took two thirds of the time of `llmq --help` to import."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, act: Callable[[], object]) -> None:
    """Call `act` as soon as the module of that name is imported; at once if it is already."""
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Watcher(name, act))


class _Watcher:
    """A finder that finds what those behind it find, and lets the loader of one module act
    afterwards."""

    def __init__(self, name: str, act: Callable[[], object]) -> None:
        self._name, self._act = name, act

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name:
            return None
        # Those behind this one: of several watchers each asks the next, and none the one before.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                self._extend(spec)
                return spec
        return None

    def _extend(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        if loader is None:
            return
        run = loader.exec_module

        def run_and_act(module: ModuleType) -> None:
            run(module)
            self._act()

        loader.exec_module = run_and_act  # type: ignore[method-assign]
