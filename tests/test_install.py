"""The package as a wheel: everything is in it, and it works from any folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module_and_every_configuration(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for source, target in (("distrain", "distrain"), ("conf", "distrain/conf")):
        for path in (ROOT / source).rglob("*"):
            if path.suffix in (".py", ".yaml", ".typed") and "__pycache__" not in path.parts:
                assert f"{target}/{path.relative_to(ROOT / source)}" in names
    assert "distrain/launch/local.py" in names
    assert not [name for name in names if name.startswith(("conf/", "launch/", "tests/"))]


def test_it_trains_from_any_folder(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); sys.argv[0] = 'distrain'; "
    code += (
        "import distrain; from distrain.cli.command import main; print(distrain.__file__); main()"
    )
    arguments = ["+experiment=digits", "trainer.max_iter=5", "launch.in_process=true"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "site") in result.stdout
    assert (folder / "runs" / "digits" / "metrics.jsonl").exists()
