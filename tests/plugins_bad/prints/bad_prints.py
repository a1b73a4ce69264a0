"""Works, but prints to stdout while it is imported and probed."""

import os

from tars_core.plugin import ModelRef, ProbeLimits, ProbeReport, hookimpl

os.write(1, b"welcome to my plugin\n")


@hookimpl
def tars_probe(model: ModelRef | None, limits: ProbeLimits) -> ProbeReport | None:
    os.write(1, b"probing\n")
    return ProbeReport(available=True) if model is None else None
