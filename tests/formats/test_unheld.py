"""Small layers whose shape a format that was asked for cannot hold are kept, not refused."""

import pytest

from llmq.errors import LlmqError
from llmq.formats.registry import choose_format, format_named
from llmq.formats.unheld import kept_where_unheld
from llmq.grid.spec import QuantSpec
from llmq.recipe import Layer, LayerPlan


def plans(*shapes, spec="w4g32"):
    return [
        LayerPlan(Layer(f"layer.{i}", shape), QuantSpec.parse(spec))
        for i, shape in enumerate(shapes)
    ]


def test_a_small_layer_is_kept_with_a_note():
    planned = kept_where_unheld(format_named("gptq"), plans((256, 256), (4, 64)))
    assert planned[0].spec is not None
    assert planned[1].spec is None
    assert planned[1].differs
    assert "format gptq: it needs N and K divisible by 32, not 4 x 64" in planned[1].note
    assert choose_format("gptq", planned).name == "gptq"


@pytest.mark.parametrize("spec", ["w4g32", "ternary-g32"])
def test_what_is_much_of_a_model_or_no_matter_of_shape_is_refused(spec):
    shapes = [(256, 256), (200, 256)] if spec == "w4g32" else [(256, 256)]
    planned = plans(*shapes, spec=spec)
    assert kept_where_unheld(format_named("gptq"), planned) == planned
    with pytest.raises(LlmqError, match="format gptq cannot hold"):
        choose_format("gptq", planned)
