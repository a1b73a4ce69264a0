"""What is built installs and works in an empty environment, and no index can slip in a package of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tars_core import __version__

ROOT = Path(__file__).parents[1]
OURS = [".", "plugins/tars-llamacpp", "plugins/tars-xllamacpp", "plugins/tars-demo-model"]
# Taken before the tests get a home of their own: pip's cache spares ten minutes of compiling llama-cpp-python.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
NAMES = ["tars-core", "tars-llamacpp", "tars-xllamacpp", "tars-demo-model"]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, *OURS], check=True, cwd=ROOT)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def hostile_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that offers newer versions of ours, which fail when they are installed."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in NAMES:
        (folder / f"{name}-0.1.99.tar.gz").write_bytes(b"not even an archive")
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["xllamacpp", "llamacpp"])
def test_the_wheels_install_with_their_extras_and_three_lines_answer(
    backend: str, wheels: list[Path], hostile_index: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    core, ours, model = (
        next(wheel for wheel in wheels if wheel.name.startswith(f"tars_{name}-"))
        for name in ("core", backend, "demo_model")
    )
    pins = ["--constraint", str(ROOT / "constraints.txt"), "--find-links", str(hostile_index)]
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *pins, f"{core}[{backend},demo]", ours, model],
        check=True,
        env=ENVIRONMENT,
    )
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], check=True, env=ENVIRONMENT, capture_output=True, text=True
    ).stdout
    for name in ("tars-core", f"tars-{backend}", "tars-demo-model"):
        assert f"{name}=={__version__}\n" in listed
    code = """
from tars_core import InferenceEngine
engine = InferenceEngine()
print(engine.generate("¿Cuál es tu nombre?", temperature=0))
"""
    answer = subprocess.run(
        [python, "-c", code], check=True, env=ENVIRONMENT, capture_output=True, text=True, cwd=tmp_path
    ).stdout
    assert answer == "Me llamo TARS. Soy un modelo de demostración.\n"


def test_the_model_is_in_the_wheel_twice_and_the_core_holds_no_backend(wheels: list[Path]) -> None:
    import zipfile  # noqa: PLC0415

    names = {wheel.name.split("-")[0]: zipfile.ZipFile(wheel).namelist() for wheel in wheels}
    weights = "tars_demo_model/weights"
    assert {f"{weights}/tars-demo.gguf", f"{weights}/model.safetensors"} <= set(names["tars_demo_model"])
    assert {name.split("/")[0] for name in names["tars_core"]} == {"tars_core", f"tars_core-{__version__}.dist-info"}
    assert "tars_core/py.typed" in names["tars_core"]
