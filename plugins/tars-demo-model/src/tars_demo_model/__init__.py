"""A tiny language model of TARS' own, in the two formats local engines read.

It brings a model and runs none: that is for the backends.
"""

from __future__ import annotations

from pathlib import Path

from tars_core.plugin import ModelRef, OfferedModel, hookimpl

WEIGHTS = Path(__file__).parent / "weights"
"""A checkpoint folder as Hugging Face lays it out, with ``tars-demo.gguf`` beside it: equal values in both."""

_WEIGHTS_ID = "tars-demo-1"


@hookimpl
def tars_models() -> tuple[OfferedModel, ...]:
    """Offer the model under the name ``demo:``."""
    return (
        OfferedModel(
            name=ModelRef(scheme="demo", rest=""),
            refs=(ModelRef.parse(WEIGHTS / "tars-demo.gguf"), ModelRef.parse(WEIGHTS)),
            weights_id=_WEIGHTS_ID,
            notice="no model was named: this is the demo model; name one with -m",
        ),
    )
