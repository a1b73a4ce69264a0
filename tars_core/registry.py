"""Which plugins are installed, which of them can be trusted, and how one of them is asked.

Discovery is a loop of its own over the entry points: one broken plugin must not stop the others, which pluggy's
loader would let it. What fails is put aside with the stage, the reason and the mend.
"""

from __future__ import annotations

import importlib.metadata
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

import msgspec
import pluggy

from tars_core import first_import, hookspecs
from tars_core.errors import told
from tars_core.schema import ModelRef, OfferedModel, ProbeLimits, ProbeReport

Stage: TypeAlias = Literal["discovery", "generation", "import", "register", "probe"]

_MENDS: dict[Stage, str] = {
    "discovery": "uninstall one of the two",
    "generation": "upgrade tars-core or the plugin, so that both speak the same generation",
    "import": "reinstall {distribution} or uninstall it; tars backends looks at it again",
    "register": "upgrade {distribution}; its hooks are not those of this tars-core",
    "probe": "upgrade {distribution} or report it to its authors",
}


SettingsOf: TypeAlias = Callable[[str], str]
"""Returns a plugin's own settings as JSON, by its name."""

M = TypeVar("M", ModelRef, None)
K = TypeVar("K")


def _no_settings(name: str) -> str:
    del name
    return "{}"


class InstalledPlugin(msgspec.Struct, frozen=True, kw_only=True):
    """A plugin that can be asked. ``target`` is ``None`` for an object that is no entry point."""

    name: str
    distribution: str
    version: str
    target: str | None


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    """A plugin put aside: it is never asked again in this process."""

    name: str
    distribution: str
    version: str
    stage: Stage
    reason: str
    mend: str


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


class Registry:
    """The plugins of one engine."""

    def __init__(self) -> None:
        self._manager = hookspecs.new_manager()
        self._plugins: dict[str, InstalledPlugin] = {}
        self._objects: dict[str, object] = {}
        self.quarantined: list[Quarantined] = []
        self.left_out: frozenset[str] = frozenset()
        """Installed, and not admitted by the user's choice."""

    @property
    def plugins(self) -> Sequence[InstalledPlugin]:
        """What can be asked, by name."""
        return tuple(self._plugins[name] for name in sorted(self._plugins))

    def get(self, name: str) -> InstalledPlugin | None:
        """Return one plugin that is not in quarantine."""
        return self._plugins.get(name)

    def plugin_object(self, name: str) -> object:
        """Return what was registered under ``name``."""
        return self._objects[name]

    def is_backend(self, name: str) -> bool:
        """Say whether the plugin runs models (one that only names models does not)."""
        return self._implements(name, "tars_load")

    def add(self, plugin: InstalledPlugin, value: object) -> None:
        """Register ``value``; raises what pluggy raises for hooks that are none of ours."""
        self._manager.register(value, plugin.name)
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError:
            self._manager.unregister(name=plugin.name)
            raise
        self._plugins[plugin.name] = plugin
        self._objects[plugin.name] = value

    def quarantine(self, plugin: InstalledPlugin, stage: Stage, reason: str) -> None:
        """Put a plugin aside, with the mend that belongs to the stage."""
        if self._plugins.pop(plugin.name, None) is not None:
            del self._objects[plugin.name]
            self._manager.unregister(name=plugin.name)
        self.quarantined.append(
            Quarantined(
                name=plugin.name,
                distribution=plugin.distribution,
                version=plugin.version,
                stage=stage,
                reason=reason,
                mend=_MENDS[stage].format(distribution=plugin.distribution),
            )
        )

    def put_aside(self, name: str, reason: str) -> None:
        """Quarantine a plugin that did not answer as it must, unless that has been done already."""
        if (plugin := self._plugins.get(name)) is not None:
            self.quarantine(plugin, "probe", reason)

    def probe(
        self, questions: Iterable[tuple[str, M]], limits: ProbeLimits, settings: SettingsOf = _no_settings
    ) -> dict[tuple[str, M], ProbeReport]:
        """Ask each named plugin about each model (or, with ``None``, about itself), all at once, in threads.

        A plugin whose probe raises, exits, returns something else or exceeds ``limits.deadline_s`` is quarantined.
        Models that are not a plugin's kind are left out.
        """
        asked = [(name, model) for name, model in questions if self._implements(name, "tars_probe")]
        answers = _all_at_once(
            {key: self._question(*key, limits, settings(key[0])) for key in asked}, deadline_s=limits.deadline_s
        )
        reports: dict[tuple[str, M], ProbeReport] = {}
        for key, answer in answers.items():
            if answer is None:
                continue
            fault = _fault(answer, ProbeReport, limits.deadline_s)
            if isinstance(answer, ProbeReport) and fault is None:
                reports[key] = answer
            else:
                self.put_aside(key[0], f"tars_probe: {fault}")
        return {key: report for key, report in reports.items() if key[0] in self._plugins}

    def settings_model(self, name: str) -> object:
        """Return what a plugin's ``tars_settings`` gives; ``None`` for a plugin without settings."""
        return self._only(name, "tars_settings")() if self._implements(name, "tars_settings") else None

    def offered_models(self, limits: ProbeLimits, settings: SettingsOf = _no_settings) -> dict[ModelRef, OfferedModel]:
        """Return the models the plugins name, by their names; the first plugin by name wins."""
        names = [p.name for p in self.plugins if self._implements(p.name, "tars_models")]
        calls = {name: partial(self._only(name, "tars_models"), backend_settings=settings(name)) for name in names}
        answers = _all_at_once(calls, deadline_s=limits.deadline_s)
        offered: dict[ModelRef, OfferedModel] = {}
        for name, answer in answers.items():
            models = answer if isinstance(answer, list | tuple) else (answer,)
            faults = [fault for model in models if (fault := _fault(model, OfferedModel, limits.deadline_s))]
            if faults:
                self.put_aside(name, f"tars_models: {faults[0]}")
            else:
                for model in models:
                    offered.setdefault(model.name, model)
        return offered

    def _question(self, name: str, model: ModelRef | None, limits: ProbeLimits, settings: str) -> Callable[[], object]:
        return partial(self._only(name, "tars_probe"), model=model, limits=limits, backend_settings=settings)

    def _only(self, name: str, hook: str) -> pluggy.HookCaller:
        """Return one plugin's hook alone: fanned out, one that raises would stop the rest."""
        others = [value for other, value in self._objects.items() if other != name]
        return self._manager.subset_hook_caller(hook, others)

    def _implements(self, name: str, hook: str) -> bool:
        if name not in self._objects:
            return False
        return any(impl.plugin_name == name for impl in getattr(self._manager.hook, hook).get_hookimpls())


def discover(
    *,
    choice: Choice,
    cache: Path,
    first_import_s: float = 10.0,
    recheck: bool = False,
    extra: Mapping[str, object] | None = None,
) -> Registry:
    """Find, check and register what is installed; never raises for a plugin's fault.

    ``recheck`` examines anew what crashed or hung before. ``extra`` are plugin objects that are no entry points.
    """
    registry = Registry()
    for name, value in sorted((extra or {}).items()):
        given = InstalledPlugin(name=name, distribution="(object)", version="", target=None)
        try:
            registry.add(given, value)
        except Exception as error:  # noqa: BLE001 - one broken plugin must not stop the others
            registry.quarantine(given, "register", told(error))
    memory = first_import.Memory(cache / "plugins")
    everything = _entry_points(registry)
    installed = [p for p in everything if choice.admits(p.name)]
    registry.left_out = frozenset(p.name for p in everything if not choice.admits(p.name))
    suspects = {p.name: _suspect(p) for p in installed}
    verdicts = {n: v for n, s in suspects.items() if (v := memory.recall(s, trust_bad=not recheck))}
    unknown = [s for n, s in suspects.items() if n not in verdicts]
    if unknown:
        examined = first_import.examine(unknown, limit_s=first_import_s)
        for suspect in unknown:
            memory.keep(suspect, examined[suspect.name])
        verdicts |= examined
    for plugin in installed:
        verdict = verdicts[plugin.name]
        if verdict.stage is not None:
            registry.quarantine(plugin, verdict.stage, verdict.reason)
            continue
        stage: Stage = "import"
        try:
            value = hookspecs.import_plugin(plugin.target or "")
            stage = "register"
            registry.add(plugin, value)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - one broken plugin must not stop the others
            registry.quarantine(plugin, stage, told(error))
    return registry


def _entry_points(registry: Registry) -> list[InstalledPlugin]:
    """List what is installed, sorted; quarantine doubles and plugins of another generation."""
    found: dict[str, InstalledPlugin] = {}
    other: list[tuple[InstalledPlugin, str]] = []
    taken = {p.name for p in registry.plugins}
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
            registry.quarantine(plugin, "discovery", f"the name {entry.name} is taken by {winner}")
        else:
            found[entry.name] = plugin
    for plugin, group in other:
        if plugin.name not in found:
            registry.quarantine(
                plugin, "generation", f"it is written for {group}, this tars-core speaks {hookspecs.GROUP}"
            )
    return [found[name] for name in sorted(found)]


def _suspect(plugin: InstalledPlugin) -> first_import.Suspect:
    return first_import.Suspect(
        name=plugin.name,
        target=plugin.target or "",
        distribution=plugin.distribution,
        version=plugin.version,
    )


class _TooLate:
    """Stands for an answer that did not come in time."""


def _all_at_once(calls: Mapping[K, Callable[[], object]], *, deadline_s: float) -> dict[K, object]:
    """Run all calls in daemon threads; an answer is the value, the exception, or ``_TooLate``."""
    results: queue.SimpleQueue[tuple[K, object]] = queue.SimpleQueue()

    def call(key: K, function: Callable[[], object]) -> None:
        try:
            results.put((key, function()))
        except BaseException as error:  # noqa: BLE001 - handed over to the caller
            results.put((key, error))

    for key, function in calls.items():
        threading.Thread(target=call, args=(key, function), name=f"tars-ask-{key}", daemon=True).start()
    answers: dict[K, object] = {}
    deadline = time.monotonic() + deadline_s
    while len(answers) < len(calls):
        try:
            key, answer = results.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        answers[key] = answer
    return {key: answers.get(key, _TooLate()) for key in calls}


def _fault(answer: object, kind: type[ProbeReport | OfferedModel], deadline_s: float) -> str | None:
    """Say what is wrong with an answer that should be a sound ``kind``; ``None`` where nothing is."""
    if isinstance(answer, _TooLate):
        return f"no answer within {deadline_s:g} s"
    if isinstance(answer, BaseException):
        return told(answer)
    if not isinstance(answer, kind):
        return f"it returned {type(answer).__name__}"
    try:
        msgspec.convert(msgspec.to_builtins(answer), kind)
    except (TypeError, ValueError) as error:
        return f"its {kind.__name__} is not sound: {error}"
    return None
