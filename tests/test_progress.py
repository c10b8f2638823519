"""Progress of what takes long: in a terminal after two seconds, elsewhere not a sign."""

import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from distrain import progress as progressbar

ROOT = Path(__file__).parents[1]


class Screen:
    """A pseudo-terminal of 100 columns, and all that was written to it."""

    def __init__(self) -> None:
        self._primary, secondary = pty.openpty()
        termios.tcsetwinsize(secondary, (24, 100))
        self.stream = os.fdopen(secondary, "w", buffering=1)
        self._data = bytearray()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._primary, 1 << 16):
                self._data += data
        except OSError:  # Linux says so when the other side is closed
            pass

    def text(self) -> str:
        """Close it; return what was written."""
        self.stream.close()
        self._thread.join(30)
        os.close(self._primary)
        return self._data.decode()


def in_terminal(code: str, **env: str) -> str:
    """Run a program whose standard output is a terminal; return what it wrote there."""
    screen = Screen()
    more = {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "NO_COLOR": "", **env}
    command = [
        sys.executable,
        "-c",
        "import time\nfrom distrain import progress as progressbar\n" + code,
    ]
    done = subprocess.run(
        command, stdout=screen.stream, stderr=subprocess.PIPE, text=True, env=os.environ | more
    )
    text = screen.text()
    assert done.returncode == 0, done.stderr
    return text


COUNT = "for i in progressbar.counted(range(8), 'evaluation', total=8): time.sleep(0.03)\n"
WAIT = "with progressbar.waiting('writing the checkpoint'): time.sleep(0.4)\n"
AT_ONCE = "progressbar.AFTER_S = progressbar.REFRESH_S = 0.05\n"
UNTIL_DRAWN = """
said = {}
def words():
    said[len(said)] = text = ({said})[min(len(said), len({said}) - 1)]
    return text
with progressbar.waiting(words):
    while len(said) <= len({said}):
        time.sleep(0.01)
"""
COLOR = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")


def test_what_is_quick_is_not_shown() -> None:
    assert progressbar.AFTER_S == 2.0
    assert in_terminal("progressbar.AFTER_S = 60\n" + COUNT + WAIT) == ""


def test_what_takes_long_is_counted_and_then_gone() -> None:
    text = in_terminal(AT_ONCE + COUNT)
    counts = [int(count) for count in re.findall(r"(\d)/8", text)]
    assert counts == sorted(counts)
    assert len(set(counts)) > 1
    assert re.search(r"evaluation  0:00:\d\d", text)
    assert COLOR.search(text)
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back
    last = text.rpartition("8")[2]
    assert "evaluation" in last or "\x1b[2K" in last  # its line was cleared


def test_what_nobody_can_count_shows_that_it_goes_on() -> None:
    words = ["writing the checkpoint"] * 4
    text = in_terminal(AT_ONCE + UNTIL_DRAWN.replace("{said}", repr(words)))
    assert text.count("writing the checkpoint") > 2
    assert re.search(r"writing the checkpoint  0:00:\d\d", text)
    assert text.endswith("\x1b[?25h")


def test_words_may_change_and_vanish() -> None:
    words = ["one", "two", "", ""]
    text = in_terminal(AT_ONCE + UNTIL_DRAWN.replace("{said}", repr(words)))
    assert text.index("one") < text.index("two")
    assert text.endswith("\x1b[?25h")


@pytest.mark.parametrize(
    ("env", "is_shown"),
    [({"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, False), ({"RANK": "1"}, False)],
)
def test_where_colours_or_bars_are_not_wanted(env: dict[str, str], is_shown: bool) -> None:
    text = in_terminal(AT_ONCE + COUNT + WAIT, **env)
    assert ("evaluation" in text) == is_shown
    assert not COLOR.search(text)
    assert is_shown or text == ""


def test_a_file_gets_no_sign_and_starts_no_thread_and_no_rich() -> None:
    code = AT_ONCE + COUNT + WAIT.replace("time.sleep(0.4)", "threads = threading.active_count()")
    code = (
        "import sys, threading\n" + code + "assert threads == 1\nassert 'rich' not in sys.modules"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import time\nfrom distrain import progress as progressbar\n" + code,
        ],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


ROWS = """
from distrain.writers import console
from distrain.writers.console import ConsoleWriter
from pathlib import Path
from distrain.writers.base import Row, RunInfo
console.LINE_S = 0.0  # every row is shown
def row(iteration, loss):
    scalars = {"loss": (loss, iteration)}
    return Row(iteration, 20, scalars, new=scalars)
writer = ConsoleWriter()
writer.open(RunInfo(Path()))
writer.write(row(4, 1.5))
for i in progressbar.counted(range(8), "evaluation", total=8):
    time.sleep(0.03)
    if i == 5:
        writer.write(row(9, 0.5))
        print("a word of the user")
writer.write(row(19, 0.25))
writer.close()
"""


def test_it_shares_the_screen_with_the_bar_of_the_training() -> None:
    text = in_terminal(AT_ONCE + ROWS)
    both = [part for part in text.split("\x1b[2K") if "evaluation" in part]
    assert len(both) > 1
    assert " 5/20 " in text or "5/20" in text
    assert "a word of the user" in text
    assert "20/20" in text.rpartition("evaluation")[2]  # the training's bar stays to the end
    assert "loss 0.25" in text.rpartition("20/20")[2]


def test_it_shares_the_screen_with_plain_lines() -> None:
    text = in_terminal(AT_ONCE + ROWS, NO_COLOR="1")
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip() for line in text.split("\n")]
    assert "iter 4/20  loss 1.5" in lines
    assert any(line.endswith("iter 9/20  loss 0.5") for line in lines)
    assert any(line.endswith("iter 19/20  loss 0.25") for line in lines)
    assert "evaluation" in text


def test_a_job_in_the_queue_is_waited_for(tmp_path: Path) -> None:
    """The job waits until that was shown, and is cancelled then."""
    (tmp_path / "scontrol").write_text(
        f"""#!/bin/sh
[ -e {tmp_path}/seen ] && state=CANCELLED || state=PENDING
echo "JobId=12 JobState=$state Reason=Resources"
"""
    )
    (tmp_path / "scontrol").chmod(0o755)
    code = "from pathlib import Path\nfrom distrain.launch.slurm import follow as slurm_follow\n"
    code += "real = progressbar.display.refresh\n"
    code += f"def refresh():\n    real()\n    Path({str(tmp_path)!r}, 'seen').touch()\n"
    code += "progressbar.display.refresh = refresh\n"
    code += (
        f"slurm_follow.POLL_S = 0.3\nprint(slurm_follow.follow('12', Path({str(tmp_path)!r})))\n"
    )
    text = in_terminal(AT_ONCE + code, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "job 12 waits in the queue (Resources)  0:00:" in text
    assert text.rstrip().endswith("75")  # STOPPED


def test_evaluation_shows_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch import nn

    from distrain.data.loader import EvalLoader
    from distrain.trainer import evaluate as evaluation

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.05)
            return x.mean()

    monkeypatch.setattr(progressbar, "AFTER_S", 0.05)
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen.stream)
    data = [torch.tensor(float(i)) for i in range(6)]
    loader = EvalLoader(data, batch_size=1, rank=0, world_size=1, seed=0)  # type: ignore[arg-type]
    result = evaluation.evaluate(Net(), loader, device=torch.device("cpu"))
    monkeypatch.undo()
    text = screen.text()
    assert result["loss"] == 2.5
    assert "evaluation" in text
    assert "/6" in text
