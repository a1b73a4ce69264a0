"""Implements a hook with an argument that does not exist."""

from tars_core.plugin import hookimpl


@hookimpl
def tars_probe(model: object, gpu: object) -> None: ...
