"""Which calibration text a run takes where nobody says it, and how much of it.

The one place to change. It goes by the model alone, so that the same command gives the same result
on every machine; what a machine has time for is advice of `llmq plan`."""

from __future__ import annotations

from transformers import PretrainedConfig

from llmq.models.arch import USUAL_LENGTH, usual_length
from llmq.models.hub import is_bundled
from llmq.models.source import Source
from llmq.ptq.methods.base import Windows
from llmq.text.corpus import BUNDLED
from llmq.text.documentation import DOCUMENTATION
from llmq.text.documents import SELF

TOKENS_PER_CHANNEL = 64
LEAST_TOKENS, MOST_TOKENS = 128 * 256, 128 * 2048
MOST_WINDOWS, FEWEST_WINDOWS = 128, 64
QUICK_SHARE, SHORTEST = 4, 256
# Of stored weights, a model of a billion in bfloat16: writing holds it as a whole.
MOST_BYTES_THAT_WRITE = 2_500_000_000


def default_text(source: Source) -> str:
    """The calibration text of a model, as `--calibration` names it: source code for the bundled
    model, which has learned nothing else; for others what the model writes itself, which loses
    least (figures in the README of `llmq/ptq`); and the documentation of Python for models that
    had better not be in memory as a whole. No network is asked for what nobody has asked for."""
    if is_bundled(source.folder):
        return BUNDLED
    return SELF if source.weight_bytes <= MOST_BYTES_THAT_WRITE else DOCUMENTATION


def default_windows(width: int, positions: int) -> Windows:
    """Calibration windows for a model. width: of its hidden states. positions: tokens that it has
    positions for.

    128 x 2048 tokens are what GPTQ was published with (Frantar et al., 2022), for widths from 4096:
    64 tokens per channel of the hidden states there, and so here. The columns of a Hessian grow
    with the width, and with them the text that it takes to know it. At least 128 x 256, which is
    what the tables of `llmq/ptq/README.md` were measured with; never more than 128 windows. Short
    text is cut into shorter windows, a power of two, rather than into fewer than 64."""
    tokens = min(MOST_TOKENS, max(LEAST_TOKENS, TOKENS_PER_CHANNEL * width))
    length = 1 << (tokens // FEWEST_WINDOWS).bit_length() - 1
    return _windows(tokens, min(USUAL_LENGTH, length, positions))


def quick_windows(width: int, positions: int) -> Windows:
    """What `--quick` takes: a quarter of the text, in windows of a quarter of the length."""
    default = default_windows(width, positions)
    length = min(positions, max(SHORTEST, default.length // QUICK_SHARE))
    return _windows(default.n_tokens // QUICK_SHARE, length)


def windows_for(config: PretrainedConfig, *, quick: bool = False) -> Windows:
    """The windows for the model of a config."""
    width = config.get_text_config().hidden_size
    return (quick_windows if quick else default_windows)(width, usual_length(config))


def _windows(n_tokens: int, length: int) -> Windows:
    return Windows(min(MOST_WINDOWS, max(1, n_tokens // length)), length)
