"""From settings and what is installed to a decision. Blocking: discovery starts processes, probes look at files."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping

import msgspec

from tars_core import ranking, registry, speeds
from tars_core.errors import BackendUnavailable, ConfigError, PluginError, told
from tars_core.schema import (
    BackendStatus,
    Candidate,
    Decision,
    ModelRef,
    OfferedModel,
    ProbeLimits,
    ProbeReport,
    Rejection,
)
from tars_core.settings import Settings, cache_folder, plain_name
from tars_core.sources import memory
from tars_core.sources.resolve import ResolvedModel, resolve

_log = logging.getLogger("tars_core.planning")
_NO_BACKEND = (
    "install one; from a clone of the repository:"
    " pip install . ./plugins/tars-xllamacpp   (llama.cpp, prebuilt, no compiler)"
)


class Planner:
    """Decides for one engine. Discovery happens once, on the first question."""

    def __init__(self, settings: Settings, plugins: Mapping[str, object]) -> None:
        self._settings = settings
        self._objects = plugins
        self._registry: registry.Registry | None = None

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
        offered = self._discovered().offered_models(
            ProbeLimits(deadline_s=self._settings.limits.probe_s), self.backend_settings
        )
        return (*aliases, *offered.values())

    def backend_settings(self, name: str) -> str:
        """Return ``[backends.NAME]`` as JSON, accepted by the plugin; raises ``ConfigError`` where it is not."""
        if not self._settings.backends.get(name):
            return "{}"
        from tars_core import validation  # noqa: PLC0415 - imports pydantic

        found = self._discovered()
        try:
            model = found.settings_model(name)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a plugin raises
            found.put_aside(name, f"tars_settings: {told(error)}")
            return "{}"
        return validation.own_settings(name, model, self._settings)

    def _settings_error(self, name: str) -> ConfigError | None:
        try:
            self.backend_settings(name)
        except ConfigError as error:
            return error
        return None

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
            choice = registry.Choice.parse(self._settings.plugins)
            self._registry = registry.discover(
                choice=choice,
                cache=cache_folder(),
                first_import_s=self._settings.limits.import_s,
                recheck=recheck,
                extra=self._objects,
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

    def decide(self, running: frozenset[ranking.Key]) -> Decision:
        """Return what would be tried, in order; ``running`` is loaded already. Raises where nothing can be."""
        found = self._discovered()
        for name in self._settings.backends.keys() & {plugin.name for plugin in found.plugins}:
            self.backend_settings(name)
        backends = [p.name for p in found.plugins if found.is_backend(p.name)]
        limits = ProbeLimits(deadline_s=self._settings.limits.probe_s)
        self._check_named(found, backends)
        model = resolve(
            self._settings.model,
            aliases=self._settings.models,
            offered=found.offered_models(limits, self.backend_settings),
        )
        questions = [(b, ref) for ref in model.refs for b in backends]
        reports = {
            key: _vouched(report, model.weights_ids.get(key[1]))
            for key, report in found.probe(questions, limits, self.backend_settings).items()
        }
        candidates, rejected = ranking.rank(reports, self._policy(model, running))
        candidates, notice = self._without_the_first(model, candidates, reports)
        rejected += tuple(
            Rejection(backend=q.name, reason=f"put aside ({q.stage}): {q.reason}", hint=q.mend)
            for q in found.quarantined
        )
        asked = {key[0] for key in reports}
        rejected += tuple(
            Rejection(backend=b, reason=f"does not run models like {model.name}")
            for b in backends
            if b not in asked and b in {p.name for p in found.plugins}
        )
        if not candidates:
            raise BackendUnavailable(
                f"no backend can run {model.name}",
                reasons={r.backend: r.reason for r in rejected},
                hint=next((r.hint for r in rejected if r.hint), None) or "tars backends shows what is installed",
            )
        return Decision(model=model.name, candidates=candidates, rejected=rejected, notice=notice)

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

    def _policy(self, model: ResolvedModel, running: frozenset[ranking.Key]) -> ranking.Policy:
        return ranking.Policy(
            order=self._settings.prefer,
            only=self._settings.backend,
            forbidden=frozenset(p.name for p in self._discovered().plugins if self._settings.forbids(p.name)),
            models=model.refs,
            measured_tokens_per_s=speeds.read(cache_folder(), model.refs),
            free_memory_bytes=memory.free_bytes(),
            running=running,
            require_device=self._settings.require_device,
        )

    def statuses(self) -> tuple[BackendStatus, ...]:
        """Return the state of every installed plugin, quarantined ones included."""
        found = self._discovered(recheck=True)
        limits = ProbeLimits(deadline_s=self._settings.limits.probe_s)
        wrong = {p.name: error for p in found.plugins if (error := self._settings_error(p.name))}
        asked: list[tuple[str, None]] = [(p.name, None) for p in found.plugins if p.name not in wrong]
        reports = found.probe(asked, limits, self.backend_settings)
        reports |= {(n, None): ProbeReport(available=False, reason=e.message, hint=e.hint) for n, e in wrong.items()}
        working = [_status(p, reports.get((p.name, None)), found.is_backend(p.name)) for p in found.plugins]
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


def _status(plugin: registry.InstalledPlugin, report: ProbeReport | None, runs_models: bool) -> BackendStatus:  # noqa: FBT001
    return BackendStatus(
        name=plugin.name,
        distribution=plugin.distribution,
        version=plugin.version,
        available=(report.available if report else False) if runs_models else None,
        device=report.device if report else None,
        reason=report.reason if report else "it did not answer its probe" if runs_models else None,
        hint=report.hint if report else None,
        deviations=report.deviations if report else (),
    )


def _vouched(report: ProbeReport, weights_id: str | None) -> ProbeReport:
    return msgspec.structs.replace(report, weights_id=weights_id) if weights_id else report
