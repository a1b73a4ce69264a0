"""The commands and their options."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import click

from tars_core import errors
from tars_core._version import __version__
from tars_core.cli import output

if TYPE_CHECKING:
    from tars_core.engine import InferenceEngine, Sampling

_FAILED, _WRONG, _NOTHING_RUNS = 1, 2, 3

F = TypeVar("F", bound=Callable[..., object])


def run(arguments: Sequence[str]) -> int:
    """Run one command; return its exit code. Errors of TARS and of the command line are printed here."""
    try:
        cli.main(list(arguments), prog_name="tars", standalone_mode=False)
    except errors.TarsError as error:
        _print_error(error)
        return _exit_code(error)
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return 0


def _exit_code(error: errors.TarsError) -> int:
    match error:
        case errors.RequestError() | errors.ConfigError():
            return _WRONG
        case errors.BackendUnavailable() | errors.ModelNotFound():
            return _NOTHING_RUNS
    return _FAILED


def _print_error(error: errors.TarsError) -> None:
    click.echo(click.style("error: ", fg="red", bold=True) + str(error), err=True)


def _model_options(command: F) -> F:
    """Add the options that say what runs where."""
    for option in (
        click.option("-b", "--backend", metavar="NAME", help="Use this backend and no other."),
        click.option("-m", "--model", metavar="MODEL", help="A path, a reference such as demo:, or an alias."),
    ):
        command = option(command)
    return command


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done; 1 the backends failed; 2 wrong request or setting; 3 nothing can run; 130 Ctrl-C.",
)
@click.version_option(__version__, "-V", "--version", message="tars %(version)s")
@click.option("-v", "--verbose", count=True, help="Say what happens on stderr; twice: the backends' own words too.")
@click.pass_context
def cli(context: click.Context, verbose: int) -> None:
    """Answer with a local language model, on the best engine this machine has."""
    if "NO_COLOR" in os.environ:
        context.color = False
    if verbose:
        logging.basicConfig(
            stream=sys.stderr, level=logging.INFO if verbose == 1 else logging.DEBUG, format="%(name)s: %(message)s"
        )
        logging.getLogger("asyncio").setLevel(logging.WARNING)


@cli.command("run")
@click.argument("prompt", required=False)
@_model_options
@click.option("-s", "--system", metavar="TEXT", help="The system prompt.")
@click.option("--max-tokens", type=int, metavar="N", help="Length of the answer at most.  [default: 200]")
@click.option("--temperature", type=float, metavar="T", help="0 is always the likeliest token.  [default: 0.8]")
@click.option("--seed", type=int, metavar="N", help="Makes sampling repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON, at the end.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
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
    """Answer PROMPT; without one, what is piped in."""
    from tars_core.cli import answer  # noqa: PLC0415 - each command imports what it needs

    sampling: Sampling = {}
    if max_tokens is not None:
        sampling["max_tokens"] = max_tokens
    if temperature is not None:
        sampling["temperature"] = temperature
    if seed is not None:
        sampling["seed"] = seed
    text = prompt if prompt is not None else answer.piped_prompt()
    with _engine(model, backend) as engine:
        if as_json:
            answer.as_json(engine, text, system, sampling)
        else:
            answer.streamed(engine, text, system, sampling, quiet=quiet)


@cli.command("backends")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def backends_command(*, as_json: bool) -> None:
    """List the plugins: available, or why not."""
    from tars_core.cli import listing  # noqa: PLC0415

    with _engine(None, None) as engine:
        listing.backends(engine.backends(), as_json=as_json)


@cli.command("plan")
@click.argument("model", required=False)
@click.option("-b", "--backend", metavar="NAME", help="Use this backend and no other.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan_command(model: str | None, backend: str | None, *, as_json: bool) -> None:
    """Show what would answer, in which order, and why."""
    from tars_core.cli import listing  # noqa: PLC0415

    with _engine(model, backend) as engine:
        listing.plan(engine.plan(), as_json=as_json)


def _engine(model: str | None, backend: str | None) -> InferenceEngine:
    from tars_core.engine import InferenceEngine  # noqa: PLC0415 - --help and --version go without

    output.claim_stdout()
    return InferenceEngine(model=model, backend=backend)
