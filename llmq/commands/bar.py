"""The bar that a terminal shows, which fits in 80 columns whatever the remark."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from llmq.commands.pace import Pace

BAR_WIDTH = 20


class _Left(ProgressColumn):
    """The time left. rich's own knows only the last 30 seconds, less than many a block takes."""

    max_refresh = 0.5

    def __init__(self, pace: Pace) -> None:
        super().__init__(Column(no_wrap=True))
        self._pace = pace

    def render(self, task: Task) -> Text:
        now = self._pace.last if task.finished else time.monotonic()
        return Text(self._pace.says(now), style="progress.remaining")


class Bar:
    """A bar, to be seen once it is known of how many."""

    def __init__(self, title: str, pace: Pace, console: Console) -> None:
        remark = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self._pace = pace
        self.progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(BAR_WIDTH, table_column=Column(min_width=BAR_WIDTH)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            _Left(pace),
            TextColumn("{task.fields[remark]}", markup=False, table_column=remark),
            console=console,
            expand=True,
        )
        self._task = self.progress.add_task(title, visible=False, remark="")

    def move(self, done: int, total: int, remark: str = "") -> None:
        """Show what is done."""
        self._pace.report(done, total, time.monotonic())
        self.progress.update(self._task, completed=done, total=total, visible=True, remark=remark)


@contextmanager
def drawn(title: str, pace: Pace, console: Console) -> Iterator[Bar]:
    """A bar that stays, as it was last, when it is done."""
    bar = Bar(title, pace, console)
    with bar.progress:
        yield bar
