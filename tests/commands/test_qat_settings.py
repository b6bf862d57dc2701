"""What `llmq qat` goes by: the file, the options that override it, and the defaults."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from llmq.commands.catalog import build_parser
from llmq.commands.qat_settings import read_settings
from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.qat.losses import LossWeights
from llmq.qat.schedule import Phases
from llmq.qat.settings import QATSettings, Scheme
from llmq.recipe import Rule


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A function of a section `qat` and options that returns settings and rules. The file is named
    by a short path, of which a long message loses nothing."""
    monkeypatch.chdir(tmp_path)

    def read(section, *options, max_length=128):
        arguments = ["qat", "model", "out", *options]
        if section is not None:
            Path("recipe.json").write_text(json.dumps({"qat": section}))
            arguments += ["--recipe", "recipe.json"]
        return read_settings(
            build_parser().parse_args(arguments), LlamaConfig(max_position_embeddings=max_length)
        )

    return read


def test_defaults_are_those_of_the_settings(settings):
    for section in (None, {}):
        found, rules = settings(section, max_length=4096)
        assert found == QATSettings(Scheme.parse("w4"))
        assert rules == ()


def test_options_override_the_file(settings):
    section = {
        "scheme": {"weights": "ternary-tensor", "activations": "int8-token"},
        "quantizer": "absmean",
        "init": "rtn",
        "max_tokens": 1000,
        "rules": ["*.0.*=keep"],
        "loss": {"kl": 0.5},
        "phases": {"gradual": 0.1},
    }
    found, rules = settings(section)
    assert found.scheme == Scheme(QuantSpec("ternary", 0), "int8-token")
    assert (found.loss, found.phases) == (LossWeights(0.5, 0.1), Phases(gradual=0.1))
    assert (found.sequence_length, found.max_tokens) == (128, 1000)
    options = ["--max-steps", "3", "--group-size", "64", "--ce", "0.2", "--rule", "*.1.*=w8"]
    found, rules = settings(section, *options)
    assert (found.max_tokens, found.max_steps) == (None, 3)
    assert found.scheme.weights == QuantSpec("ternary", 64)
    assert found.loss == LossWeights(0.5, 0.2)
    assert rules == (Rule.parse("*.1.*=w8"), Rule.parse("*.0.*=keep"))
    assert settings(section, "--scheme", "w8", "--quantizer", "lsq")[0].scheme == Scheme.parse("w8")


def test_defaults_that_depend_on_other_settings(settings):
    static = {"scheme": {"weights": "w4g128", "activations": "int8-static"}}
    assert settings(static)[0].phases.activations == 0.1
    assert settings({**static, "phases": {"activations": 0.3}})[0].phases.activations == 0.3
    assert settings({"loss": {"kl": 0.0}})[0].loss == LossWeights(0.0, 1.0)
    assert settings({}, "--train", "generated")[0].loss == LossWeights(1.0, 0.0)
    assert settings({"scheme": "w2", "quantizer": "seq", "init": "rtn"})[0].scheme.weights == (
        QuantSpec("int2h", 64)
    )


BAD = [
    ({"scheem": "w2"}, "qat: unknown keys scheem; known are scheme"),
    ({"phases": {"warm": 1}}, "qat.phases: unknown keys warm; known are warmup"),
    ({"phases": {"warmup": "x"}}, "qat.phases.warmup 'x': expected a finite number"),
    ({"phases": {"warmup": 2}}, "phase warmup = 2: expected a share"),
    ({"phases": 3}, "qat.phases 3: expected an object"),
    ({"loss": {"ce": None}}, "qat.loss.ce None: expected a finite number"),
    ({"scheme": "w5"}, "unknown scheme 'w5'"),
    ({"scheme": {"activations": "none"}}, "qat.scheme: weights are missing"),
    ({"scheme": {"weights": "w7"}}, "cannot read the quantization 'w7'"),
    ({"scheme": {"weights": 5}}, "quantization 5: expected an object"),
    ({"scheme": 5}, "qat.scheme 5: expected an object"),
    ({"rules": ["w8"]}, r"rules\[0\]: rule 'w8': expected PATTERN=SPEC"),
    ({"batch_size": 2.0}, "qat.batch_size 2.0: expected a whole number"),
    ({"quantizer": "lsqr"}, "unknown qat.quantizer 'lsqr': expected lsq, seq, ste or absmean"),
    ({"max_tokens": 64, "max_steps": 2}, "both set the length of the run"),
    ({"sequence_length": 4096}, "positions for 128 tokens only"),
]


@pytest.mark.parametrize(("section", "message"), BAD, ids=[message for _, message in BAD])
def test_errors_name_the_file_and_the_key(section, message, settings):
    with pytest.raises(LlmqError, match=message) as caught:
        settings(section)
    assert str(caught.value).startswith("--recipe recipe.json")
