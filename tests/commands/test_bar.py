"""The bar of an 80-column terminal, whatever stands beside it."""

import re
import time

import pytest
from rich.console import Console

from llmq.commands.bar import BAR_WIDTH, Bar
from llmq.commands.pace import Pace

LONG = "error 1.2e-02:  q_proj [1.1e-02]  " + "k_proj 1.0e-02  " * 9
BAR = re.compile(f"[━╸╺]{{{BAR_WIDTH}}}")


@pytest.mark.parametrize("title", ["blocks", "windows"])
def test_bar_and_numbers_are_there_from_the_first_to_the_last(title, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(width=80, force_terminal=True, color_system="standard", legacy_windows=False)
    bar = Bar(title, Pace(now), console)
    frames = []
    for done in range(121):
        now += 57.0
        bar.move(done, 120, LONG if done else "")
        with console.capture() as drawn:
            console.print(bar.progress.get_renderable())
        frames.append(re.sub(r"\x1b\[[0-9;]*m", "", drawn.get()))
    for done, frame in enumerate(frames):
        assert frame.count("\n") == 1
        assert len(frame.rstrip("\n")) <= 80
        assert frame.startswith(title)
        assert BAR.search(frame), frame
        assert f"{done:>3}/120" in frame
    assert "0 s so far" in frames[0]
    assert "about 113 min" not in frames[1]
    assert "about 1 h 53 min left error 1.2e-02:" in frames[1]
    assert "about 57 s left" in frames[119]
    assert "in all" in frames[120]
