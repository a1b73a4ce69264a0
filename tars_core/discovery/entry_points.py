"""What is installed under the entry-point group, before anything of it is imported."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Literal, TypeAlias

import msgspec

from tars_core import hookspecs

_NEARLY = re.compile(r"tars[._-]?plugins?([._-]?v?[._-]?[0-9]*)", re.IGNORECASE)
_FIRST_PARTY = {
    name: f"tars-{name}" for name in ("demo-model", "llamacpp", "ollama", "openai", "transformers", "xllamacpp")
}
"""Names that belong to this project's distributions, installed or not."""

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


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """An entry point that is not even imported: at which stage, why, and what to do."""

    plugin: InstalledPlugin
    stage: Stage
    reason: str
    mend: str


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """The plugins that may be looked at, by name, and those that may not."""

    plugins: tuple[InstalledPlugin, ...]
    refused: tuple[Refused, ...]


def find() -> Found:
    """List what is installed, sorted.

    Refused are: a name that belongs to another distribution, plugins of another generation, and groups that nearly
    match.
    """
    found: dict[str, InstalledPlugin] = {}
    refused: list[Refused] = []
    other: list[tuple[InstalledPlugin, str]] = []
    everything = importlib.metadata.entry_points()
    groups = sorted(group for group in everything.groups if _NEARLY.fullmatch(group))
    entries = [entry for group in groups for entry in everything.select(group=group)]
    for entry in sorted(entries, key=lambda e: (e.name, e.dist.name if e.dist else "", e.value)):
        plugin = InstalledPlugin(
            name=entry.name,
            distribution=entry.dist.name if entry.dist else "(unknown)",
            version=entry.dist.version if entry.dist else "",
            target=entry.value,
        )
        owner = _FIRST_PARTY.get(entry.name, plugin.distribution)
        if entry.group != hookspecs.GROUP:
            other.append((plugin, entry.group))
        elif plugin == found.get(entry.name):
            continue  # one distribution seen twice: an editable install beside its own metadata
        elif plugin.distribution != owner:
            reason = f"the name {entry.name} belongs to {owner}, and {plugin.distribution} uses it, too"
            mend = f"as its author, give the entry point another name; else uninstall {plugin.distribution}"
            refused.append(Refused(plugin=plugin, stage="discovery", reason=reason, mend=mend))
        elif entry.name in found:
            reason = f"the name {entry.name} is taken by {found[entry.name].distribution}"
            refused.append(Refused(plugin=plugin, stage="discovery", reason=reason, mend="uninstall one of the two"))
        else:
            found[entry.name] = plugin
    refused += [_refused(plugin, group) for plugin, group in other if plugin.name not in found]
    return Found(plugins=tuple(found[name] for name in sorted(found)), refused=tuple(refused))


def _refused(plugin: InstalledPlugin, group: str) -> Refused:
    if group.startswith(hookspecs.GROUP_STEM):
        return Refused(
            plugin=plugin,
            stage="generation",
            reason=f"it is written for {group}, this tars-core speaks {hookspecs.GROUP}",
            mend="upgrade tars-core or the plugin, so that both speak the same generation",
        )
    return Refused(
        plugin=plugin,
        stage="discovery",
        reason=f"its entry-point group is {group!r}, which is not the group of TARS plugins",
        mend=f"as its author, register it under {hookspecs.GROUP!r} in pyproject.toml, and install it again",
    )
