"""Plain lines for a fixed row, and a live bar only where there is a terminal."""

import io
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from writer_cases import Opened

from distrain.writers.base import Row
from distrain.writers.console import ConsoleWriter, describe

SCALARS = {
    "accuracy": (0.98, 199),
    "loss_box": (0.02, 199),
    "total_loss": (0.03124, 199),
    "gpu/memory_bytes": (1e9, 199),
    "lr": (0.001, 199),
    "lr/head": (0.01, 199),
    "perf/step_s": (0.0042, 199),
    "perf/data_s": (0.0001, 199),
    "perf/eta_s": (7.56, 199),
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_line() -> None:
    stream = io.StringIO()
    writer = Opened(ConsoleWriter(stream))
    writer.write(Row(199, 2000, SCALARS))
    writer.close()
    assert stream.getvalue() == (
        "iter 199/2000  total_loss 0.03124  loss_box 0.02  accuracy 0.98  lr 0.00100  "
        "0.0042 s/it  eta 0:00:07\n"
    )


def test_old_values_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrain.writers.console.LINE_S", 0.0)
    stream = io.StringIO()
    writer = Opened(ConsoleWriter(stream), 20)
    writer.write(Row(29, 100, {"loss": (1.0, 29), "eval/accuracy": (0.5, 19)}))
    writer.write(Row(39, 100, {"loss": (0.5, 39), "eval/accuracy": (0.75, 39)}))
    writer.write(Row(49, 100, {"loss": (0.25, 49), "eval/accuracy": (0.75, 39)}))
    writer.write(Row(49, 100, {"loss": (0.25, 49), "eval/accuracy": (0.75, 39)}))
    assert stream.getvalue().splitlines() == [
        "iter 29/100  loss 1",
        "iter 39/100  loss 0.5  eval/accuracy 0.75",
        "iter 49/100  loss 0.25",
    ]


def test_rows_faster_than_anybody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("distrain.writers.console.time", SimpleNamespace(monotonic=lambda: now_s))
    stream = io.StringIO()
    writer = Opened(ConsoleWriter(stream))
    for i in range(200):
        now_s += 0.01
        scalars = {"loss": (1.0, i)}
        if i % 70 == 69:
            scalars["eval/accuracy"] = (0.5, i)
        if i % 7 == 6:
            scalars["straggler/own_s"] = (0.5, i)  # nothing that a line lists
        writer.write(Row(i, 200, scalars))
    writer.close()
    lines = stream.getvalue().splitlines()
    shown = [int(line.split("/")[0].removeprefix("iter ")) for line in lines]
    assert [line for line in lines if "accuracy" in line] == [
        "iter 69/200  loss 1  eval/accuracy 0.5",
        "iter 139/200  loss 1  eval/accuracy 0.5",
    ]
    assert (shown[0], shown[-1]) == (0, 199)
    assert 8 <= len(lines) <= 8 + 2 + 1


def test_what_the_end_adds_to_the_last_row_is_one_line_with_it() -> None:
    stream = io.StringIO()
    writer = Opened(ConsoleWriter(stream))
    row = {"loss": (1.0, 19)}
    writer.write(Row(19, 40, row))
    row = {"loss": (0.5, 39)}
    writer.write(Row(39, 40, row))  # too soon after the one before
    writer.write(Row(39, 40, {**row, "eval/accuracy": (0.75, 39)}))
    writer.close()
    assert stream.getvalue().splitlines() == [
        "iter 19/40  loss 1",
        "iter 39/40  loss 0.5  eval/accuracy 0.75",
    ]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, ""),
        ({"perf/eta_s": 100_000.0}, "eta 1 day, 3:46:40"),
        ({"perf/eta_s": math.inf}, ""),
        ({"perf/eta_s": math.nan}, ""),
        ({"perf/eta_s": -1.0}, ""),
        ({"loss": math.nan}, "loss nan"),
        ({"guard/checksum": 1.5e7, "a": 1.0}, "a 1"),
        ({"b": 2.0, "Loss": 123456.0}, "Loss 1.235e+05  b 2"),
        ({f"m{i}": 1.0 for i in range(20)}, "  ".join(f"m{i} 1" for i in range(12))),
    ],
)
def test_describe(values: dict[str, float], text: str) -> None:
    assert describe(values) == text


def test_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    writer = Opened(ConsoleWriter(stream))
    for iteration in range(0, 100, 10):
        scalars = {"loss": (1.5, iteration), "[bold]": (2.0, iteration)}
        writer.write(Row(iteration + 9, 100, scalars))
    writer.close()
    text = stream.getvalue()
    assert "10/100" in text
    assert text.split("\n")[0].rstrip("\r").rpartition("\r")[2].startswith("\x1b[2K100/100 ")
    assert "loss 1.5  [bold] 2" in text  # a name is not markup
    assert text.count("\n") == 1  # one live line
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_the_bar_keeps_the_loss_in_the_row_of_an_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    writer = Opened(ConsoleWriter(stream))
    writer.write(Row(9, 20, {"loss": (1.5, 9), "perf/eta_s": (7.0, 9)}))
    writer.write(Row(14, 20, {"eval/accuracy": (0.5, 14)}))
    writer.close()
    last = stream.getvalue().rpartition("15/20")[2]
    assert "loss 1.5  eval/accuracy 0.5" in last
    assert "eta 0:00:07" in last


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_cuts_values_only(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    writer = Opened(ConsoleWriter(stream))
    names = ("loss", "loss_box", "loss_class", "eval/accuracy", "eval/box_iou", "eval/map")
    scalars = dict.fromkeys(names, (0.123456, 119999)) | {"perf/eta_s": (7384.0, 119_999)}
    writer.write(Row(119_999, 200_000, scalars))
    writer.close()
    line = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).split("\r")[-1].strip()
    assert line.startswith("120000/200000  60% ")
    assert " 0:00:00 eta 2:03:04 loss 0.12" in line
    assert len(line) <= width
    assert line.endswith("…")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_plain_where_a_terminal_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    stream = Terminal()
    writer = Opened(ConsoleWriter(stream))
    writer.write(Row(9, 10, {"loss": (1.5, 9)}))
    writer.close()
    assert stream.getvalue() == "iter 9/10  loss 1.5\n"


def test_rich_is_imported_for_a_terminal_only() -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from distrain.writers.console import ConsoleWriter\n"
        "from distrain.writers import Row, RunInfo\n"
        "writer = ConsoleWriter()\n"
        "writer.open(RunInfo(Path()))\n"
        "writer.write(Row(9, 10, {}, new={'loss': (1.5, 9)}))\n"
        "assert not {'rich', 'torch', 'numpy'} & {*sys.modules}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout == "iter 9/10  loss 1.5\n"
