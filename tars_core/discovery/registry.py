"""Which of the installed plugins can be trusted, and how one of them is asked.

Discovery is a loop of its own over the entry points: one broken plugin must not stop the others, which pluggy's
loader would let it. What fails is put aside with the stage, the reason and the mend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec
import pluggy

from tars_core import hookspecs
from tars_core.discovery import entry_points, mistakes, trial
from tars_core.discovery.asking import Asker, Late, fault
from tars_core.discovery.entry_points import Choice, InstalledPlugin, Refused, Stage
from tars_core.types.errors import PluginError, told
from tars_core.types.models import ModelRef, OfferedModel
from tars_core.types.public import brief
from tars_core.types.reports import ProbeLimits, ProbeReport

_MENDS: dict[str, str] = {
    "import": "reinstall {distribution} or uninstall it; tars backends looks at it again",
    "register": "fix it where you are the author of {distribution}, else upgrade it",
    "probe": "upgrade {distribution} or report it to its authors",
}


_GIVEN = "(object given in code)"

SettingsOf: TypeAlias = Callable[[str], str]
"""Returns a plugin's own settings as JSON, by its name."""

M = TypeVar("M", ModelRef, None)


def _no_settings(name: str) -> str:
    del name
    return "{}"


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    """A plugin put aside: it is never asked again in this process."""

    name: str
    distribution: str
    version: str
    stage: Stage
    reason: str
    mend: str


class Registry:
    """The plugins of one engine."""

    def __init__(self) -> None:
        self._manager = hookspecs.new_manager()
        self._plugins: dict[str, InstalledPlugin] = {}
        self._objects: dict[str, object] = {}
        self._asker = Asker()
        self._offered: dict[str, Sequence[OfferedModel]] = {}
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
        """Register ``value``; raises ``PluginError`` for a mistake in its hooks, and what pluggy raises."""
        mistakes.check(value)
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
        self.refuse(
            Refused(
                plugin=plugin, stage=stage, reason=reason, mend=_MENDS[stage].format(distribution=plugin.distribution)
            )
        )

    def refuse(self, refused: Refused) -> None:
        """Put a plugin aside that was never registered; another one of its name stays."""
        plugin = refused.plugin
        self.quarantined.append(
            Quarantined(
                name=plugin.name,
                distribution=plugin.distribution,
                version=plugin.version,
                stage=refused.stage,
                reason=refused.reason,
                mend=refused.mend,
            )
        )

    def put_aside(self, name: str, reason: str) -> None:
        """Quarantine a plugin that did not answer as it must, unless that has been done already."""
        if (plugin := self._plugins.get(name)) is not None:
            self.quarantine(plugin, "probe", reason)

    def probe(
        self, questions: Iterable[tuple[str, M]], limits: ProbeLimits, settings: SettingsOf = _no_settings
    ) -> dict[tuple[str, M], ProbeReport | Late]:
        """Ask each named plugin about each model (or, with ``None``, about itself), all at once, in threads.

        A plugin whose probe raises, exits or returns something else is quarantined. One that exceeds
        ``limits.deadline_s`` is only late: a disk may be cold. Models that are not a plugin's kind are left out.
        """
        asked = [(name, model) for name, model in questions if self._implements(name, "tars_probe")]
        calls = {
            ("tars_probe", name, model): self._question(name, model, limits, settings(name)) for name, model in asked
        }
        reports: dict[tuple[str, M], ProbeReport | Late] = {}
        for (_, name, model), answer in self._asker.ask(calls, deadline_s=limits.deadline_s).items():
            if answer is None:
                continue
            if isinstance(answer, Late):
                reports[name, model] = answer
            elif (wrong := fault(answer, ProbeReport)) is not None:
                self.put_aside(name, f"tars_probe: {wrong}")
            elif isinstance(answer, ProbeReport):
                reports[name, model] = answer
        return {key: report for key, report in reports.items() if key[0] in self._plugins}

    def settings_models(self, names: Iterable[str], limits: ProbeLimits) -> dict[str, object]:
        """Return what each plugin's ``tars_settings`` gives: a model, :class:`~.asking.Late`, or an exception.

        A plugin without settings gives ``None``.
        """
        asked = {name: self._implements(name, "tars_settings") for name in names}
        calls = {
            ("tars_settings", name): self._only(name, "tars_settings") for name, has_some in asked.items() if has_some
        }
        answers = self._asker.ask(calls, deadline_s=limits.deadline_s)
        return {name: answers.get(("tars_settings", name)) for name in asked}

    def offered_models(self, limits: ProbeLimits, settings: SettingsOf = _no_settings) -> dict[ModelRef, OfferedModel]:
        """Return the models the plugins name, by their names; the first plugin by name wins.

        A plugin that is late is taken at its last word.
        """
        names = [p.name for p in self.plugins if self._implements(p.name, "tars_models")]
        calls = {
            ("tars_models", name): partial(self._only(name, "tars_models"), backend_settings=settings(name))
            for name in names
        }
        for (_, name), answer in self._asker.ask(calls, deadline_s=limits.deadline_s).items():
            if isinstance(answer, Late):
                continue
            models = answer if isinstance(answer, list | tuple) else (answer,)
            faults = [wrong for model in models if (wrong := fault(model, OfferedModel))]
            if not isinstance(answer, list | tuple | BaseException):
                faults = [f"it must return a list of OfferedModel, not {brief(answer)}"]
            if faults:
                self.put_aside(name, f"tars_models: {faults[0]}")
                self._offered.pop(name, None)
            else:
                self._offered[name] = models
        offered: dict[ModelRef, OfferedModel] = {}
        for name in sorted(self._offered):
            for model in self._offered[name]:
                offered.setdefault(model.name, model)
        return offered

    def ask(self, what: str, call: Callable[[], object], limits: ProbeLimits) -> object:
        """Run one call that may hang, such as a look at a file: its value, its exception, or ``Late``."""
        return self._asker.ask({what: call}, deadline_s=limits.deadline_s)[what]

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


def discover(  # noqa: PLR0913 - each says one thing about how to look
    *,
    choice: Choice,
    cache: Path,
    first_import_s: float = 10.0,
    recheck: bool = False,
    extra: Mapping[str, object] | None = None,
    isolated: bool = True,
    python: str | None = None,
) -> Registry:
    """Find, check and register what is installed; never raises for a plugin's fault.

    ``recheck`` examines anew what crashed or hung before. ``extra`` are plugin objects that are no entry points.
    Where backends are not ``isolated``, their plugins are not tried out in a process first, either; else ``python``
    does it. Raises :class:`~tars_core.types.errors.ConfigError` where there is no Python to do it.
    """
    registry = Registry()
    for name, value in sorted((extra or {}).items()):
        given = InstalledPlugin(name=name, distribution=_GIVEN, version="", target=None)
        try:
            registry.add(given, value)
        except Exception as error:  # noqa: BLE001 - one broken plugin must not stop the others
            registry.quarantine(given, "register", _said(error))
    found = entry_points.find()
    for refused in found.refused:
        registry.refuse(refused)
    registry.left_out = frozenset(p.name for p in found.plugins if not choice.admits(p.name)) - set(extra or {})
    installed = [p for p in found.plugins if choice.admits(p.name) and p.name not in (extra or {})]
    verdicts = _verdicts(installed, cache, first_import_s, python, recheck=recheck) if isolated else {}
    for plugin in installed:
        verdict = verdicts.get(plugin.name, trial.Verdict())
        if verdict.stage is not None:
            registry.quarantine(plugin, verdict.stage, verdict.reason)
            continue
        stage: Stage = "import"
        try:
            value = hookspecs.import_plugin(plugin.target or "")
            stage = "register"
            registry.add(plugin, value)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - one broken plugin must not stop the others
            registry.quarantine(plugin, stage, _said(error))
    return registry


def _said(error: BaseException) -> str:
    return error.message if isinstance(error, PluginError) else told(error)


def _verdicts(
    plugins: Sequence[InstalledPlugin], cache: Path, limit_s: float, python: str | None, *, recheck: bool
) -> dict[str, trial.Verdict]:
    """Return what is known of each plugin's first import, tried now where nothing is."""
    memory = trial.Memory(cache / "plugins")
    suspects = [
        trial.Suspect(name=p.name, target=p.target or "", distribution=p.distribution, version=p.version)
        for p in plugins
    ]
    verdicts = {s.name: v for s in suspects if (v := memory.recall(s, trust_bad=not recheck))}
    unknown = [suspect for suspect in suspects if suspect.name not in verdicts]
    if unknown:
        examined = trial.examine(unknown, limit_s=limit_s, python=python)
        for suspect in unknown:
            memory.keep(suspect, examined[suspect.name])
        verdicts |= examined
    return verdicts
