"""What a run does where nobody says it."""

import pytest

from llmq.ptq import precision as arithmetic
from llmq.qat.settings import QATSettings, Scheme


@pytest.mark.parametrize(("has_instructions", "precision"), [(True, "bf16"), (False, "fp32")])
def test_bfloat16_is_for_devices_that_multiply_it(monkeypatch, has_instructions, precision):
    monkeypatch.setattr(arithmetic, "multiplies_bfloat16", lambda device: has_instructions)
    assert QATSettings(Scheme.parse("w4")).on("cpu").precision == precision
    asked = QATSettings(Scheme.parse("w4"), precision="fp16")
    assert asked.on("cpu") == asked
