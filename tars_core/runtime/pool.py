"""The models in memory: who is loaded, who makes room, who is ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import TypeAlias

from tars_core.config.settings import Settings
from tars_core.hookspecs import LoadOptions
from tars_core.planning.planner import InMemory, Planner
from tars_core.runtime.circuits import Circuits, Key
from tars_core.runtime.observers import Teller
from tars_core.system import memory
from tars_core.types.errors import BackendError, BackendUnavailable, EngineClosed, LoadFailed, TarsError, WorkerDied
from tars_core.types.failures import Failure
from tars_core.types.models import ModelRef
from tars_core.types.observed import LoadEnded, LoadProgressed, WorkerEnded, WorkerStarted
from tars_core.types.reports import LoadedStatus
from tars_core.types.request import Task
from tars_core.types.results import Candidate
from tars_core.worker.host import Worker
from tars_core.worker.protocol import Load, Loaded

_log = logging.getLogger("tars_core.engine")
_END_S = 3.0
"""How long a load waits for the memory of a process that was killed."""

PlaceKey: TypeAlias = tuple[str, ModelRef, Task]


class Place:
    """Where one model lives with one backend: not loaded yet, loading, or loaded."""

    def __init__(self, name: str, candidate: Candidate, task: Task) -> None:
        self.name = name
        self.names = {name}
        """All by which it was asked for."""
        self.candidate = candidate
        self.task = task
        self.worker: Worker | None = None
        self.loading: asyncio.Task[Worker] | None = None
        self.serial = 0
        """Of the worker that was loaded, or tried, last."""
        self.used_at = time.monotonic()
        self.waiting = 0
        """Requests that hold on to it: running, waiting for a place, or about to."""
        self.warnings: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        """What its circuit is known by."""
        return self.candidate.backend, self.candidate.model

    @property
    def answers(self) -> bool:
        """Whether it is loaded and lives."""
        return self.worker is not None and self.worker.answers

    @property
    def idle(self) -> bool:
        """Whether it is loaded and nobody needs it now."""
        return self.worker is not None and not self.waiting and self.worker.idle

    @property
    def memory_bytes(self) -> int:
        """What its backend reckoned that it takes."""
        return self.candidate.report.memory_bytes or 0


_reserved: dict[Place, int] = {}
"""Bytes that loads under way will take, those of other engines in this process too."""


class Pool:
    """The workers of one engine, each loaded at most once. Keeps what fits.

    When memory, or ``max_loaded``, demands it, the least recently used idle one goes.
    """

    def __init__(self, settings: Settings, planner: Planner, circuits: Circuits, tell: Teller) -> None:
        self._settings = settings
        self._planner = planner
        self._circuits = circuits
        self._tell = tell
        self._places: dict[PlaceKey, Place] = {}
        self._ending: dict[asyncio.Task[None], int] = {}
        """Workers that are about to end, and the bytes that this frees."""
        self._making_room = asyncio.Lock()
        self._closed = False
        self._released = asyncio.Event()

    # ---- what is there -------------------------------------------------------------------------

    def place(self, name: str, candidate: Candidate, task: Task = "generate") -> Place:
        """Return the candidate's place; ``name`` is what the model was asked for by."""
        place = self._places.setdefault((candidate.backend, candidate.model, task), Place(name, candidate, task))
        place.candidate = candidate
        place.names.add(name)
        return place

    def warm(self, task: Task = "generate") -> frozenset[Key]:
        """Return who is in memory and answers."""
        return frozenset(p.key for p in self._places.values() if p.answers and p.task == task)

    def features(self, candidate: Candidate, task: Task) -> frozenset[str] | None:
        """Return what a candidate can do: a fact where it is loaded, else its backend's guess; ``None``: not known."""
        place = self._places.get((candidate.backend, candidate.model, task))
        worker = place.worker if place is not None else None
        return worker.loaded.features if worker is not None and worker.loaded is not None else candidate.report.features

    def in_memory(self) -> InMemory:
        """Return what a decision needs to know of it. Safe to call from another thread."""
        places = list(self._places.values())
        holding = [p for p in places if p.answers or p in _reserved]  # who is loading can go afterwards
        evictable_bytes = sum(p.memory_bytes for p in holding) + sum(list(self._ending.values()))
        return InMemory(frozenset(p.key for p in places if p.answers), evictable_bytes)

    def loaded(self) -> tuple[LoadedStatus, ...]:
        """Return the models in memory, the latest used first."""
        workers = [(place, place.worker) for place in self._places.values() if place.worker and place.answers]
        workers.sort(key=lambda item: (item[1].running > 0, item[0].used_at), reverse=True)  # in use: used now
        return tuple(self.status(place, worker) for place, worker in workers)

    @staticmethod
    def status(place: Place, worker: Worker) -> LoadedStatus:
        """Return the state of a model that is loaded, by its ``worker``."""
        loaded = worker.loaded
        assert loaded is not None  # noqa: S101 - it answers
        return LoadedStatus(
            name=place.name,
            backend=place.candidate.backend,
            model=place.candidate.model,
            task=place.task,
            device=loaded.device,
            context_length=loaded.context_length,
            concurrency=loaded.concurrency,
            running=worker.running,
            features=tuple(sorted(loaded.features)),
            pid=worker.pid,
            resident_bytes=memory.resident_bytes(worker.pid) if worker.pid is not None else None,
            idle_s=0.0 if worker.running else time.monotonic() - place.used_at,
            warnings=place.warnings,
        )

    # ---- loading -------------------------------------------------------------------------------

    def fits(self, place: Place) -> bool:
        """Say whether it can be loaded, or is, without ending another."""
        return place.answers or self._fits(place)

    async def worker(self, place: Place, *, displaces: bool = True) -> Worker:
        """Return the place's worker, loading it unless it lives; requests that come meanwhile share the load.

        Raises ``BackendUnavailable`` where another one would have to go for it and it may not displace any.
        """
        if place.worker is not None and place.worker.answers:
            return place.worker
        if self._closed:
            raise EngineClosed
        if place.loading is None or place.loading.done():
            place.loading = asyncio.ensure_future(self._load(place, displaces=displaces))
            place.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        # Shielded: one caller who gives up must not end the load the others wait for.
        return await asyncio.shield(place.loading)

    async def _load(self, place: Place, *, displaces: bool) -> Worker:
        backend, model = place.key
        began = time.monotonic()
        failure: Failure | None = None
        try:
            async with self._making_room:
                if not displaces and not self._fits(place):  # it did a moment ago
                    reason = "there is no room for it beside what answers"
                    raise BackendUnavailable(f"{backend} is not tried", reasons={backend: reason})
                await self._make_room(place)
                _reserved[place] = place.memory_bytes
            worker = Worker(backend, on_end=lambda ended: self._died(place, ended), on_idle=lambda: self._freed(place))
            place.serial = worker.serial
            place.worker = await self._started(place, worker)
        except TarsError as error:
            failure = Failure.of(error)
            raise
        finally:
            _reserved.pop(place, None)
            self._released.set()
            self._tell(LoadProgressed(backend=backend, model=model, fraction=1.0))
            self._tell(LoadEnded(backend=backend, model=model, duration_s=time.monotonic() - began, failure=failure))
        _log.info("%s loaded: %s", backend, worker.loaded)
        self._tell(WorkerStarted(backend=backend, model=model, pid=worker.pid))
        place.used_at = time.monotonic()
        self._freed(place)  # all who asked for it may have left
        return worker

    async def _started(self, place: Place, worker: Worker) -> Worker:
        backend, model = place.key
        target, value = self._planner.plugin(backend)
        settings = self._settings
        options = LoadOptions(
            task=place.task,
            device=settings.require_device or settings.device,
            context_length=settings.context_length,
            threads=settings.threads,
            gpu_layers=settings.gpu_layers,
            concurrency=settings.concurrency,
            allow_download=settings.allow_download,
            backend_settings=self._planner.backend_settings(backend),
        )

        def on_progress(fraction: float, note: str) -> None:
            self._tell(LoadProgressed(backend=backend, model=model, fraction=fraction, note=note))

        try:
            loaded = await worker.load(
                Load(plugin=backend, target=target or "", model=model, options=options),
                limit_s=settings.limits.load_s,
                plugin=value if target is None or settings.isolation == "none" else None,
                python=settings.python,
                on_progress=on_progress,
            )
            if settings.require_device == "gpu" and loaded.device == "cpu":
                raise LoadFailed(f"{backend} loaded the model on the CPU, and a GPU is required")
        except BaseException:
            self._end(place, worker)
            raise
        place.warnings = tuple(self._warnings(backend, loaded))
        for warning in place.warnings:
            _log.warning("%s", warning)
        return worker

    def _warnings(self, backend: str, loaded: Loaded) -> Iterable[str]:
        if self._settings.device == "gpu" and loaded.device == "cpu":
            yield f"{backend} runs on the CPU, not on a GPU; require_device='gpu' forbids it"
        wanted = self._settings.context_length
        if wanted is not None and loaded.context_length < wanted:
            yield f"{backend} has a context of {loaded.context_length} tokens, not of {wanted}"

    # ---- making room ---------------------------------------------------------------------------

    async def _make_room(self, place: Place) -> None:
        """End the least recently used idle workers until ``place`` fits; wait for busy ones where only these are left.

        What a backend reckons is an estimate: where nobody can go, the load is tried all the same.
        """
        if place.worker is not None:
            self._end(place, place.worker)
        while not self._fits(place):
            if not place.waiting:
                raise LoadFailed("nobody waits for it any more")
            loaded = [p for p in self._places.values() if p.answers and p is not place]
            idle = sorted((p for p in loaded if p.idle), key=lambda p: p.used_at)
            if self._ending and not self._too_many(place):
                gone, _ = await asyncio.wait(self._ending, timeout=_END_S, return_when=asyncio.FIRST_COMPLETED)
                if not gone:  # they cannot be killed: their memory is not waited for
                    return
            elif idle and idle[0].worker is not None:
                _log.info("%s makes room for %s", idle[0].key, place.key)
                self._end(idle[0], idle[0].worker)
            elif loaded or any(p in _reserved for p in self._places.values()):  # idle before long
                self._released.clear()
                await self._released.wait()
            else:
                return

    def _fits(self, place: Place) -> bool:
        if self._too_many(place):
            return False
        free = memory.free_bytes()
        return free is None or place.memory_bytes <= free - sum(list(_reserved.values()))

    def _too_many(self, place: Place) -> bool:
        most = self._settings.max_loaded
        others = [p for p in self._places.values() if p is not place and (p.answers or p in _reserved)]
        return most is not None and len(others) >= most

    # ---- using and ending ----------------------------------------------------------------------

    def hold(self, place: Place) -> None:
        """Note that a request needs the place: it is not evicted."""
        place.waiting += 1

    def release(self, place: Place) -> None:
        """Note that a request needs the place no more."""
        place.waiting -= 1
        place.used_at = time.monotonic()
        self._freed(place)

    def _freed(self, place: Place) -> None:
        """Do what an idle worker allows: after a request, or when the worker has stopped one whose caller left."""
        self._released.set()
        self._retire(place)
        if (keep_s := self._settings.keep_alive) is not None and place.idle:
            asyncio.get_running_loop().call_later(keep_s, self._expire, place, place.used_at)

    def _retire(self, place: Place) -> None:
        """End idle workers that nobody is sent to, since they failed, where another one answers for their model."""
        now = time.monotonic()
        same = [p for p in self._places.values() if p.task == place.task and p.names & place.names and p.answers]
        if any(self._circuits.state(p.key, now) == "closed" for p in same):
            for other in same:
                if other.idle and other.worker is not None and self._circuits.state(other.key, now) != "closed":
                    self._end(other, other.worker)

    def _expire(self, place: Place, used_at: float) -> None:
        if place.idle and place.used_at == used_at and place.worker is not None:
            self._end(place, place.worker)

    async def unload(self, places: Iterable[Place]) -> None:
        """End workers, each when its requests are done; return when they are gone."""
        for place in list(places):
            if place.loading is not None and not place.loading.done():
                await asyncio.wait((place.loading,))
            while place.worker is not None and not place.idle:
                self._released.clear()
                await self._released.wait()
            if place.worker is not None:
                await asyncio.shield(self._end(place, place.worker))

    def find(self, name: str | None) -> list[Place]:
        """Return the places of a model, by the name it was asked for or the form that is loaded, or all."""
        if name is None:
            return list(self._places.values())
        ref = ModelRef.parse(name)
        return [p for p in self._places.values() if name in p.names or ref == p.candidate.model]

    def _died(self, place: Place, worker: Worker) -> None:
        """Count a worker's end that nobody asked for: once, however many requests it takes along."""
        error = worker.dead
        now = time.monotonic()
        died = isinstance(error, WorkerDied)
        if worker.loaded is not None and not worker.blameless:  # a load that fails is counted there
            self._circuits.failed(place.key, worker, now, incident=worker.serial, died=died)
        self._released.set()
        self._end(place, worker)

    def _end(self, place: Place, worker: Worker) -> asyncio.Task[None]:
        """End a worker behind everybody's back; nobody gets it any more from here on."""
        if place.worker is worker:  # else it never started, or its end was told
            place.worker = None
            failure = Failure.of(worker.dead) if isinstance(worker.dead, BackendError) else None
            backend, model = place.key
            self._tell(WorkerEnded(backend=backend, model=model, pid=worker.pid, failure=failure))
        ending = asyncio.ensure_future(worker.close())
        self._ending[ending] = place.memory_bytes
        ending.add_done_callback(self._ending.pop)
        return ending

    async def close(self) -> None:
        """End every worker; return when they are gone."""
        self._closed = True
        loading = [p.loading for p in self._places.values() if p.loading is not None and not p.loading.done()]
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        for place in self._places.values():
            if place.worker is not None:
                self._end(place, place.worker)
        await asyncio.gather(*self._ending)
        self._places.clear()
