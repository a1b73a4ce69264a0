"""Crashes the process when it is probed."""

import os
import signal

from tars_core.plugin import hookimpl


@hookimpl
def tars_probe(model: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)
