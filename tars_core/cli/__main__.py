"""``python -m tars_core.cli`` is ``tars``."""

from tars_core.cli import main

main()
