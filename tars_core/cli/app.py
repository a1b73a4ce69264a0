"""The commands and their options."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from tars_core._version import __version__
from tars_core.cli import output
from tars_core.types import errors
from tars_core.types.failures import AllBackendsFailed

if TYPE_CHECKING:
    from tars_core.cli.progress import LoadBar
    from tars_core.config.settings import Settings
    from tars_core.engine import InferenceEngine, Sampling

_FAILED, _WRONG, _NOTHING_RUNS = 1, 2, 3

F = TypeVar("F", bound=Callable[..., object])


def run(arguments: Sequence[str]) -> int:
    """Run one command; return its exit code. Errors of TARS and of the command line are printed here."""
    try:
        code: int | None = cli.main(list(arguments), prog_name="tars", standalone_mode=False)
    except errors.TarsError as error:
        click.echo(click.style("error: ", fg="red", bold=True) + str(error), err=True, color=_colour())
        return _exit_code(error)
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return code or 0


def _colour() -> bool | None:
    """Return ``False`` where ``NO_COLOR`` is set (no-color.org), else leave it to whether a person reads."""
    return False if os.environ.get("NO_COLOR") else None


def _exit_code(error: errors.TarsError) -> int:
    match error:
        case errors.RequestError() | errors.ConfigError():
            return _WRONG
        case errors.BackendUnavailable() | errors.ModelNotFound():
            return _NOTHING_RUNS
        case AllBackendsFailed(attempts=attempts) if {a.failure.kind for a in attempts if a.failure} == {
            "ModelNotFound"
        }:
            return _NOTHING_RUNS
    return _FAILED


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_backend = click.option("-b", "--backend", metavar="NAME", help="Use this backend and no other.")
_model = click.option("-m", "--model", metavar="MODEL", help="A path, a reference such as demo:, or an alias.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_answering = _options(
    _model,
    _backend,
    click.option("-s", "--system", metavar="TEXT", help="The system prompt."),
    click.option("--max-tokens", type=int, metavar="N", help="Maximum length of the answer in tokens.  [default: 200]"),
    click.option(
        "--temperature", type=float, metavar="T", help="0 always picks the most likely token.  [default: 0.8]"
    ),
    click.option("--seed", type=int, metavar="N", help="Seed for repeatable sampling."),
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done; 1 the backends failed; 2 wrong request or setting; 3 nothing can run; 130 Ctrl-C;"
    " 141 broken pipe.",
)
@click.version_option(__version__, "-V", "--version", message="tars %(version)s")
@click.option("-v", "--verbose", count=True, help="Log to stderr; -vv also shows what the backends print.")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="An additional settings file.")
@click.pass_context
def cli(context: click.Context, verbose: int, config: Path | None) -> None:
    """Answer with a local language model, on the best engine this machine has."""
    context.obj = config
    context.color = _colour()
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(
        stream=sys.stderr, level=level, format="%(name)s: %(message)s" if verbose else "note: %(message)s"
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)


@cli.command("run")
@click.argument("prompt", required=False)
@_answering
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON, at the end.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors on stderr.")
def run_command(  # noqa: PLR0913, PLR0917 - one parameter an option
    prompt: str | None,
    model: str | None,
    backend: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Answer PROMPT; without one, or with -, read it from stdin."""
    from tars_core.cli import answer  # noqa: PLC0415 - each command imports what it needs
    from tars_core.cli.progress import LoadBar  # noqa: PLC0415

    text = answer.piped_prompt() if prompt is None or prompt == "-" else prompt
    with LoadBar(shown=not quiet) as bar, _engine(model, backend, bar) as engine:
        sampling = _sampling(max_tokens, temperature, seed)
        if as_json:
            answer.as_json(engine, text, system, sampling)
        else:
            answer.streamed(engine, text, system, sampling, bar, quiet=quiet)


@cli.command("chat")
@_answering
def chat_command(  # noqa: PLR0913, PLR0917 - one parameter an option
    model: str | None,
    backend: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
) -> None:
    """Chat interactively; type /help for commands."""
    from tars_core.cli import chat  # noqa: PLC0415
    from tars_core.cli.progress import LoadBar  # noqa: PLC0415

    bar = LoadBar(shown=True)
    with _engine(model, backend, bar) as engine:
        talked = chat.Conversation(engine, bar, system, _sampling(max_tokens, temperature, seed)).run()
    if not talked and not sys.stdin.isatty():
        click.get_current_context().exit(_FAILED)


@cli.command("backends")
@_json
def backends_command(*, as_json: bool) -> None:
    """List the plugins: available, or why not."""
    from tars_core.cli import listing  # noqa: PLC0415
    from tars_core.planning.planner import Planner  # noqa: PLC0415 - what engine.backends() asks, without asyncio: 0.1 s less

    output.claim_stdout()
    listing.backends(Planner(_settings(None, None), {}).statuses(), as_json=as_json)


@cli.command("models")
@_json
def models_command(*, as_json: bool) -> None:
    """List the models known by name."""
    from tars_core.cli import listing  # noqa: PLC0415

    with _engine(None, None) as engine:
        listing.models(engine.models(), as_json=as_json)


@cli.command("ps")
@_json
def ps_command(*, as_json: bool) -> None:
    """List the models in memory, of all programs that use TARS."""
    from tars_core.cli import ps  # noqa: PLC0415

    output.claim_stdout()
    ps.show(as_json=as_json)


@cli.command("plan")
@click.argument("model", required=False)
@_backend
@_json
def plan_command(model: str | None, backend: str | None, *, as_json: bool) -> None:
    """Show which backends would be tried, in which order, and why."""
    from tars_core.cli import listing  # noqa: PLC0415

    with _engine(model, backend) as engine:
        listing.plan(engine.plan(), as_json=as_json)


@cli.command("benchmark")
@click.argument("model", required=False)
@_backend
@_json
def benchmark_command(model: str | None, backend: str | None, *, as_json: bool) -> None:
    """Measure the backends; the speeds count in ranking."""
    from tars_core.cli import measure  # noqa: PLC0415

    output.claim_stdout()
    if not measure.benchmark(_settings(model, backend), as_json=as_json):
        click.get_current_context().exit(_FAILED)


@cli.command("doctor")
@_json
def doctor_command(*, as_json: bool) -> None:
    """Print everything a bug report needs; secrets are masked."""
    from tars_core.cli import doctor  # noqa: PLC0415
    from tars_core.config.settings import Settings  # noqa: PLC0415

    output.claim_stdout()
    try:
        settings, trouble = _settings(None, None), None
    except errors.ConfigError as error:  # the very moment one asks the doctor
        settings, trouble = Settings(), str(error)
    doctor.report(settings, trouble, as_json=as_json)


@cli.group("config")
def config_group() -> None:
    """Show the settings."""


@config_group.command("show")
@_json
def config_show_command(*, as_json: bool) -> None:
    """Show every setting and where its value comes from."""
    from tars_core.cli import listing  # noqa: PLC0415

    output.claim_stdout()
    listing.settings(_settings(None, None), as_json=as_json)


def _sampling(max_tokens: int | None, temperature: float | None, seed: int | None) -> Sampling:
    sampling: Sampling = {}
    if max_tokens is not None:
        sampling["max_tokens"] = max_tokens
    if temperature is not None:
        sampling["temperature"] = temperature
    if seed is not None:
        sampling["seed"] = seed
    return sampling


def _settings(model: str | None, backend: str | None) -> Settings:
    """Gather the settings; only the command line reads those of the current folder."""
    from tars_core.config.gather import load_settings  # noqa: PLC0415 - --help and --version go without

    flags = {key: value for key, value in (("model", model), ("backend", backend)) if value is not None}
    try:
        folder = Path.cwd()
    except FileNotFoundError:
        raise errors.ConfigError("the current folder has been removed", hint="change to another one") from None
    return load_settings(flags, file=click.get_current_context().find_object(Path), folder=folder)


@contextmanager
def _engine(model: str | None, backend: str | None, bar: LoadBar | None = None) -> Iterator[InferenceEngine]:
    from tars_core.engine import InferenceEngine  # noqa: PLC0415

    output.claim_stdout()
    with InferenceEngine(_settings(model, backend), on_load=bar.update if bar is not None else None) as engine:
        yield engine
