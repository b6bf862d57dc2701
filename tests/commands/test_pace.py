"""How long something still takes, and how that is said."""

import pytest

from llmq.commands.pace import Pace, duration


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "0 s"), (99, "99 s"), (200, "3 min 20 s"), (61.6 * 60, "61 min 36 s"),
     (2.1 * 3600, "2 h 06 min")],
)  # fmt: skip
def test_times_are_said_shortly(seconds, expected):
    assert duration(seconds) == expected


def test_the_time_left_goes_by_all_steps_since_the_first_report():
    pace = Pace(started=0.0)
    assert (pace.seconds_left(3.0), pace.says(3.0)) == (None, "3 s so far")
    pace.report(4, 10, 100.0)  # four blocks of an earlier run
    assert pace.seconds_left(130.0) is None
    pace.report(5, 10, 140.0)
    assert pace.says(140.0) == "about 3 min 20 s left"
    assert pace.seconds_left(150.0) == 190.0  # and it passes between two steps
    assert pace.seconds_left(900.0) == 0.0
    pace.report(10, 10, 300.0)
    assert pace.says(300.0) == "3 min 20 s in all"
