"""``tars doctor``: all that a bug report needs, and no secret."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys

from tars_core._version import __version__
from tars_core.cli import output
from tars_core.cli.plain import dump
from tars_core.config.settings import Settings, cache_folder, user_file
from tars_core.engine import InferenceEngine
from tars_core.system import memory
from tars_core.types.public import Public
from tars_core.types.reports import BackendStatus

_GIB = 2**30
_RUNTIMES = ("llama-cpp-python", "xllamacpp", "ollama", "transformers", "torch", "pluggy", "pydantic", "msgspec")
_VARIABLES = re.compile(
    r"^(TARS_|OLLAMA_|HF_|CUDA_|HIP_|GGML_|OMP_|LLAMA_|https?_proxy|all_proxy|no_proxy)", re.IGNORECASE
)
_SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/@\s]*@")


class Report(Public, frozen=True, kw_only=True):
    """What is reported."""

    tars: str
    python: str
    platform: str
    cpus: int
    free_memory_gib: float | None
    packages: dict[str, str]
    plugins: tuple[BackendStatus, ...]
    settings_error: str | None
    settings: dict[str, str]
    """Those that are no defaults, with their origins."""
    environment: dict[str, str]
    settings_file: str
    cache_folder: str


def report(settings: Settings, trouble: str | None, *, as_json: bool) -> None:
    """Print the report; ``trouble`` is what is wrong with the settings, if they could not be read."""
    with InferenceEngine(settings) as engine:
        plugins = engine.backends()
    free = memory.free_bytes()
    found = Report(
        tars=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        cpus=os.cpu_count() or 1,
        free_memory_gib=round(free / _GIB, 1) if free is not None else None,
        packages={name: version for name in _RUNTIMES if (version := _version(name))},
        plugins=plugins,
        settings_error=trouble,
        settings={
            key: f"{masked(key, str(value))}  ({settings.origin(key)})"
            for key, value in settings.listed()
            if settings.origin(key) != "default"
        },
        environment={k: masked(k, v) for k, v in sorted(os.environ.items()) if _VARIABLES.match(k)},
        settings_file=f"{user_file()} ({'found' if user_file().is_file() else 'not found'})",
        cache_folder=str(cache_folder()),
    )
    output.write(dump(found) if as_json else _text(found))


def masked(name: str, value: str) -> str:
    """Return ``value`` fit to be shown: no secret, and no password inside an address."""
    return "***" if value and _SECRET.search(name) else _USERINFO.sub("***@", value)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(found: Report) -> str:
    lines = [
        f"tars-core {found.tars}, Python {found.python}",
        f"{found.platform}, {found.cpus} CPUs, {found.free_memory_gib} GiB free",
        f"settings file {found.settings_file}",
        f"cache {found.cache_folder}",
        "packages: " + ", ".join(f"{name} {version}" for name, version in found.packages.items()),
        *([f"settings error: {found.settings_error}"] if found.settings_error else []),
        "plugins:" if found.plugins else "plugins: none",
    ]
    for plugin in found.plugins:
        state = (
            "put aside"
            if plugin.quarantined
            else {None: "brings a model", True: "available", False: "unavailable"}[plugin.available]
        )
        reason = f": {plugin.reason}" if plugin.reason else ""
        lines.append(f"  {plugin.name} {plugin.version} {state}{reason}")
    for title, values in (
        ("settings that differ from the defaults", found.settings),
        ("environment", found.environment),
    ):
        lines.append(f"{title}:" if values else f"{title}: none")
        lines += [f"  {name} = {value}" for name, value in values.items()]
    return "\n".join(lines) + "\n"
