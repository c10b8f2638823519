"""What a person sees in TensorBoard: a real server and browser, a sweep, a run that resumes."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import Browser
from project import write_project

CODE = """
import os, time
import torch
import distrain

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        return torch.tensor([index / 64.0]), torch.tensor([index / 32.0])

class Model(torch.nn.Module):
    def __init__(self, wait_at=None):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.wait_at = wait_at
    def forward(self, x, y):
        error = self.linear(x) - y
        if self.training:
            storage = distrain.get_event_storage()
            if storage.iter % 20 == 0:
                storage.put_image("picture", torch.full((3, 16, 32), 0.5))
                storage.put_histogram("error", error)
            time.sleep(0.02)  # rows of faster steps are written together
            while storage.iter == self.wait_at and not os.path.exists("go"):
                time.sleep(0.05)
        return error.square().mean()
    def metrics(self, x, y):
        return {"distance": (self.linear(x) - y).abs().flatten()}
"""
CONF = """
# @package _global_
model: {_target_: seen_project.Model}
data:
  batch_size: 8
  train: {_target_: seen_project.Points}
  eval: {_target_: seen_project.Points}
trainer: {max_iter: 60, window: 5}
launch: {in_process: true}
hooks:
  eval: {period: 20}
  checkpoint: {period: 20}
"""
RUNS = ["live", "seen/optim.lr=0.01", "seen/optim.lr=0.1"]
STEPS = list(range(4, 60, 5))  # of the rows that a run of 60 iterations writes


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "distrain", "--config-dir", "conf", *arguments]
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """A server that shows a folder, on a port that it chooses; gives its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    log = folder.with_name("tensorboard.log")
    with open(log, "wb") as out:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", "0", "--reload_interval", "1"],
            stdout=out,
            stderr=out,
        )
    try:
        found = eventually(lambda: re.search(r"http://127.0.0.1:\d+/", log.read_text()))
        yield found[0]
    finally:
        server.terminate()
        server.wait(30)


def eventually(get: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    end_s = time.monotonic() + timeout_s
    while not (value := get()):
        assert time.monotonic() < end_s, "too late"
        time.sleep(0.1)
    return value


def steps(page: Browser, run: str, tag: str, *, plugin: str = "scalars") -> Sequence[int]:
    """The steps of a curve, or of histograms, as the page would fetch them."""
    path = f"data/plugin/{plugin}/{plugin}?tag={tag}&run={run}"
    points = page.value(f"fetch({path!r}).then((r) => r.ok ? r.json() : [])")
    return [step for _, step, _ in points]


@pytest.fixture(scope="module")
def chromium() -> str:
    try:
        return browser.install()
    except RuntimeError as error:
        pytest.skip(f"no browser here: {error}")


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_what_a_person_sees(chromium: str, tmp_path: Path) -> None:
    write_project(tmp_path, module="seen_project", code=CODE, experiment="seen", conf=CONF)
    live_run = ["+experiment=seen", "run.name=live", "+model.wait_at=49"]
    live = start(tmp_path, *live_run)
    sweep = start(tmp_path, "-m", "+experiment=seen", "optim.lr=0.1,0.01")
    try:
        with tensorboard(tmp_path / "runs") as url:
            with Browser(chromium, tmp_path / "profile") as page:
                assert sweep.wait(120) == 0, (tmp_path / "log").read_text()
                page.open(url)
                see_a_running_run(page)
                live.send_signal(signal.SIGKILL)
                live.wait()
                (tmp_path / "go").touch()
                live = start(tmp_path, *live_run)
                for look in see_scalars, see_images, see_histograms, see_text:
                    look(page, url)
                see_hparams(page, url)
                see_charts(page, url)
                assert live.wait(120) == 0, (tmp_path / "log").read_text()
                see_it_resumed(page, url)
    finally:
        for process in live, sweep:
            process.kill()
            process.wait()


def see_a_running_run(page: Browser) -> None:
    """Its rows are there while it runs.

    It stands in iteration 49: those before the checkpoint at 40 are written, the one of 44 may wait
    for others of the same second.
    """
    eventually(lambda: steps(page, "live", "loss") in (STEPS[:8], STEPS[:9]))
    page.wait("all('app-header-reload button').length")
    page.value("all('app-header-reload button')[0].click()")
    page.wait("all('runs-data-table').some((e) => text(e).includes('live'))")


def see_scalars(page: Browser, url: str) -> None:
    """A heading for each scope; behind `loss`, a curve of each run."""
    page.open(f"{url}#scalars")
    headings = "inside('tf-scalar-dashboard', 'button').filter((e) => /^{}\\b/.test(text(e)))"
    for scope in "eval", "loss", "lr", "perf":
        page.wait(f"{headings.format(scope)}.length == 1")
    cards = "all('tf-scalar-card').filter((e) => e.tag == 'loss')"
    if not page.value(f"{cards}.length"):  # only the first are open
        page.value(f"{headings.format('loss')}[0].click()")
    curves = "filter((e) => (e.getAttribute('d') || '').split('L').length > 8)"
    page.wait(f"{cards}.some((e) => below(e).{curves}.length >= 3)")


def see_images(page: Browser, url: str) -> None:
    """The newest of each of three runs, as large as it was put."""
    page.open(f"{url}#images")
    images = "inside('tf-image-loader', 'img')"
    page.wait(f"{images}.length == 3 && {images}.every((e) => e.naturalWidth > 0)")
    sizes = page.value(f"{images}.map((e) => [e.naturalWidth, e.naturalHeight])")
    assert sizes == [[32, 16]] * 3


def see_histograms(page: Browser, url: str) -> None:
    """Three in each of three runs, of iterations 0, 20 and 40."""
    for run in RUNS:  # the page shows what is there when it is opened
        eventually(lambda run=run: steps(page, run, "error", plugin="histograms") == [0, 20, 40])
    page.open(f"{url}#histograms")
    drawn = "below(e).filter((p) => (p.getAttribute('d') || '').length > 100)"
    page.wait(
        "all('vz-histogram-timeseries').length == 3 && "
        f"all('vz-histogram-timeseries').every((e) => {drawn}.length == 3)"
    )


def see_text(page: Browser, url: str) -> None:
    """The configuration of each run, as a block of code; a resumed run may show it twice."""
    page.open(f"{url}#text")
    for lr, runs in ("0.1", 2), ("0.01", 1):
        block = f"(p) => p.matches('code') && /lr: {lr}\\n/.test(text(p))"
        page.wait(f"all('tf-text-loader').filter((e) => below(e).some({block})).length == {runs}")


def see_hparams(page: Browser, url: str) -> None:
    """A row for each run of the sweep, with what differs and with its results."""
    page.open(f"{url}#hparams")
    cells = "inside('tf-hparams-table-view', 'vaadin-grid-cell-content').map(text)"
    for run in RUNS:
        page.wait(f"{cells}.includes('{run}')")
    page.wait(f"{cells}.includes('0.10000') && {cells}.includes('0.010000')")
    columns = page.value(cells)
    assert {"optim.lr", "eval/distance"} <= set(columns)
    assert not [name for name in columns if name.startswith(("checkpoint.", "launch.", "run."))]


def see_charts(page: Browser, url: str) -> None:
    """The layout's charts, each with the curves that its expressions match: one a run here."""
    page.open(f"{url}#custom_scalars")
    cards = "all('tf-custom-scalar-multi-line-chart-card')"
    for chart in "losses", "distance", "lr":
        there = f"{cards}.filter((e) => shown(e).split(/\\s+/).includes('{chart}'))"
        page.wait(f"{there}.some((e) => /Matches\\s*\\(3\\)/.test(shown(e)))")


def see_it_resumed(page: Browser, url: str) -> None:
    """Rows of 40 to 49 were written twice, and are seen once."""
    eventually(lambda: steps(page, "live", "loss")[-1:] == [59])
    assert steps(page, "live", "loss") == STEPS
    assert steps(page, "live", "eval/distance") == [19, 39, 59]
