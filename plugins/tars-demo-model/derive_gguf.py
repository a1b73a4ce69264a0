"""Build hook: derive the GGUF file from the committed master before the wheel is packed."""

from __future__ import annotations

import sys
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class DeriveGGUF(BuildHookInterface):  # type: ignore[type-arg]
    """Writes ``weights/tars-demo.gguf``; the script checks that it equals the master."""

    def initialize(self, version: str, build_data: dict[str, object]) -> None:  # noqa: ARG002 - the interface's own
        """Run before the files are gathered; also for an editable install."""
        root = Path(self.root)
        sys.path.insert(0, str(root))  # a build hook is run as a file; its folder is no place to import from
        from gguf_from_master import write_gguf  # noqa: PLC0415

        weights = root / "src" / "tars_demo_model" / "weights"
        write_gguf(weights, weights / "tars-demo.gguf")
