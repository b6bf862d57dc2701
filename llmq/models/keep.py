"""What stays in full precision unless a rule is about it alone, and why.

These layers are small, so keeping them costs little, and what they give is an address, a rate of
decay or a score, on which everything behind them depends. Engines know most of them in full
precision only. Parts that are no linear layers of the blocks (convolutions, norms, towers,
projectors) are never quantized, and neither are the layers of multi-token prediction."""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Kept:
    """names: a regular expression about the name of a layer, from one of its dots on. reason: what
    the layers do, as notes have it."""

    names: re.Pattern[str]
    reason: str


def _kept(names: str, reason: str) -> Kept:
    return Kept(re.compile(rf"(^|\.)({names})$"), reason)


KEPT = (
    _kept(
        r"gate|gate\.wg|router|router\.\w+|modality_router",
        "it says which expert a token goes to",
    ),
    _kept(
        r"shared_expert_gate|shared_experts_gate",
        "it weighs what the shared expert adds with one number",
    ),
    _kept(
        r"in_proj_(a|b|ba)|linear_attn\.[ab]_proj|self_attn\.b_proj|attention\.b_proj",
        "it gives the rates at which a state decays and is written",
    ),
    _kept(
        r"f_[ab]_proj|f_proj|(i|f|if)gate_preact",
        "it gives the rate at which a state is forgotten",
    ),
    _kept(r"dt_proj", "it gives the steps in time of a state, from few numbers"),
    _kept(r"(\w+\.)*indexer(\.\w+)+", "it scores which tokens are attended to"),
    _kept(r"(\w+\.)*compressor(\.\w+)+", "it weighs which keys and values become one"),
    _kept(
        r"(attn|ffn|mlp)?_?(hc|hyper_connection)s?(\.\w+)+|hc_\w+",
        "it mixes the streams of hidden states (hyper-connections)",
    ),
    _kept(r"altup\.\w+", "it mixes the streams of hidden states (AltUp)"),
)
# Whole layers that are stored for the prediction of several tokens at a time, which transformers'
# classes leave out when they load.
_EXTRA = re.compile(r"(^|\.)(mtp|mtp_\w+|nextn\w*|eagle\w*|medusa\w*)\.")
_NUMBERED = re.compile(
    r"((model|transformer|backbone|language_model)\.)*(layers|blocks|h)\.(\d+)\."
)


def reason_to_keep(name: str) -> str:
    """Why the layer of that name stays in full precision by default; empty for one that does
    not."""
    return next((kept.reason for kept in KEPT if kept.names.search(name)), "")


def is_extra_layer(name: str, config: PretrainedConfig) -> bool:
    """Whether a stored tensor belongs to a layer beside those that make the next token: of
    multi-token prediction, under a name of its own or behind the last block."""
    if _EXTRA.search(name):
        return True
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    numbered = _NUMBERED.match(name)
    return numbered is not None and isinstance(depth, int) and int(numbered[4]) >= depth
