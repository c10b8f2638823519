"""The tutorial, line by line: its files are written, its commands run, their output compared."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "first-hour.md"
_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)


def blocks(text):
    """Yield (language, title, body) of each fenced block."""
    for match in _FENCE.finditer(text):
        yield match[1], match[2] or "", match[3]


def commands(body):
    """Yield (command, lines shown) of a console block; `> ` continues a command."""
    for part in re.split(r"^\$ ", body, flags=re.M)[1:]:
        first, *rest = part.splitlines()
        command = [first]
        while rest and rest[0].startswith("> "):
            command.append(rest.pop(0)[2:])
        yield "\n".join(command), rest


def matches(shown, printed):
    """Say whether output is as shown: `...` is any text, on a line of its own any lines."""
    pattern = ""
    for line in shown:
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*?".join(map(re.escape, line.split("..."))) + r"\n"
    return re.fullmatch(pattern, printed) is not None


def run(command, folder):
    """Run a line as a shell does; return all that it prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.stdout


@pytest.mark.ranks
@pytest.mark.timeout(1800)  # some twenty starts of python, on a busy machine
@pytest.mark.slow
def test_the_first_hour(tmp_path):
    num = 0
    for language, title, body in blocks(PAGE.read_text()):
        if title:
            (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / title).write_text(body)
        elif language == "console":
            for command, shown in commands(body):
                printed = run(command, tmp_path)
                assert matches(shown, printed), f"$ {command}\n{printed}"
                num += 1
    assert num >= 12


def test_output_that_differs_is_found():
    assert matches(["a ... c", "...", "end"], "a b c\n1\n2\nend\n")
    assert matches(["a", "...", "b"], "a\nb\n")
    assert not matches(["a ... c", "end"], "a b c\n1\nend\n")
    assert not matches(["a b"], "a b\nc\n")
    assert not matches(["exit code 2"], "exit code 1\n")


def test_every_shell_command_is_shown_once_to_be_run():
    """What is not run is only what would not end, or needs a cluster or the network."""
    told = [body.strip() for language, _, body in blocks(PAGE.read_text()) if language == "sh"]
    assert [line.split()[0] for line in told] == ["pip", "tensorboard", "python"]
    assert "launch=slurm" in told[-1]
