"""How long something still takes, by the mean of what was done so far."""

from __future__ import annotations

from dataclasses import dataclass


def duration(seconds: float) -> str:
    """A time as people say it: `12 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def rough_duration(seconds: float) -> str:
    """The same of an estimate, which is no better than this: `12 s`, `3 min`, `2.1 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@dataclass
class Pace:
    """Steps and their times, in seconds of one clock. What the first report calls done was done
    before."""

    started: float
    n_before: int | None = None
    n_done: int = 0
    n_total: int = 0
    last: float = 0.0

    def report(self, n_done: int, n_total: int, now: float) -> None:
        """n_done of n_total steps are done now."""
        if self.n_before is None:
            self.n_before, self.started = n_done, now
        self.n_done, self.n_total, self.last = n_done, n_total, now

    def seconds_left(self, now: float) -> float | None:
        """None before the first step is done."""
        n_steps = self.n_done - (self.n_before or 0)
        if n_steps <= 0:
            return None
        at_last_step = (self.last - self.started) / n_steps * (self.n_total - self.n_done)
        return max(0.0, at_last_step - (now - self.last))

    def says(self, now: float) -> str:
        """The time left, or where that is not known, or nothing is left, the time that passed."""
        passed = duration(now - self.started)
        left = self.seconds_left(now)
        if left is None:
            return f"{passed} so far"
        return f"{passed} in all" if self.n_done >= self.n_total else f"about {duration(left)} left"
