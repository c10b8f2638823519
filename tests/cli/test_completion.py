"""Completion of overrides: bash itself completes lines with the script that the command prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRIVER = r"""
complete_line()
{
    COMP_LINE=$1 COMP_POINT=${#1} COMPREPLY=()
    _distrain_complete
    echo "${COMPREPLY[*]}"
}
PATH=$PWD/bin:$PATH
eval "$(python -m distrain --shell-completion install=bash)"
complete -p distrain python
while read -r line; do complete_line "${line%.}"; done
eval "$(python -m distrain -sc uninstall=bash)"
complete -p distrain 2>&1; type -t _distrain_complete
"""
LINES = {  # what is typed -> what is offered
    "python -m distrain +exp": ["+experiment="],
    "python -m distrain +experiment=": ["digits", "mine", "multiloss", "pydoc_gpt"],
    "python -m distrain --config-dir conf +experiment=mi": ["mine"],
    "python -m distrain --config-dir conf -m +experiment=digits schedule=co": [
        *("constant", "cosine", "cosine_restarts")
    ],
    "distrain +experiment=digits optim.weight_decay_": [
        *("optim.weight_decay_bias=", "optim.weight_decay_norm=")
    ],
    "distrain +experiment=digits launch=slurm launch.gpus": ["launch.gpus_per_node="],
    "distrain launch=loc": ["local"],
    "python script.py +exp": [],
    "python -m other +exp": [],
}


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[str]:
    """Return what bash says, line by line."""
    folder = tmp_path_factory.mktemp("shell")
    (folder / "bin").mkdir()
    for name, target in {"python": '"$@"', "distrain": '-m distrain "$@"'}.items():
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {target}\n')
        path.chmod(0o755)
    (folder / "conf/experiment").mkdir(parents=True)
    (folder / "conf/experiment/mine.yaml").write_text("# @package _global_\nseed: 1\n")
    done = subprocess.run(
        ["bash", "--norc", "--noprofile", "-c", DRIVER],
        input="".join(f"{line}.\n" for line in LINES),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_it_is_there_for_both_commands(said) -> None:
    for line, name in zip(said[:2], ("distrain", "python"), strict=True):
        assert line.endswith(f" -F _distrain_complete {name}")
        assert "-o nospace" in line


@pytest.mark.parametrize("line", LINES)
def test_what_is_offered(said, line: str) -> None:
    offered = said[2 + list(LINES).index(line)].split()
    expected = LINES[line]
    if "--config-dir" not in line:
        expected = [each for each in expected if each != "mine"]
    assert offered == expected


def test_it_can_be_taken_away(said) -> None:
    (line,) = said[2 + len(LINES) :]
    assert line.endswith("complete: distrain: no completion specification")


def test_the_help_names_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distrain", "--help"], capture_output=True, text=True, check=True
    )
    assert 'eval "$(python -m distrain -sc install=bash)"' in done.stdout
