"""Implements a hook that does not exist."""

from tars_core.plugin import hookimpl


@hookimpl
def tars_prob(model: object) -> None: ...
