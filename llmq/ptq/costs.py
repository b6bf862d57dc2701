"""What a candidate spec costs the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """nats: per token, that quantizing a layer or a table so would lose. scale_dtype: what it takes
    to hold its scales."""

    nats: float
    scale_dtype: str = "float16"
