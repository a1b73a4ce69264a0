"""The documentation cannot drift: every command, option, setting and hook is in it, and its examples run."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tars_core import hookspecs
from tars_core.cli.app import cli
from tars_core.config.settings import Settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("plugins/*/*.md"), *ROOT.glob("examples/*/*.md")]
PAGES += [*ROOT.glob("models/*/*.md")]


def _commands(group: click.Group, prefix: str = "tars") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


@pytest.mark.parametrize(("name", "command"), list(_commands(cli)), ids=str)
def test_every_command_and_option_is_documented(name: str, command: click.Command) -> None:
    sections = re.split(r"^## ", (DOCS / "cli.md").read_text("utf-8"), flags=re.MULTILINE)
    (section,) = [s for s in sections if s.startswith(name)]
    for parameter in command.params:
        for option in parameter.opts if isinstance(parameter, click.Option) else [parameter.human_readable_name]:
            assert re.search(rf"(?<![-\w]){re.escape(option)}(?![-\w])", section), f"{option} of {name}"


def test_every_option_of_tars_itself_is_documented() -> None:
    page = (DOCS / "cli.md").read_text("utf-8")
    assert [option for parameter in cli.params for option in parameter.opts if f"`{option}" not in page] == []


def test_every_setting_is_documented_with_its_default() -> None:
    page = (DOCS / "configuration.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|", page, flags=re.MULTILINE))
    assert set(rows) == {key for key, _ in Settings().listed()}
    for key, value in Settings().listed():
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert rows[key] == f"{value:g}", key


@pytest.mark.parametrize("hook", [name for name in vars(hookspecs.TarsSpec) if name.startswith("tars_")])
def test_every_hook_is_documented_with_its_arguments(hook: str) -> None:
    arguments = [a for a in inspect.signature(getattr(hookspecs.TarsSpec, hook)).parameters if a != "self"]
    assert f"`{hook}({', '.join(arguments)})`" in (DOCS / "plugins.md").read_text("utf-8")
    assert getattr(hookspecs.TarsSpec, hook).__doc__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "README.es.md", DOCS / "quickstart.md"], ids=lambda p: p.name
)
def test_the_python_examples_run(page: Path, tmp_path: Path) -> None:
    for example in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL):
        done = subprocess.run(
            [sys.executable, "-c", example], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False
        )
        assert done.returncode == 0, f"{example}\n{done.stderr}"
        assert done.stdout.strip() or "partial_text" in example, example
