"""From settings and what is installed to a decision. Blocking: discovery starts processes, probes look at files."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import msgspec

from tars_core.config.settings import Settings, cache_folder, plain_name
from tars_core.discovery import registry
from tars_core.discovery.asking import Late
from tars_core.discovery.entry_points import Choice, InstalledPlugin
from tars_core.models.resolve import ResolvedModel, resolve
from tars_core.planning import ranking, speeds
from tars_core.system import memory, processes
from tars_core.types.errors import BackendUnavailable, ConfigError, LoadFailed, PluginError, TarsError, told
from tars_core.types.models import ModelRef, OfferedModel
from tars_core.types.reports import BackendStatus, ProbeLimits, ProbeReport
from tars_core.types.results import Candidate, Decision, Rejection

_log = logging.getLogger("tars_core.planning")
_NO_BACKEND = (
    "install one; from a clone of the repository:"
    " pip install . ./plugins/tars-xllamacpp   (llama.cpp, prebuilt, no compiler)"
)


_PATIENCE = 4
"""Where nobody but late backends could answer, they get so many times ``limits.probe_s`` more."""


class InMemory(NamedTuple):
    """What is loaded, and what of it could make room for another model."""

    answering: frozenset[ranking.Key] = frozenset()
    evictable_bytes: int = 0


class Planner:
    """Decides for one engine. Discovery happens once, on the first question. Not for two threads at once."""

    def __init__(self, settings: Settings, plugins: Mapping[str, object]) -> None:
        self._settings = settings
        self._objects = plugins
        self._registry: registry.Registry | None = None
        self._own_settings: dict[str, str | TarsError] = {}
        self._last_good: dict[ranking.Key, ProbeReport] = {}
        self._last_found: dict[str | None, ResolvedModel] = {}
        self._limits = ProbeLimits(deadline_s=settings.limits.probe_s)

    def models(self) -> tuple[OfferedModel, ...]:
        """Return the models known by name: aliases first, then what plugins offer."""
        aliases = [
            OfferedModel(
                name=ModelRef.parse(name),
                refs=tuple(ModelRef.parse(text) for text in texts),
                notice="an alias of yours",
            )
            for name, texts in self._settings.models.items()
        ]
        found = self._discovered()
        self._check_settings(found)
        return (*aliases, *found.offered_models(self._limits, self._given_settings).values())

    def backend_settings(self, name: str) -> str:
        """Return ``[backends.NAME]`` as JSON, as the plugin accepted it when this was decided; asks nobody."""
        own = self._own_settings.get(name, "{}")
        if isinstance(own, TarsError):
            raise own
        return own

    def _given_settings(self, name: str) -> str:
        own = self._own_settings.get(name, "{}")
        return own if isinstance(own, str) else "{}"

    def _check_settings(self, found: registry.Registry) -> None:
        """Have each plugin check the settings that are given for it, once."""
        given = {p.name for p in found.plugins if self._settings.backends.get(p.name)}
        unknown = [name for name in given if not isinstance(self._own_settings.get(name), str)]
        if not unknown:
            return
        from tars_core.config import checks  # noqa: PLC0415 - imports pydantic

        for name, model in found.settings_models(unknown, self._limits).items():
            own = model
            if not isinstance(model, Late | BaseException):  # its validators are the plugin's code as well
                check = partial(checks.own_settings, name, model, self._settings)
                own = found.ask(f"settings of {name}", check, self._limits)
            if isinstance(own, Late):
                self._own_settings[name] = LoadFailed(f"its settings cannot be checked: tars_settings: {own}")
            elif isinstance(own, str | ConfigError):
                self._own_settings[name] = own
            elif isinstance(own, BaseException):
                why = own.message if isinstance(own, PluginError) else f"tars_settings: {told(own)}"
                found.put_aside(name, why)

    def plugin(self, name: str) -> tuple[str | None, object]:
        """Return a plugin's entry-point value (``None`` for an object given in code) and the plugin itself.

        Raises ``PluginError`` for one that was put aside since the decision.
        """
        found = self._discovered()
        if (plugin := found.get(name)) is None:
            aside = next((q for q in found.quarantined if q.name == name), None)
            raise PluginError(f"{name} was put aside: {aside.reason}" if aside else f"there is no plugin {name}")
        return plugin.target, found.plugin_object(name)

    def _discovered(self, *, recheck: bool = False) -> registry.Registry:
        if self._registry is None or (recheck and self._registry.quarantined):
            choice = Choice.parse(self._settings.plugins)
            self._registry = registry.discover(
                choice=choice,
                cache=cache_folder(),
                first_import_s=self._settings.limits.import_s,
                recheck=recheck,
                extra=self._objects,
                isolated=self._settings.isolation == "process",
                python=self._settings.python,
            )
            known = {p.name for p in self._registry.plugins} | {q.name for q in self._registry.quarantined}
            self._warn_of_unknown(known | self._registry.left_out, choice.allow | choice.deny)
        return self._registry

    def _warn_of_unknown(self, known: set[str], chosen: frozenset[str]) -> None:
        """Tell of settings that name a plugin nobody has: a misspelt name, or one that was uninstalled."""
        settings = self._settings
        named = [(f"backends.{name}", name) for name in settings.backends]
        named += [(f"use.{name}", name) for name, allowed in settings.use.items() if not allowed]
        named += [("prefer", name) for name in settings.prefer]
        named += [("plugins", name) for name in sorted(chosen)]
        plain = {plain_name(name) for name in known}
        for key, name in named:
            if plain_name(name) not in plain:
                near = difflib.get_close_matches(name, known, n=1)
                mend = f"; did you mean {near[0]}?" if near else ""
                _log.warning("%s (%s) names %s, which is not installed%s", key, settings.origin(key), name, mend)

    def decide(self, wanted: str | None, look: Callable[[], InMemory]) -> Decision:
        """Return what would be tried for the model ``wanted``, in order. Raises where nothing can be.

        ``None`` is the model of the settings. ``look`` says what is loaded now.
        """
        found = self._discovered()
        in_memory = look()
        backends = [p.name for p in found.plugins if found.is_backend(p.name)]
        self._check_named(found, backends)
        self._check_settings(found)
        if wrong := next((e for e in self._own_settings.values() if isinstance(e, ConfigError)), None):
            raise wrong
        self._check_python(found, backends)
        model = self._resolved(found, wanted if wanted is not None else self._settings.model, in_memory)
        questions = [(b, ref) for ref in model.refs for b in backends if isinstance(self._own_settings.get(b, ""), str)]
        reports, late = self._reports(found, questions, in_memory)
        reports = {key: _vouched(report, model.weights_ids.get(key[1])) for key, report in reports.items()}
        candidates, rejected = ranking.rank(reports, self._policy(found, model, look))
        candidates, notice = self._without_the_first(model, candidates, reports)
        rejected += (*self._rejected(found, backends, model, {key[0] for key in (*reports, *late)}), *late.values())
        if not candidates:
            raise BackendUnavailable(
                f"no backend can run {model.name}",
                reasons={r.backend: r.reason for r in rejected},
                hint=next((r.hint for r in rejected if r.hint), None) or "tars backends shows what is installed",
            )
        return Decision(model=model.name, candidates=candidates, rejected=rejected, notice=notice)

    def _check_python(self, found: registry.Registry, backends: Iterable[str]) -> None:
        """Raise where worker processes are wanted and there is no Python to run them."""
        installed = [name for name in backends if (plugin := found.get(name)) and plugin.target is not None]
        if installed and self._settings.isolation == "process" and self._settings.python is None:
            processes.interpreter()

    def _resolved(self, found: registry.Registry, wanted: str | None, in_memory: InMemory) -> ResolvedModel:
        """Return the model's forms; a look at a file on a dead mount may take for ever.

        Of one that is loaded and answers, they are those that were found last.
        """
        offered = found.offered_models(self._limits, self._given_settings)
        look = partial(resolve, wanted, aliases=self._settings.models, offered=offered)
        answer = found.ask(f"resolve {wanted}", look, self._limits)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, ResolvedModel):
            self._last_found[wanted] = answer
            return answer
        last = self._last_found.get(wanted)
        if last is not None and any(model in last.refs for _, model in in_memory.answering):
            return last
        raise BackendUnavailable(
            f"{wanted} cannot be looked at", reasons={"the file system": str(answer)}, hint="is the disk mounted?"
        )

    def _reports(
        self, found: registry.Registry, questions: Iterable[ranking.Key], in_memory: InMemory
    ) -> tuple[dict[ranking.Key, ProbeReport], dict[ranking.Key, Rejection]]:
        """Return what the plugins report, and who was late.

        One that is late and answers for a loaded model is taken at its last word.
        """
        answers = found.probe(questions, self._limits, self._given_settings)
        if not any(isinstance(a, ProbeReport) and a.available for a in answers.values()):
            late = [key for key, answer in answers.items() if isinstance(answer, Late)]
            patient = ProbeLimits(deadline_s=self._limits.deadline_s * _PATIENCE)
            answers |= found.probe(late, patient, self._given_settings) if late else {}
        reports: dict[ranking.Key, ProbeReport] = {}
        rejected: dict[ranking.Key, Rejection] = {}
        for key, answer in answers.items():
            if isinstance(answer, ProbeReport):
                reports[key] = self._last_good[key] = answer
            elif key in in_memory.answering and key in self._last_good:
                reports[key] = self._last_good[key]
            else:
                hint = "it is asked again with the next request; raise limits.probe_s where the machine is slow"
                rejected[key] = Rejection(backend=key[0], model=key[1], reason=f"its probe gave {answer}", hint=hint)
        return reports, rejected

    def _rejected(
        self, found: registry.Registry, backends: Iterable[str], model: ResolvedModel, asked: set[str]
    ) -> list[Rejection]:
        """Return who was not asked, or gave no answer that counts, and why."""
        rejected = [
            Rejection(backend=q.name, reason=f"put aside ({q.stage}): {q.reason}", hint=q.mend)
            for q in found.quarantined
        ]
        for name in backends:
            if name in asked or found.get(name) is None:
                continue
            own = self._own_settings.get(name)
            if isinstance(own, TarsError):
                rejected.append(Rejection(backend=name, reason=own.message, hint=own.hint))
            else:
                rejected.append(Rejection(backend=name, reason=f"does not run models like {model.name}"))
        return rejected

    def _without_the_first(
        self, model: ResolvedModel, candidates: tuple[Candidate, ...], reports: Mapping[ranking.Key, ProbeReport]
    ) -> tuple[tuple[Candidate, ...], str | None]:
        """Mark the candidates as other weights, with a notice, where an alias's first model is missing or broken."""
        others = tuple(msgspec.structs.replace(candidate, degraded=True) for candidate in candidates)
        if not model.first:
            return others, model.notice
        if any(candidate.model in model.first for candidate in candidates):
            return candidates, model.notice
        only = self._settings.backend
        broken = [
            f"{ref}: {report.reason}"
            for (name, ref), report in reports.items()
            if ref in model.first and not report.available and only in (None, name) and not self._settings.forbids(name)
        ]
        if not broken or not candidates:
            return candidates, model.notice
        return others, f"{broken[0]}: going on with {candidates[0].model}"

    def _check_named(self, found: registry.Registry, backends: list[str]) -> None:
        quarantined = {q.name: q for q in found.quarantined}
        named = self._settings.backend
        if named is not None and named not in backends:
            if named in quarantined:
                q = quarantined[named]
                raise BackendUnavailable(f"the backend {named} cannot be used", reasons={named: q.reason}, hint=q.mend)
            self._check_left_out(found, frozenset((named,)))
            near = difflib.get_close_matches(named, backends, n=1)
            raise ConfigError(
                f"there is no backend {named!r}; installed: {', '.join(backends) or 'none'}",
                hint=f"did you mean {near[0]}?" if near else "tars backends shows all" if backends else _NO_BACKEND,
            )
        if not backends:
            if not quarantined:
                self._check_left_out(found, found.left_out)
            raise BackendUnavailable(
                "no backend is installed",
                reasons={name: f"put aside ({q.stage}): {q.reason}" for name, q in quarantined.items()},
                hint=_NO_BACKEND,
            )

    def _check_left_out(self, found: registry.Registry, wanted: frozenset[str]) -> None:
        if out := sorted(found.left_out & wanted):
            given = f"plugins = {self._settings.plugins!r} ({self._settings.origin('plugins')})"
            raise ConfigError(f"the setting {given} leaves out {', '.join(out)}", hint="change it, or TARS_PLUGINS")

    def _policy(self, found: registry.Registry, model: ResolvedModel, look: Callable[[], InMemory]) -> ranking.Policy:
        free, total = memory.free_bytes(), memory.total_bytes()
        in_memory = look()  # after that: what begins to load meanwhile may count twice, and is not taken for room lost
        if free is not None:
            free = min(free + in_memory.evictable_bytes, free if total is None else max(free, total))
        return ranking.Policy(
            order=self._settings.prefer,
            only=self._settings.backend,
            forbidden=frozenset(p.name for p in found.plugins if self._settings.forbids(p.name)),
            models=model.refs,
            measured_tokens_per_s=speeds.read(cache_folder(), model.refs),
            free_memory_bytes=free,
            running=in_memory.answering,
            require_device=self._settings.require_device,
        )

    def statuses(self) -> tuple[BackendStatus, ...]:
        """Return the state of every installed plugin, quarantined ones included."""
        found = self._discovered(recheck=True)
        self._check_settings(found)
        found.offered_models(self._limits, self._given_settings)  # what is wrong there is wrong here, too
        wrong = {n: e for n, e in self._own_settings.items() if isinstance(e, TarsError)}
        asked: list[tuple[str, None]] = [(p.name, None) for p in found.plugins if p.name not in wrong]
        reports: dict[str, ProbeReport] = {
            n: ProbeReport(available=False, reason=e.message, hint=e.hint) for n, e in wrong.items()
        }
        for (name, _), answer in found.probe(asked, self._limits, self._given_settings).items():
            late = f"its probe gave {answer}"
            reports[name] = ProbeReport(available=False, reason=late) if isinstance(answer, Late) else answer
        working = [_status(p, reports.get(p.name), found.is_backend(p.name)) for p in found.plugins]
        aside = [
            BackendStatus(
                name=q.name,
                distribution=q.distribution,
                version=q.version,
                available=False,
                reason=q.reason,
                hint=q.mend,
                quarantined=q.stage,
            )
            for q in found.quarantined
        ]
        return tuple(sorted([*working, *aside], key=lambda status: status.name))


def _status(plugin: InstalledPlugin, report: ProbeReport | None, runs_models: bool) -> BackendStatus:  # noqa: FBT001
    return BackendStatus(
        name=plugin.name,
        distribution=plugin.distribution,
        version=plugin.version,
        available=(report.available if report else False) if runs_models else None,
        device=report.device if report else None,
        reason=report.reason if report else "it did not answer its probe" if runs_models else None,
        hint=report.hint if report else None,
        features=tuple(sorted(report.features or ())) if report else (),
        deviations=report.deviations if report else (),
    )


def _vouched(report: ProbeReport, weights_id: str | None) -> ProbeReport:
    return msgspec.structs.replace(report, weights_id=weights_id) if weights_id else report
