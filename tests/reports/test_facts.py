"""What a page tells, from what was measured."""

import math

import pytest

from llmq.reports import facts


def layer(name, error, **more):
    return {"name": name, "spec": "w4g128", "error": error, "n_bytes": 100, **more}


def test_errors_by_kind_and_block():
    found = facts.error_map(
        [
            layer("model.layers.0.mlp.up_proj", 1e-4, rtn_error=2e-4),
            layer("model.layers.1.mlp.up_proj", 1e-2),
            layer("model.layers.1.mlp.experts.0.down_proj", 1e-3),
            layer("model.layers.1.mlp.experts.1.down_proj", 3e-3),
        ]
    )
    assert found.blocks == ["0", "1"]
    (up, cells), (down, others) = found.rows
    assert (up, down) == ("mlp.up_proj", "mlp.experts.*.down_proj")
    assert [cell.shade for cell in cells] == [0, facts.SHADES - 1]
    assert cells[0].title.endswith("w4g128: 1.00e-04, plain rounding 2.00e-04")
    assert [cell.shade for cell in others] == [None, round(math.log(20, 100) * 8)]
    assert others[1].title.startswith("2 like model.layers.1.mlp.experts.0.down_proj")


def test_without_errors_there_is_no_map():
    assert facts.error_map([layer("model.layers.0.mlp.up_proj", None)]) is None
    weights = layer("model.layers.0.mlp.up_proj", None, weight_error=1e-3)
    assert facts.error_map([weights]).largest == 1e-3


def test_errors_that_are_no_numbers_are_the_darkest():
    names = [f"model.layers.{index}.up" for index in range(4)]
    errors = (1e-4, 1e-2, math.inf, math.nan)
    found = facts.error_map([layer(*each) for each in zip(names, errors, strict=True)])
    ((_, cells),) = found.rows
    assert [cell.shade for cell in cells] == [0, 8, 8, 8]
    assert found.largest == 1e-2


def test_bytes_add_up():
    report = {
        "layers": [layer("model.layers.0.up", 0.1), layer("model.layers.1.up", 0.1)],
        "outside": [{"name": "model.embed_tokens", "n_bytes": 500}],
        "stored_bytes": 1000,
    }
    found = dict(facts.parts(report))
    assert found.pop("as in the source: embeddings, norms, what is kept") == 300
    assert found == {"model.embed_tokens": 500, "up": 200}
    assert [n_bytes for _, n_bytes in facts.parts(report)] == [500, 300, 200]


def test_losses_in_percent_with_their_intervals():
    figures = {
        "base_perplexity": 10.0,
        "quant_perplexity": 10.5,
        "perplexity_ratio": 1.05,
        "perplexity_ratio_ci95": [1.04, 1.06],
        "kl_mean": 0.02,
        "kl_mean_ci95": None,
    }
    held_out = {"kind": "calibration", "source": "a book", "windows": [8, 256], **figures}
    missing = {"kind": "other", "source": "x", "not_measured": "too short"}
    compared = {**figures, "data": "b.txt", "windows": 3, "sequence_length": 128}
    first, second = facts.losses({"held_out": [held_out, missing]}, compared)
    assert (first.text, second.text) == ("held-out text: a book", "compared on b.txt")
    assert first.change.value == pytest.approx(5)
    assert first.change.interval == pytest.approx((4, 6))
    assert (first.kl.interval, second.windows) == (None, "3 x 128")


def test_layers_that_differ_alike_are_one_remark():
    notes = {f"model.layers.{index}.mlp.up_proj": "in groups of 64" for index in range(30)}
    assert facts.remarks({"notes": notes}) == [
        "30 layers, model.layers.*.mlp.up_proj: in groups of 64."
    ]


def test_what_is_unusual_is_remarked():
    report = {
        "n_dead_columns": 3,
        "n_dropped_rows": 0,
        "kept_layers": ["a", "b", "c", "d", "e"],
        "notes": {"source": "read from FP8"},
        "shipped": "start",
    }
    dead, kept, note, start = facts.remarks(report)
    assert dead == "3 columns never saw an input."
    assert kept == "5 stay in full precision: a, b, c and 2 more."
    assert note == "source: read from FP8."
    assert "did not beat its start" in start


def test_settings_are_flat_and_say_something():
    recipe = {
        "rules": [["*", {"code": "int4", "group_size": 64}], ["*.x", None]],
        "activations": {"kind": "none", "kv_bits": None},
        "head": None,
    }
    assert facts.settings({"recipe": recipe, "versions": {"torch": "2.13"}}) == [
        ("rule *", "code int4, group_size 64"),
        ("rule *.x", "kept"),
        ("activations.kind", "none"),
        ("torch", "2.13"),
    ]


def test_panels_of_a_training_log():
    log = [
        {"step": 1, "ce": 3.0, "kl": 0.5, "flip_rate": 0.1},
        {"step": 2, "ce": 2.5, "kl": 0.4, "held_out_perplexity": math.e**2},
    ]
    report = {"held_out": {"full_precision": {"perplexity": math.e}, "trained": {"perplexity": 9}}}
    found = dict(facts.panels(log, report))
    assert len(found) == 4
    held_out = found["cross entropy on held-out text, in nats"]
    assert "full precision" in held_out
    assert "trained" not in held_out
    assert facts.panels([], {}) == []
