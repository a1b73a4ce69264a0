"""Answers its probe with what is no report."""

from tars_core.plugin import hookimpl


@hookimpl
def tars_probe(model: object) -> dict[str, bool]:
    return {"available": True}
