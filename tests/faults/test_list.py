"""The list of failures names tests that there are."""

import re
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@cache
def names_in(path):
    file = ROOT / path
    return set(re.findall(r"^def (test_\w+)", file.read_text(), re.M)) if file.exists() else set()


def missing(text):
    """Return the tests named in a text that do not exist, as `file::test`."""
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    return [f"{path}::{name}" for path, name in named if name not in names_in(path)]


def test_every_named_test_exists_and_every_number_has_its_row():
    text = (HERE / "README.md").read_text()
    assert missing(text) == []
    assert text.count("::test_") > 60
    failures, faults = text.split("## Injected faults")
    for part, num in ((failures, 28), (faults, 29)):
        rows = [line.split("|") for line in part.splitlines() if re.match(r"\| \d+ \|", line)]
        assert [int(row[1]) for row in rows] == list(range(1, num + 1))
        assert all(row[3].strip() and row[4].strip() for row in rows)


def test_a_test_that_is_gone_is_seen():
    assert missing("`tests/trainer/test_loop.py::test_no_such`, `tests/no_file.py::test_x`") == [
        "tests/trainer/test_loop.py::test_no_such",
        "tests/no_file.py::test_x",
    ]
