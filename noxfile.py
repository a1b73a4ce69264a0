"""Every task of this repository. ``nox -l`` lists them; ``nox -s demo`` is where to begin."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False

ROOT = Path(__file__).parent
DEMO_PLUGINS = ["plugins/tars-xllamacpp", "plugins/tars-demo-model"]
TRANSFORMERS = "plugins/tars-transformers"
PLUGINS = [*DEMO_PLUGINS, "plugins/tars-llamacpp", "plugins/tars-ollama", TRANSFORMERS]
WHEELS = ROOT / "dist"
PLUGIN_SOURCES = [f"{plugin}/src" for plugin in PLUGINS]
CODE = ["tars_core", "plugins", "tests", "examples", "models", "benchmarks", "conftest.py", "noxfile.py"]
BENCHMARKS = [["startup"], ["engine"], ["throughput"]]
OTHER_PYTHONS = ["3.10", "3.13"]
RUN_FLAGS = ("--json", "--quiet", "-q")
DEMO_PROMPT = "¿Cuál es tu nombre?"


def _install(session: nox.Session, *arguments: str, group: str | None = None) -> None:
    """Install with this repository's pins. Every ``tars-*`` is named by its folder: no index can supply one."""
    tools = nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), group) if group else ()
    session.install("-c", "constraints.txt", *arguments, *tools)


def _install_editable(session: nox.Session, group: str, plugins: list[str]) -> None:
    _install(session, *(part for project in (".", *plugins) for part in ("-e", project)), group=group)


@nox.session
def demo(session: nox.Session) -> None:
    """Answer a question with the demo model. ``nox -s demo -- "another prompt"``, ``-- --backend NAME``."""
    _install(session, ".", *DEMO_PLUGINS)
    prompt = [] if _holds_a_prompt(session.posargs) else [DEMO_PROMPT]
    session.run("tars", "run", "--model", "demo:", "--temperature", "0", *session.posargs, *prompt)


def _holds_a_prompt(arguments: list[str]) -> bool:
    value_follows = False
    for argument in arguments:
        if not value_follows and not argument.startswith("-"):
            return True
        value_follows = not value_follows and "=" not in argument and argument not in RUN_FLAGS
    return False


@nox.session
def tests(session: nox.Session) -> None:
    """Install everything and run every test; arguments go to pytest. Then the core's on other Pythons, if present.

    The first time llama-cpp-python is compiled, 6 to 15 minutes on two cores, and torch is fetched; pip keeps both.
    """
    if sys.version_info >= (3, 11):
        _install_editable(session, "test", PLUGINS)
        session.run("pytest", *session.posargs)
    else:
        session.warn("transformers needs Python 3.11: its backend and the parity tests are left out")
        _install_editable(session, "test", [plugin for plugin in PLUGINS if plugin != TRANSFORMERS])
        session.run("pytest", f"--ignore={TRANSFORMERS}", "--ignore=tests/parity", *session.posargs)
    for version in OTHER_PYTHONS:
        session.notify(f"core_tests-{version}")


@nox.session(python=OTHER_PYTHONS)
def core_tests(session: nox.Session) -> None:
    """Run the core's tests on the oldest and the newest Python, without those that need every backend."""
    _install_editable(session, "test", DEMO_PLUGINS)
    others = ("parity", "test_docs.py", "test_four_backends.py", "test_install.py", "test_original_plan.py")
    session.run("pytest", "tests", *(f"--ignore=tests/{name}" for name in others), *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the form of the code and the direction of imports."""
    _install_editable(session, "lint", [])
    session.run("ruff", "check", *CODE)
    session.run("ruff", "format", "--check", *CODE)
    session.run("lint-imports", env={"PYTHONPATH": os.pathsep.join(PLUGIN_SOURCES)})  # read, not imported


@nox.session
def types(session: nox.Session) -> None:
    """Check the types, strictly."""
    _install_editable(session, "types", DEMO_PLUGINS)
    session.run("mypy", "tars_core", "conftest.py", "noxfile.py", "tests", "examples", "models/demo", *PLUGIN_SOURCES)
    session.run("mypy", "benchmarks")
    for plugin in PLUGINS:  # one by one: two plugins may have a test module of the same name
        session.run("mypy", f"{plugin}/tests")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure all; ``nox -s bench -- throughput --cells 8x60x64`` a part. See benchmarks/README.md."""
    _install(session, ".", "plugins/tars-llamacpp", *DEMO_PLUGINS, group="bench")
    for part, *arguments in [session.posargs] if session.posargs else BENCHMARKS:
        session.run("python", f"benchmarks/{part}.py", *arguments)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel of every distribution into ``dist/``."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    for project in (".", *PLUGINS):
        session.run("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(WHEELS), project)
    for wheel in sorted(WHEELS.iterdir()):
        session.log(f"{wheel.name}  {wheel.stat().st_size / 2**20:.1f} MiB")


@nox.session(name="train-demo")
def train_demo(session: nox.Session) -> None:
    """Train the demo model anew (half an hour on two cores) and measure it."""
    _install(session, group="train")
    session.run("python", "models/demo/train.py", *session.posargs)
    session.run("python", "models/demo/evaluate.py")
