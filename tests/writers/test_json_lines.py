"""metrics.jsonl: new values only, strict JSON, each iteration once after a resume."""

import json
import logging
import math
from pathlib import Path

import pytest
from writer_cases import Opened

from distrain.writers.base import Row
from distrain.writers.json_lines import JsonLinesWriter


def row(iteration: int, **scalars: float) -> Row:
    return Row(iteration, 100, {name: (value, iteration) for name, value in scalars.items()})


def strict_lines(path: Path) -> list[dict[str, float | str]]:
    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_line_holds_what_is_new(tmp_path: Path) -> None:
    writer = Opened(JsonLinesWriter(tmp_path / "new folder" / "metrics.jsonl"))
    writer.write(Row(19, 100, {"loss": (0.5, 19), "eval/accuracy": (0.25, 9)}))
    writer.write(Row(39, 100, {"loss": (0.25, 38), "eval/accuracy": (0.25, 9)}))
    writer.write(Row(39, 100, {"loss": (0.25, 38), "eval/accuracy": (0.25, 9)}))  # nothing new
    writer.close()
    path = tmp_path / "new folder" / "metrics.jsonl"
    assert path.read_text() == (
        '{"iteration": 19, "loss": 0.5, "eval/accuracy": 0.25}\n{"iteration": 39, "loss": 0.25}\n'
    )


def test_values_that_are_not_finite_are_strings(tmp_path: Path) -> None:
    writer = Opened(JsonLinesWriter(tmp_path / "m.jsonl"))
    writer.write(row(0, a=math.nan, b=math.inf, c=-math.inf, d=1.0))
    writer.close()
    (line,) = strict_lines(tmp_path / "m.jsonl")
    assert line == {"iteration": 0, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.0}
    assert float(line["b"]) == math.inf


def test_each_line_is_on_the_disk_at_once(tmp_path: Path) -> None:
    writer = Opened(JsonLinesWriter(tmp_path / "m.jsonl"))
    writer.write(row(0, a=1.0))
    assert strict_lines(tmp_path / "m.jsonl") == [{"iteration": 0, "a": 1.0}]
    writer.close()


def test_resume_drops_replayed_lines_and_old_values(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    first = Opened(JsonLinesWriter(path), 0)
    for iteration in (9, 19, 29, 39):
        first.write(row(iteration, loss=float(iteration)))
    first.close()
    resumed = Opened(JsonLinesWriter(path), 20)
    assert [line["iteration"] for line in strict_lines(path)] == [9, 19]
    # the evaluation of iteration 19 was written by the first attempt
    resumed.write(Row(29, 100, {"loss": (-29.0, 29), "eval/accuracy": (0.5, 19)}))
    resumed.write(row(39, loss=-39.0))
    resumed.close()
    assert strict_lines(path) == [
        {"iteration": 9, "loss": 9.0},
        {"iteration": 19, "loss": 19.0},
        {"iteration": 29, "loss": -29.0},
        {"iteration": 39, "loss": -39.0},
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_torn_and_damaged_lines_are_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(
        b'{"iteration": 9, "loss": 1.0}\n'
        b"\0\0\xff\0\n"
        b'["no object"]\n'
        b'{"loss": 1.0}\n'
        b'{"iteration": 19, "loss": 2.0}\n'
        b'{"iteration": 29, "loss": 3.0}'  # whole, but the next line would continue it
    )
    with caplog.at_level(logging.WARNING):
        writer = Opened(JsonLinesWriter(path), 50)
    writer.write(row(59, loss=4.0))
    writer.close()
    assert [line["iteration"] for line in strict_lines(path)] == [9, 19, 59]
    assert [r.getMessage() for r in caplog.records] == [f"{path}: 4 damaged lines removed"]


def test_an_intact_file_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"iteration": 9, "loss": 1.0}\n')
    inode = path.stat().st_ino
    Opened(JsonLinesWriter(path), 10).close()
    assert path.stat().st_ino == inode
    assert [each.name for each in path.parent.iterdir()] == [path.name]
