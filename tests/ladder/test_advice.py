"""The smallest rung within a bound, found with as few measurements as it takes."""

import pytest

from llmq.ladder.advice import advise
from llmq.ladder.bench import Point
from llmq.ladder.rungs import Rung
from llmq.ladder.training import Trained

SPECS = ("w8", "w4g128", "w3g128", "w2g64-asym")
LOSSES = {
    "w8": {"rtn": 0.0, "gptq": 0.0, "blockwise": 0.0},
    "w4g128": {"rtn": 0.03, "gptq": 0.008, "blockwise": 0.008},
    "w3g128": {"rtn": 0.4, "gptq": 0.05, "blockwise": 0.03},
    "w2g64-asym": {"rtn": 3.0, "gptq": 0.6, "blockwise": 0.4},
}


def point(rung, loss, spread=0.001):
    size = 1000 - SPECS.index(rung.spec)
    return Point(rung, size, loss, (loss - spread, loss + spread), loss, None, 1.0)


def advised(bound, **options):
    asked = []

    def measure(rung):
        asked.append(str(rung))
        return point(rung, LOSSES[rung.spec][rung.method])

    return advise(measure, bound, specs=SPECS, **options), asked


def test_cheap_methods_first_and_dear_ones_where_they_could_help():
    found, asked = advised(0.01)
    assert str(found.best.rung) == "w4g128:gptq"
    assert str(found.failed.rung) == "w3g128:rtn"
    assert asked == ["w8:rtn", "w4g128:rtn", "w4g128:gptq", "w3g128:rtn"]
    assert set(found.left) == {"w3g128:gptq", "w3g128:blockwise"}
    assert "loses 40.00%, which adds 0.336 to" in found.left["w3g128:gptq"]
    assert "more than 12 times the bound's 0.00995" in found.left["w3g128:gptq"]
    assert "more than 20 times the bound's 0.00995" in found.left["w3g128:blockwise"]


def test_gptq_is_tried_where_it_may_leave_a_tenth_of_what_rounding_loses():
    losses = {"rtn": 0.5, "gptq": 0.045}
    found = advise(lambda rung: point(rung, losses[rung.method]), 0.05, specs=SPECS[1:2])
    assert str(found.best.rung) == "w4g128:gptq"


def test_large_losses_are_compared_by_their_logarithms():
    """A perplexity of six times full precision's, of which block-wise tuning leaves 1.14."""
    losses = {"rtn": 5.2, "gptq": 0.21, "blockwise": 0.14}
    found = advise(lambda rung: point(rung, losses[rung.method]), 0.2, specs=SPECS[2:3])
    assert [str(each.rung) for each in found.points][1:] == ["w3g128:gptq", "w3g128:blockwise"]


def test_a_method_that_cannot_help_is_passed_over_for_one_that_can():
    losses = {"rtn": 0.45, "gptq": 0.06, "blockwise": 0.018}
    found = advise(lambda rung: point(rung, losses[rung.method]), 0.02, specs=SPECS[1:2])
    assert str(found.best.rung) == "w4g128:blockwise"
    assert set(found.left) == {"w4g128:gptq"}


def test_the_upper_end_of_the_interval_decides():
    assert str(advised(0.008)[0].best.rung) == "w8:rtn"
    assert str(advised(0.0091)[0].best.rung) == "w4g128:gptq"


def test_the_dearest_method_that_holds_it():
    found, asked = advised(0.04)
    assert str(found.best.rung) == "w3g128:blockwise"
    assert "w3g128:gptq" in asked
    assert str(found.failed.rung) == "w2g64-asym:rtn"


def test_what_is_not_the_best_is_dropped_as_it_shows():
    dropped = []
    found, _ = advised(0.06, drop=lambda rung: dropped.append(str(rung)))
    assert str(found.best.rung) == "w3g128:gptq"
    assert dropped == ["w8:rtn", "w3g128:rtn", "w4g128:rtn", "w2g64-asym:rtn"]


def test_nothing_holds_it_and_everything_does():
    found, asked = advised(0.0005)
    assert (found.best, found.failed.rung.spec) == (None, "w8")
    assert asked == ["w8:rtn", "w8:gptq", "w8:blockwise"]
    found, _ = advised(5.0)
    assert (str(found.best.rung), found.failed) == ("w2g64-asym:rtn", None)


@pytest.mark.parametrize(
    ("loss", "remark"),
    [
        (0.09, "to 9.00%, which is within the bound: QAT is worth it"),
        (0.4, "to 40.00%, 40% of what is too much: a longer run is worth it"),
        (0.58, "to 58.00%, 4% of what is too much: not worth a longer run"),
    ],
)
def test_whether_training_is_worth_it(loss, remark):
    rung = Rung("w2g64-asym", "gptq")
    trained = Trained(point(rung, 0.6), point(rung, loss), 20, 0.1)
    assert trained.remark.endswith(remark)
    assert trained.to_json()["steps"] == 20
