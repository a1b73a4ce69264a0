"""What is installed under the entry-point group, before anything of it is imported."""

from __future__ import annotations

import importlib.metadata
from typing import Literal, TypeAlias

import msgspec

from tars_core import hookspecs

Stage: TypeAlias = Literal["discovery", "generation", "import", "register", "probe"]


class InstalledPlugin(msgspec.Struct, frozen=True, kw_only=True):
    """A plugin that can be asked. ``target`` is ``None`` for an object that is no entry point."""

    name: str
    distribution: str
    version: str
    target: str | None


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Which plugins may be imported at all, before any is. An empty ``allow`` admits all."""

    allow: frozenset[str] = frozenset()
    deny: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Read ``TARS_PLUGINS``: names between commas; one that begins with ``-`` is denied.

        >>> Choice.parse("llamacpp, -ollama").deny
        frozenset({'ollama'})
        """
        names = [name.strip() for name in text.split(",") if name.strip()]
        return cls(
            allow=frozenset(n for n in names if not n.startswith("-")),
            deny=frozenset(n[1:] for n in names if n.startswith("-")),
        )

    def admits(self, name: str) -> bool:
        """Say whether the plugin may be imported."""
        return name not in self.deny and (not self.allow or name in self.allow)


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """The plugins that may be looked at, by name, and those that may not, each with its stage and the reason."""

    plugins: tuple[InstalledPlugin, ...]
    refused: tuple[tuple[InstalledPlugin, Stage, str], ...]


def find(taken: frozenset[str]) -> Found:
    """List what is installed, sorted; doubles, and plugins of another generation, are refused.

    ``taken`` are names of objects given in code, which win.
    """
    found: dict[str, InstalledPlugin] = {}
    refused: list[tuple[InstalledPlugin, Stage, str]] = []
    other: list[tuple[InstalledPlugin, str]] = []
    everything = importlib.metadata.entry_points()
    groups = sorted(group for group in everything.groups if group.startswith(hookspecs.GROUP_STEM))
    entries = [entry for group in groups for entry in everything.select(group=group)]
    for entry in sorted(entries, key=lambda e: (e.name, e.dist.name if e.dist else "", e.value)):
        plugin = InstalledPlugin(
            name=entry.name,
            distribution=entry.dist.name if entry.dist else "(unknown)",
            version=entry.dist.version if entry.dist else "",
            target=entry.value,
        )
        if entry.group != hookspecs.GROUP:
            other.append((plugin, entry.group))
        elif plugin == found.get(entry.name):
            continue  # one distribution seen twice: an editable install beside its own metadata
        elif entry.name in found or entry.name in taken:
            winner = found[entry.name].distribution if entry.name in found else "an object given in code"
            refused.append((plugin, "discovery", f"the name {entry.name} is taken by {winner}"))
        else:
            found[entry.name] = plugin
    for plugin, group in other:
        if plugin.name not in found:
            refused.append(
                (plugin, "generation", f"it is written for {group}, this tars-core speaks {hookspecs.GROUP}")
            )
    return Found(plugins=tuple(found[name] for name in sorted(found)), refused=tuple(refused))
