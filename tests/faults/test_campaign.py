"""A few trials of the campaign, and that it would see what it looks for."""

import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import campaign
import pytest
from runner import describe, find_all

pytestmark = pytest.mark.ranks

ITERATIONS = 40


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiet") / "run"
    return folder, campaign.reference(folder, iterations=ITERATIONS)


@pytest.fixture
def place():
    """A folder with a short path: a long TMPDIR is not used for sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("fault", "role"),
    [("kill", "parent"), ("kill", "rank"), pytest.param("usr2", "rank", marks=pytest.mark.slow)],
)
def test_a_disturbed_run_ends_as_a_quiet_one(place, quiet, fault, role):
    result = campaign.trial(
        place / "run", fault, seed=1, iterations=ITERATIONS, quiet=quiet[1], roles=[role]
    )
    assert result.problems == []
    assert len(result.what) == 1, "the fault has come"
    expected = {"parent": -9, "rank": 1}[role] if fault == "kill" else campaign.STOPPED
    assert result.codes == [expected, 0]
    assert result.lost[0] == 0 or fault == "kill"


def test_differences_are_seen(quiet):
    folder, reference = quiet
    runner = campaign.Runner(folder, iterations=ITERATIONS)
    assert campaign.differences(runner, reference) == []
    rows = runner.run / "metrics.jsonl"
    before = rows.read_bytes()
    first = json.loads(before.splitlines()[0])
    changes = [
        before + before.splitlines(keepends=True)[-1],  # an iteration twice
        before[before.index(b"\n") + 1 :],  # one that is missing
        json.dumps({**first, "loss": first["loss"] * (1 + 2e-16)}).encode()
        + before[before.index(b"\n") :],  # the last bit of one value
    ]
    for changed in changes:
        rows.write_bytes(changed)
        [problem] = campaign.differences(runner, reference)
        assert problem.startswith("metrics.jsonl")
    rows.write_bytes(before)
    hidden = runner.run / "checkpoints" / ".tmp-iter_0000000010-0123456789ab"
    hidden.mkdir()
    assert campaign.differences(runner, reference) == [
        "left files ['checkpoints/.tmp-iter_0000000010-0123456789ab']"
    ]
    hidden.rmdir()
    (runner.temporary / "pymp-01234567").mkdir()
    memory = Path(f"/dev/shm/distrain-beats-{os.getpid()}-test")
    memory.mkdir()
    assert campaign.differences(runner, reference) == ["left temporary files ['pymp-01234567']"]
    runner._pids.add(os.getpid())
    assert runner.litter() == [str(memory), "pymp-01234567"]
    memory.rmdir()
    (runner.temporary / "pymp-01234567").rmdir()
    other = campaign.Reference(
        {**reference.digests, "rng": "0"}, reference.rows, {"loss": []}, reference.best, 1.0, 1.0
    )
    problems = campaign.differences(runner, other)
    assert problems[0] == "the final rng differs"
    assert any(each.startswith("TensorBoard: loss has steps [4, 9,") for each in problems)


def test_a_flipped_bit_is_seen(quiet):
    folder, _ = quiet
    runner = campaign.Runner(folder, iterations=ITERATIONS)
    newest = find_all(runner.run / "checkpoints")[-1]
    before = {path: path.read_bytes() for path in newest.iterdir()}
    assert runner.flip(random.Random(0)) == newest.name == "iter_0000000040"
    assert not describe(newest).valid
    [changed] = [path for path, content in before.items() if path.read_bytes() != content]
    changed.write_bytes(before[changed])
    assert describe(newest).valid


def wait_until(runner, process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, runner.log()
        assert time.monotonic() < deadline, runner.log()
        time.sleep(0.01)


def test_the_second_ctrl_c_ends_a_command_that_saves_at_once(place, quiet):
    runner = campaign.Runner(place / "run", iterations=ITERATIONS)
    with runner.started(LINGER_S="600") as process:
        wait_until(runner, process, lambda: runner.progress() >= 12)
        assert sorted(runner.processes().values()).count("worker") == 2
        os.killpg(process.pid, signal.SIGINT)
        # the first one's checkpoint is saved, and the ranks are not gone yet
        wait_until(runner, process, (runner.folder / "lingers_0").exists)
        time.sleep(1.0)  # a terminal may send one twice within half a second
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 1
        deadline = time.monotonic() + 30
        while runner.processes():
            assert time.monotonic() < deadline, runner.processes()
            time.sleep(0.01)
    saved = runner.progress()
    assert 12 <= saved < ITERATIONS
    assert "the ranks save their state and stop; Ctrl-C again ends them at once" in runner.log()
    assert "the ranks were killed by a second Ctrl-C" in runner.log()
    assert runner.litter() == []
    with runner.started() as process:
        assert process.wait(120) == 0
    assert f"continuing after iteration {saved} on 2 ranks" in runner.log()
    assert campaign.differences(runner, quiet[1]) == []
