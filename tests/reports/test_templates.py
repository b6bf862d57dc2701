"""One look for all pages."""

import pytest
from jinja2 import UndefinedError

from llmq.reports import templates


def test_pages_share_their_head():
    page = templates.render("sweep.html", title="a <model>", picture="", rows=[], best=[])
    assert page.startswith("<!doctype html>")
    assert "<title>a &lt;model&gt;</title>" in page
    assert "prefers-color-scheme: dark" in page
    assert page.rstrip().endswith("</html>")


def test_a_value_that_is_missing_is_no_empty_place():
    with pytest.raises(UndefinedError, match="picture"):
        templates.render("sweep.html", title="a model", rows=[], best=[])


def test_bytes_for_people():
    assert templates.megabytes(1_234_567_890) == "1,234.6 MB"
