"""What no other point beats, and how it is shown."""

from llmq.ladder import pareto
from llmq.ladder.bench import Point
from llmq.ladder.rungs import Rung


def point(spec, method, n_bytes, kl, loss=0.1):
    ends = (0.9 * kl, 1.1 * kl)
    return Point(Rung(spec, method), n_bytes, loss, (0.05, 0.15), kl, ends, 2.0)


POINTS = [
    point("w8", "rtn", 8_000_000, 0.001),
    point("w4g128", "rtn", 4_000_000, 0.2),
    point("w4g128", "gptq", 4_000_000, 0.1),
    point("w4g64", "rtn", 4_100_000, 0.15),  # larger than the one before, and worse
    point("w2g64-asym", "gptq", 2_000_000, 0.9),
]


def test_the_front():
    found = [str(each.rung) for each in pareto.front(POINTS)]
    assert found == ["w2g64-asym:gptq", "w4g128:gptq", "w8:rtn"]


def test_the_table():
    head, _, *rows = pareto.markdown(POINTS).splitlines()
    assert head.startswith("| weights | method | MB |")
    assert rows[0] == (
        "| **w8** | rtn | 8.0 | +10.00% (+5.00% to +15.00%) | 0.0010 (0.0009 to 0.0011) | 2 |"
    )
    assert [row.split("|")[1].strip() for row in rows] == [
        "**w8**",
        "w4g64",
        "w4g128",
        "**w4g128**",
        "**w2g64-asym**",
    ]


def test_the_page_has_every_point():
    text = pareto.page(POINTS, "a <model>")
    assert "a &lt;model&gt;" in text
    assert text.count("<circle") == text.count("<tr><td>") == len(POINTS)
    assert text.count("<b>w") == 3


def test_the_picture(tmp_path):
    pareto.plot(POINTS, "a model", tmp_path / "sweep.svg")
    text = (tmp_path / "sweep.svg").read_text()
    assert "weight files, MB" in text
    assert text.count("w4g128") == 2
