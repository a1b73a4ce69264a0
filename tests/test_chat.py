"""A conversation at a real terminal, and over a pipe."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tars_core.testing.fake import BackendScript, Echo, Finish, Kill, Overflow, Say, Wait

WriteScript = Callable[..., str]
TURNS = "{% for m in messages %}{{ m.role[0] }}={{ m.content }};{% endfor %}"
ECHO = BackendScript(generate=(Echo(), Finish()), chat_template=TURNS)


class Terminal:
    """``tars chat`` on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._fd, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tars_core.cli", "chat", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TARS_PLUGINS": "alpha", "TERM": "xterm", "COLUMNS": "80"},
            start_new_session=True,
            # Makes it the controlling terminal, which Ctrl-C needs; nothing but a system call between fork and exec.
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # noqa: PLW1509
        )
        os.close(theirs)
        self._seen = ""

    def insist(self, text: str, pattern: str) -> None:
        """Type ``text`` until ``pattern`` is seen.

        CPython waits for the next key where Ctrl-C comes just between its prompt and its wait for keys.
        """
        for _ in range(5):
            self.type(text)
            try:
                self.expect(pattern, seconds=2)
            except AssertionError:
                continue
            return
        raise AssertionError(f"{pattern!r} did not come however often {text!r} was typed")

    def expect(self, pattern: str, seconds: float = 30) -> str:
        """Read until ``pattern`` is seen; return what came up to its end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self._seen)):
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not come; seen: {self._seen!r}"
            try:
                self._seen += os.read(self._fd, 4096).decode()
            except OSError as error:  # EIO: the other end is closed
                raise AssertionError(f"{pattern!r} did not come; seen: {self._seen!r}") from error
        text, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def end(self) -> int:
        """Close the terminal; return the exit code."""
        code = self.process.wait(timeout=20)
        os.close(self._fd)
        return code


@pytest.fixture
def chat(write_script: WriteScript) -> Iterator[Callable[[BackendScript], Terminal]]:
    opened: list[Terminal] = []

    def open_chat(script: BackendScript) -> Terminal:
        opened.append(Terminal("-m", write_script(alpha=script)))
        opened[-1].expect("> ")
        return opened[-1]

    yield open_chat
    for terminal in opened:
        terminal.process.kill()
        terminal.process.wait()


def test_every_turn_knows_the_ones_before(chat: Callable[[BackendScript], Terminal]) -> None:
    terminal = chat(ECHO)
    terminal.type("one\r")
    terminal.expect("u=one;")
    terminal.type("two\r")
    terminal.expect(re.escape("u=one;a=u=one;;u=two;"))
    terminal.type("/new\rthree\r")
    terminal.expect("\nu=three;")
    terminal.type("/system be brief\rfour\r")
    terminal.expect("\ns=be brief;u=four;")
    terminal.type("/stats\r")
    terminal.expect("alpha · fake:")
    terminal.type("/quit\r")
    assert terminal.end() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(chat: Callable[[BackendScript], Terminal]) -> None:
    terminal = chat(BackendScript(generate=(Say("so far"), Wait(60), Finish())))
    terminal.type("tell me\r")
    terminal.expect("so far")
    began = time.monotonic()
    terminal.type("\x03")
    terminal.expect(r"\(stopped\)")
    terminal.expect("> ")
    assert time.monotonic() - began < 3
    terminal.insist("\x03", r"Ctrl-D or /quit leaves\)\s+> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_a_turn_that_fails_is_taken_back_and_the_conversation_goes_on(
    chat: Callable[[BackendScript], Terminal], tmp_path: Path
) -> None:
    terminal = chat(BackendScript(generate=(Kill(once=str(tmp_path / "died")), Echo(), Finish()), chat_template=TURNS))
    terminal.type("one\r")
    terminal.expect("SIGKILL")
    terminal.type("two\r")
    terminal.expect("[K\n]u=two;\\s+> ")
    terminal.type("/quit\r")
    assert terminal.end() == 0


def test_a_conversation_that_outgrows_the_context_says_how_to_go_on(chat: Callable[[BackendScript], Terminal]) -> None:
    terminal = chat(BackendScript(generate=(Overflow(),)))
    terminal.type("one\r")
    terminal.expect("/new starts a new conversation")
    terminal.type("/nonsense\r")
    terminal.expect("there is no /nonsense; /help lists")
    terminal.type("/help\r")
    terminal.expect("Ctrl-C stops[^>]+> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_what_was_typed_is_there_again_the_next_time(
    chat: Callable[[BackendScript], Terminal], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    first = chat(ECHO)
    first.type("remember this\r")
    first.expect("u=remember this;\\s+> ")
    first.type("\x04")
    assert first.end() == 0
    second = chat(ECHO)
    second.type("\x1b[A\r")
    second.expect("u=remember this;\\s+> ")
    second.type("\x04")
    assert second.end() == 0


def piped(text: str, model: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tars_core.cli", "chat", "-m", model],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, "TARS_PLUGINS": "alpha"},
        timeout=60,
        check=False,
    )


def test_over_a_pipe_each_line_is_a_turn_and_stdout_holds_the_answers_alone(write_script: WriteScript) -> None:
    done = piped("one\n\ntwo\n", write_script(alpha=ECHO))
    assert (done.returncode, done.stdout, done.stderr) == (0, "u=one;\nu=one;a=u=one;;u=two;\n", "")


def test_over_a_pipe_a_turn_that_was_not_answered_shows_in_the_exit_code(
    write_script: WriteScript, tmp_path: Path
) -> None:
    script = BackendScript(generate=(Kill(once=str(tmp_path / "died")), Echo(), Finish()), chat_template=TURNS)
    done = piped("one\ntwo\n", write_script(alpha=script))
    assert (done.returncode, done.stdout) == (1, "u=two;\n")


def test_over_a_pipe_ctrl_c_ends_the_program_while_it_waits_for_a_line(write_script: WriteScript) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tars_core.cli", "chat", "-m", write_script(alpha=ECHO)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TARS_PLUGINS": "alpha"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"one\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"u=one;\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


def test_the_loading_bar_leaves_the_prompt_alone_once_nobody_waits(chat: Callable[[BackendScript], Terminal]) -> None:
    terminal = chat(BackendScript(load=(Wait(2, deaf=True),)))
    terminal.type("tell me\r")
    terminal.expect("reading the script")
    terminal.type("\x03")
    terminal.expect(r"\(stopped\)")
    terminal.expect("> ")
    with pytest.raises(AssertionError):
        terminal.expect(".", seconds=3)


def test_the_terminal_is_as_it_was_when_the_program_is_ended_from_outside(
    chat: Callable[[BackendScript], Terminal],
) -> None:
    terminal = chat(BackendScript(generate=(Say("so far"), Wait(60), Finish())))
    terminal.type("tell me\r")
    terminal.expect("so far")
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.end() == -signal.SIGTERM
