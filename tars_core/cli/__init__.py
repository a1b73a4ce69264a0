"""The command ``tars``. Thin: each command calls the public API and prints.

Answers go to stdout, everything else to stderr. Exit codes:

===  ====================================================================
0    done
1    the backends failed, or one failed after part of the answer
2    the command line, a setting or the request is wrong
3    nothing can run: no backend, or the model is not there
130  stopped with Ctrl-C
141  the reader of the output went away
===  ====================================================================
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

_INTERRUPTED = 130
_BROKEN_PIPE = 141


def main() -> NoReturn:
    """Run the command line and exit."""
    code = _INTERRUPTED
    try:
        from tars_core.cli import app  # noqa: PLC0415 - Ctrl-C while importing is handled like any other

        code = app.run(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        code = _INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; let that find the null device instead of a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _BROKEN_PIPE
    sys.exit(code)
