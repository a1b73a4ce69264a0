"""The commands that look at things: models, benchmark, doctor, config show; and the bar while a model loads."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tars_core.testing.fake import BackendScript, Finish, Raise, Say, Wait

WriteScript = Callable[..., str]


def tars(
    *arguments: str, cwd: Path | None = None, code: int = 0, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tars_core.cli", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "TARS_PLUGINS": "alpha,beta", "COLUMNS": "80", **(environment or {})},
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def test_config_show_gives_each_value_with_its_origin(tmp_path: Path) -> None:
    (tmp_path / "tars.toml").write_text("max_queue = 9\n[models]\nmine = ['a.gguf', 'demo:']\n")
    (tmp_path / ".env").write_text("TARS_THREADS=2\nOTHER=1\n")
    (tmp_path / "named.toml").write_text("threads = 5\nconcurrency = 3\n")
    lines = tars(
        "--config", "named.toml", "config", "show", cwd=tmp_path, environment={"TARS_DEVICE": "cpu"}
    ).stdout.splitlines()
    assert f"max_queue = 9  # {tmp_path}/tars.toml" in lines
    assert f'models.mine = ["a.gguf", "demo:"]  # {tmp_path}/tars.toml' in lines
    assert f"threads = 2  # {tmp_path}/.env: TARS_THREADS" in lines
    assert "concurrency = 3  # named.toml" in lines
    assert 'device = "cpu"  # environment variable TARS_DEVICE' in lines
    assert 'isolation = "process"  # default' in lines


def test_config_show_as_json() -> None:
    shown = json.loads(tars("config", "show", "--json").stdout)
    assert shown["limits.load_s"] == {"value": 300.0, "origin": "default"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("thread = 2", "did you mean threads?"),
        ("threads = 0", "tars.toml"),
        ("threads = ", "tars.toml cannot be read"),
        ("[limits]\nlod_s = 2", "did you mean limits.load_s?"),
    ],
)
def test_a_wrong_settings_file_names_the_file_and_the_mend(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "tars.toml").write_text(text)
    done = tars("config", "show", cwd=tmp_path, code=2)
    assert says in done.stderr
    assert done.stdout == ""


def test_a_name_in_the_settings_that_no_plugin_has_is_pointed_out(tmp_path: Path, write_script: WriteScript) -> None:
    (tmp_path / "tars.toml").write_text("prefer = ['alpa']\n[use]\nbetta = false\n")
    done = tars("run", "hi", "-m", write_script(alpha=BackendScript()), cwd=tmp_path)
    assert done.stdout == "hello\n"
    assert "names alpa, which is not installed; did you mean alpha?" in done.stderr
    assert "names betta, which is not installed; did you mean beta?" in done.stderr


def test_doctor_works_where_the_settings_do_not(tmp_path: Path) -> None:
    (tmp_path / "tars.toml").write_text("modle = 'x'\n")
    assert "settings error: unknown setting modle" in tars("doctor", cwd=tmp_path).stdout


def test_an_alias_that_lost_its_first_form_says_so(tmp_path: Path, write_script: WriteScript) -> None:
    script = write_script(alpha=BackendScript())
    (tmp_path / "tars.toml").write_text(f"[models]\nmine = ['no/such.gguf', '{script}']\n")
    for command in (["run", "hi", "-m", "mine"], ["plan", "mine"]):
        assert "there is no file no/such.gguf: going on without" in tars(*command, cwd=tmp_path).stderr


def test_output_that_cannot_be_written_is_one_line(write_script: WriteScript) -> None:
    command = f"{sys.executable} -m tars_core.cli run -q hi -m {write_script(alpha=BackendScript())} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the output cannot be written: No space left on device")


def test_verbose_says_what_happens(write_script: WriteScript) -> None:
    done = tars("-v", "run", "-q", "hi", "-m", write_script(alpha=BackendScript()))
    assert "asking alpha for fake:" in done.stderr
    assert "alpha loaded" in done.stderr


def test_a_settings_file_that_is_not_there_is_an_error() -> None:
    assert "there is no settings file nope.toml" in tars("--config", "nope.toml", "backends", code=2).stderr


def test_models_lists_aliases_and_says_which_forms_are_missing(tmp_path: Path, write_script: WriteScript) -> None:
    script = write_script(alpha=BackendScript())
    (tmp_path / "tars.toml").write_text(f"[models]\nmine = ['{script}', 'no/such.gguf']\n")
    assert tars("models", cwd=tmp_path).stdout == f"mine\n    {script}\n    no/such.gguf  (not there)\n"
    assert json.loads(tars("models", "--json", cwd=tmp_path).stdout)[0]["refs"] == [script, "no/such.gguf"]
    assert tars("run", "-q", "hi", "-m", "mine", cwd=tmp_path).stdout == "hello\n"


def test_benchmark_measures_each_backend_and_ranking_follows(write_script: WriteScript, tmp_path: Path) -> None:
    slow = BackendScript(generate=(Say("a"), Wait(0.2), Say("b"), Finish()), preference=90)
    quick = BackendScript(generate=(Say("a"), Wait(0.02), Say("b"), Finish()), preference=10)
    model = write_script(alpha=slow, beta=quick)
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    before = json.loads(tars("plan", "--json", model, environment=environment).stdout)
    assert [c["backend"] for c in before["candidates"]] == ["alpha", "beta"]
    measured = json.loads(tars("benchmark", "--json", model, environment=environment).stdout)["backends"]
    assert [m["backend"] for m in measured] == ["alpha", "beta"]
    assert 0 < measured[0]["tokens_per_s"] < measured[1]["tokens_per_s"]
    after = json.loads(tars("plan", "--json", model, environment=environment).stdout)
    assert [c["backend"] for c in after["candidates"]] == ["beta", "alpha"]
    assert any("measured" in reason for reason in after["candidates"][0]["reasons"])


def test_a_measured_speed_belongs_to_the_model_and_not_to_what_it_was_called(
    write_script: WriteScript, tmp_path: Path
) -> None:
    quick = BackendScript(generate=(Say("a"), Wait(0.02), Say("b"), Finish()))
    model, other = write_script(alpha=quick), write_script(alpha=quick)
    (tmp_path / "tars.toml").write_text(f"[models]\nmine = ['{model}']\n")
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    tars("benchmark", model, environment=environment, cwd=tmp_path)
    assert "tokens/s" in tars("plan", "mine", environment=environment, cwd=tmp_path).stdout
    assert "tokens/s" not in tars("plan", other, environment=environment, cwd=tmp_path).stdout


def test_benchmark_fails_where_no_backend_answers(write_script: WriteScript) -> None:
    broken = BackendScript(generate=(Raise("GenerationFailed", "no"),))
    assert "failed" in tars("benchmark", write_script(alpha=broken), code=1).stdout


def test_benchmark_draws_a_table_and_names_what_failed(write_script: WriteScript) -> None:
    broken = BackendScript(load=(Raise("LoadFailed", "no such symbol"),))
    done = tars("benchmark", write_script(alpha=BackendScript(), beta=broken))
    lines = done.stdout.splitlines()
    assert lines[2].startswith("alpha")
    assert "failed" in lines[3]
    assert "no such symbol" in lines[3]
    assert done.stderr == ""


def test_doctor_tells_versions_plugins_and_settings_and_no_secret(tmp_path: Path) -> None:
    (tmp_path / "tars.toml").write_text("[backends.absent]\napi_key = 'hunter2'\nhost = 'http://me:pw@there:1'\n")
    secrets = {"HF_TOKEN": "hunter2", "https_proxy": "http://user:hunter2@proxy:3128", "OLLAMA_API_KEY": "hunter2"}
    done = tars("doctor", cwd=tmp_path, environment=secrets)
    assert "hunter2" not in done.stdout + done.stderr
    assert "http://***@there:1" in done.stdout
    assert "https_proxy = http://***@proxy:3128" in done.stdout
    for part in ("tars-core ", "Python 3.", "alpha 1.0 available", "TARS_PLUGINS = alpha,beta", "pluggy 1."):
        assert part in done.stdout
    assert json.loads(tars("doctor", "--json", cwd=tmp_path).stdout)["plugins"][0]["name"] == "alpha"


def test_a_bar_is_drawn_while_a_model_loads_at_a_terminal_and_nothing_in_a_pipe(write_script: WriteScript) -> None:
    model = write_script(alpha=BackendScript())
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tars_core.cli", "run", "hi", "-m", model]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "COLUMNS": "60"}
    ) as process:
        os.close(theirs)
        drawn = b""
        try:
            while chunk := os.read(ours, 4096):
                drawn += chunk
        except OSError:  # EIO: the other end is closed
            pass
        assert process.stdout is not None
        assert process.stdout.read() == b"hello\n"
    os.close(ours)
    assert "alpha [" in drawn.decode()
    assert "0% reading the script" in drawn.decode()
    assert drawn.decode().rindex("\x1b[K") < drawn.decode().index("alpha ·")
    assert "\x1b" not in tars("run", "hi", "-m", model).stderr
