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

import sys

from tars_core._version import __version__

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from typing import NoReturn

_INTERRUPTED = 130
_BROKEN_PIPE = 141


def main() -> NoReturn:
    """Run the command line and exit."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        sys.stdout.write(f"tars {__version__}\n")  # a fifth of the time: importing click alone takes 60 ms
        sys.exit(0)
    import gc  # noqa: PLC0415

    from tars_core.cli import output  # noqa: PLC0415

    output.ensure_stderr()
    # Nothing of what is imported is ever garbage: looking for some takes a fifth of what `tars backends` takes.
    gc.disable()
    try:
        from tars_core.cli import app  # noqa: PLC0415 - Ctrl-C while importing is handled like any other

        code = app.run(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n" if sys.stderr.isatty() else "stopped\n")  # a terminal shows ^C before it
        code = _INTERRUPTED
    except output.ReaderGoneError:
        output.drop()
        code = _BROKEN_PIPE
    sys.exit(code)
