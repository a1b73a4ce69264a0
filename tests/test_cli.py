"""The command line as a user meets it: real processes, pipes and a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tars_core import __version__
from tars_core.testing.fake import BackendScript, Echo, Finish, Kill, Mark, Raise, Say, Wait

TARS = [sys.executable, "-m", "tars_core.cli"]
WriteScript = Callable[..., str]


def tars(*arguments: str, stdin: bytes | None = None, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*TARS, *arguments],
        input=stdin,
        stdin=None if stdin is not None else subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, "TARS_PLUGINS": "alpha,beta", "COLUMNS": "80", **environment},
        timeout=60,
        check=False,
    )


def test_the_answer_alone_is_on_stdout(write_script: WriteScript) -> None:
    done = tars("run", "hi", "-m", write_script(alpha=BackendScript()))
    assert (done.returncode, done.stdout) == (0, b"hello\n")
    assert re.fullmatch(rb"alpha \xc2\xb7 fake:\S+ \xc2\xb7 cpu \xc2\xb7 first token [\d.]+ s\n", done.stderr)


def test_quiet_says_nothing_else(write_script: WriteScript) -> None:
    done = tars("run", "-q", "hi", "-m", write_script(alpha=BackendScript()))
    assert (done.stdout, done.stderr) == (b"hello\n", b"")


def test_the_prompt_may_be_piped_in(write_script: WriteScript) -> None:
    model = write_script(alpha=BackendScript(generate=(Echo(), Finish())))
    done = tars("run", "-m", model, stdin="¿qué?".encode())
    assert done.stdout.decode() == "¿qué?\n"


def test_a_system_prompt_reaches_the_model(write_script: WriteScript) -> None:
    model = write_script(alpha=BackendScript(generate=(Echo(), Finish())))
    assert tars("run", "hi", "-m", model, "-s", "be brief").stdout == b"be brief\n\nhi\n"


def test_a_model_that_no_backend_finds_when_it_loads_it_is_one_that_is_not_there(write_script: WriteScript) -> None:
    done = tars("run", "hi", "-m", write_script(alpha=BackendScript(load=(Raise("ModelNotFound", "not here"),))))
    assert (done.returncode, done.stdout) == (3, b"")


def test_without_stderr_the_answer_still_comes(write_script: WriteScript) -> None:
    command = f"exec {sys.executable} -m tars_core.cli run hi -m {write_script(alpha=BackendScript())} 2>&-"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "hello\n")


def test_json_gives_the_whole_result(write_script: WriteScript) -> None:
    dead = BackendScript(generate=(Kill(),))
    done = tars("run", "hi", "--json", "-m", write_script(alpha=dead, beta=BackendScript()))
    result = json.loads(done.stdout)
    assert (result["text"], result["backend"], result["finish_reason"]) == ("hello", "beta", "stop")
    assert result["attempts"][0]["failure"]["kind"] == "WorkerDied"
    assert result["model"].startswith("fake:")


def test_json_of_an_answer_that_broke_off_holds_what_there_was(write_script: WriteScript) -> None:
    broken = BackendScript(generate=(Say("so far"), Kill()))
    done = tars("run", "hi", "--json", "-m", write_script(alpha=broken))
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert (result["backend"], result["partial_text"]) == ("alpha", "so far")
    assert "SIGKILL" in result["error"]


def test_the_line_below_says_who_failed_before(write_script: WriteScript) -> None:
    done = tars("run", "hi", "-m", write_script(alpha=BackendScript(generate=(Kill(),)), beta=BackendScript()))
    assert done.returncode == 0
    assert "after alpha failed" in done.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run", ""], 2, "blank"),
        (["run", " "], 2, "blank"),
        (["run"], 2, "blank"),
        (["run", "hi", "--max-tokens", "0"], 2, "at least 1"),
        (["run", "hi", "--max-tokens", "many"], 2, "not a valid integer"),
        (["run", "hi", "--temperature", "nan"], 2, "[0, 10]"),
        (["run", "hi", "--seed", "-1"], 2, "seed"),
        (["run", "hi", "-m", "no/such/file.gguf"], 3, "there is no file no/such/file.gguf"),
        (["run", "hi", "-m", "."], 3, "holds no model"),
        (["run", "hi", "-b", "alfa"], 2, "did you mean alpha?"),
        (["run", "hi", "-m", "unknown:thing"], 3, "no backend can run unknown:thing"),
        (["run", "hi", "-m", ""], 2, "blank"),
        (["plan", "no/such/file.gguf"], 3, "there is no file"),
        (["run", "--no-such-option"], 2, "No such option"),
        (["sing"], 2, "No such command"),
    ],
)
def test_bad_input_gives_its_exit_code_a_reason_and_nothing_on_stdout(
    arguments: list[str], code: int, says: str
) -> None:
    done = tars(*arguments, stdin=b"")
    assert (done.returncode, done.stdout) == (code, b"")
    assert says in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_a_setting_of_the_wrong_type_names_its_variable() -> None:
    done = tars("run", "hi", TARS_CONCURRENCY="many")
    assert done.returncode == 2
    assert "TARS_CONCURRENCY" in done.stderr.decode()


def test_a_prompt_that_is_not_utf8_is_refused() -> None:
    done = tars("run", stdin=b"\xff\xfe")
    assert (done.returncode, done.stdout) == (2, b"")
    assert "UTF-8" in done.stderr.decode()


def test_when_the_backends_fail_the_exit_code_says_so_and_every_cause_is_listed(write_script: WriteScript) -> None:
    broken = BackendScript(load=(Raise("RuntimeError", "no such symbol"),))
    done = tars("run", "hi", "-m", write_script(alpha=broken, beta=BackendScript(generate=(Kill("SIGSEGV"),))))
    assert (done.returncode, done.stdout) == (1, b"")
    assert "no such symbol" in done.stderr.decode()
    assert "SIGSEGV" in done.stderr.decode()


def test_an_answer_that_breaks_off_keeps_its_text(write_script: WriteScript) -> None:
    done = tars("run", "hi", "-m", write_script(alpha=BackendScript(generate=(Say("so far"), Kill(), Finish()))))
    assert (done.returncode, done.stdout) == (1, b"so far\n")
    assert "SIGKILL" in done.stderr.decode()


@pytest.mark.parametrize("stage", ["load", "prompt", "stream"])
def test_38_ctrl_c_stops_at_once_and_keeps_the_text(write_script: WriteScript, tmp_path: Path, stage: str) -> None:
    pause = (Mark(str(tmp_path / "here")), Wait(60, deaf=True), Finish())
    script = {
        "load": BackendScript(load=pause[:2]),
        "prompt": BackendScript(generate=pause),
        "stream": BackendScript(generate=(Say("so far"), *pause)),
    }[stage]
    text = b"so far\n" if stage == "stream" else b""
    model = write_script(alpha=script)
    with subprocess.Popen(
        [*TARS, "run", "hi", "-m", model],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TARS_PLUGINS": "alpha"},
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        _wait_for(tmp_path / "here")
        head = os.read(process.stdout.fileno(), 100) if text else b""
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert time.monotonic() - began < 4
    assert (process.returncode, head + out) == (130, text)
    assert err.decode().strip() == "stopped"


def test_a_reader_that_goes_away_ends_the_command_quietly(write_script: WriteScript) -> None:
    model = write_script(alpha=BackendScript(generate=(*[Say("line\n")] * 5000, Finish())))
    command = f"{' '.join(TARS)} run -q hi -m {model} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        env={**os.environ, "TARS_PLUGINS": "alpha"},
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, b"line\n", b"")


def test_what_the_model_says_cannot_steer_the_terminal(write_script: WriteScript) -> None:
    model = write_script(alpha=BackendScript(generate=(Say("\x1b]0;owned\x07safe\tok"), Finish())))
    assert _on_a_terminal("run", "-q", "hi", "-m", model) == "]0;ownedsafe\tok\r\n"
    assert tars("run", "-q", "hi", "-m", model).stdout == b"\x1b]0;owned\x07safe\tok\n"


def test_an_ascii_terminal_gets_question_marks_instead_of_an_exception(write_script: WriteScript) -> None:
    model = write_script(alpha=BackendScript(generate=(Say("¡hola!"), Finish())))
    done = tars("run", "-q", "hi", "-m", model, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, b"?hola!\n")


def test_colour_is_for_terminals_without_no_color() -> None:
    assert "\x1b[" in _on_a_terminal("backends")
    assert "\x1b[" not in _on_a_terminal("backends", NO_COLOR="1")
    assert b"\x1b[" not in tars("backends").stdout


def test_backends_lists_every_plugin_with_its_state() -> None:
    done = tars("backends")
    assert done.returncode == 0
    assert [line.split() for line in done.stdout.decode().splitlines()] == [
        ["alpha", "available", "cpu", "1.0"],
        ["beta", "available", "cpu", "1.0"],
    ]
    assert [status["name"] for status in json.loads(tars("backends", "--json").stdout)] == ["alpha", "beta"]


def test_plan_shows_the_order_and_what_was_rejected_within_80_columns(write_script: WriteScript) -> None:
    off = BackendScript(available=False, reason="the daemon is off " * 8, hint="start it")
    done = tars("plan", write_script(alpha=off, beta=BackendScript()))
    lines = done.stdout.decode().splitlines()
    assert lines[1].startswith("1. beta")
    assert "-  alpha  not tried" in lines
    assert "    → start it" in lines
    assert max(len(line) for line in lines if "fake:" not in line) <= 80


def test_plan_as_json_holds_the_decision(write_script: WriteScript) -> None:
    plan = json.loads(tars("plan", "--json", write_script(alpha=BackendScript(), beta=BackendScript())).stdout)
    assert [c["backend"] for c in plan["candidates"]] == ["alpha", "beta"]


@pytest.mark.parametrize("command", [[], ["run"], ["backends"], ["plan"]])
def test_every_command_explains_itself_on_80_columns(command: list[str]) -> None:
    done = tars(*command, "--help")
    assert done.returncode == 0
    assert max(map(len, done.stdout.decode().splitlines())) <= 80


def test_version_is_printed_within_five_times_a_bare_interpreter() -> None:
    def seconds(*command: str) -> float:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *command], capture_output=True, check=True)
        assert command[0] == "-c" or done.stdout == f"tars {__version__}\n".encode()
        return time.perf_counter() - began

    # Alternating, and the best of each: other processes only ever add time.
    runs = [(seconds("-c", "pass"), seconds("-m", "tars_core.cli", "--version")) for _ in range(7)]
    bare, version = (min(column) for column in zip(*runs, strict=True))
    assert version <= 5 * bare, f"{version * 1000:.0f} ms against {bare * 1000:.0f} ms"


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} did not appear"
        signal.sigtimedwait((), 0.05)


def _on_a_terminal(*arguments: str, **environment: str) -> str:
    """Run a command with stdout on a pseudo-terminal; return what it wrote there."""
    ours, theirs = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    with subprocess.Popen(
        [*TARS, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env={**env, "TARS_PLUGINS": "alpha,beta", **environment},
    ) as process:
        os.close(theirs)
        written = b""
        try:
            while chunk := os.read(ours, 4096):
                written += chunk
        except OSError:  # EIO: how Linux tells that the other end is closed
            pass
        assert process.wait(timeout=60) == 0
    os.close(ours)
    return written.decode()
