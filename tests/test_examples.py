"""The examples as their readers would try them: built, installed, and asked."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from tars_core import BackendUnavailable, ContextLengthExceeded, InferenceEngine

ROOT = Path(__file__).parents[1]
EXAMPLES = ("echo", "markov", "letters")
TEXT = "Once upon a time there was a king. Once upon a hill there was a queen who had time. " * 3


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the examples into a folder of their own, offline."""
    folder = tmp_path_factory.mktemp("examples")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    sources = [ROOT / "examples" / f"tars-{name}" for name in EXAMPLES]
    subprocess.run([*pip, "--target", folder, *sources], check=True)
    return folder


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def with_examples(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(installed), os.environ["PYTHONPATH"]]))


@pytest.mark.usefixtures("with_examples")
def test_words_follow_each_other_as_in_the_file_and_a_seed_repeats_them(book: Path) -> None:
    with InferenceEngine(model=f"markov:{book}", plugins="markov") as engine:
        one, other = (engine.complete("Once upon a", seed=3, max_tokens=12) for _ in range(2))
        assert one.text == other.text
        assert (one.finish_reason, one.usage.prompt_tokens, one.usage.completion_tokens) == ("length", 3, 12)
        words = TEXT.split()
        pairs = set(pairwise(words))
        said = ["a", *one.text.split()]
        assert set(pairwise(said)) <= pairs
        assert engine.complete("Once upon a", seed=3, stop=[" "]).text == ""
        with pytest.raises(ContextLengthExceeded):
            engine.generate("Once " * 5000)


@pytest.mark.usefixtures("with_examples")
def test_letters_are_told_to_many_at_once_as_to_one(book: Path) -> None:
    with InferenceEngine(model=f"letters:{book}", plugins="letters") as engine:
        alone = [engine.complete("Once", seed=seed, max_tokens=40).text for seed in range(8)]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda seed: engine.complete("Once", seed=seed, max_tokens=40).text, range(8)))
        assert alone == together
        assert len(set(alone)) > 4
        assert engine.complete("Once", max_tokens=1).usage.prompt_tokens == len(engine.tokenize("Once")) == 4


@pytest.mark.usefixtures("with_examples")
def test_a_file_that_is_not_there_is_named_with_the_form_of_a_model_name(tmp_path: Path) -> None:
    with (
        InferenceEngine(model=f"markov:{tmp_path / 'none.txt'}", plugins="markov") as engine,
        pytest.raises(BackendUnavailable, match=r"none\.txt: No such file") as caught,
    ):
        engine.generate("Once")
    assert "name it as markov:PATH" in str(caught.value)


@pytest.mark.parametrize(("name", "most"), [("markov", 20), ("letters", 25)])
def test_an_example_is_as_short_as_its_readme_says(name: str, most: int) -> None:
    source = (ROOT / "examples" / f"tars-{name}" / f"tars_{name}.py").read_text()
    tree = ast.parse(source)
    left_out: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, (node.end_lineno or 0) + 1))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            left_out |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = [number for number, line in enumerate(source.splitlines(), 1) if line.strip() and number not in left_out]
    assert len(lines) <= most
