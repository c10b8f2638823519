"""What cannot be read is not damaged: tried again, then refused, and nothing is changed."""

import errno
import json
import os

import pytest
from checkpoint_cases import checkpoints, iterations_in, path_of, small_state
from project import write_project
from run_module import run_module
from test_training import CONF, TINY
from torch import nn
from writer_cases import Opened

from distrain.checkpoint import format as fmt
from distrain.checkpoint.catalog import clear_leftovers
from distrain.checkpoint.retention import read_run_id
from distrain.checkpoint.store import describe
from distrain.cli.checkpoint import main as table
from distrain.errors import RunFailed
from distrain.files import retry
from distrain.job import training
from distrain.job.job import TrainJob
from distrain.launch.client import JobStatus, State
from distrain.launch.rank import append
from distrain.runfolder.files import read_frozen
from distrain.runfolder.lock import holder
from distrain.runs.__main__ import run as runs
from distrain.runs.records import read
from distrain.runs.states import status_of
from distrain.weights.load import start_from
from distrain.writers.base import Row
from distrain.writers.json_lines import JsonLinesWriter

UNREADABLE = ["EIO", "EACCES", "EPERM", "ESTALE", "EMFILE", "ENFILE", "ENOMEM", "ETIMEDOUT"]


@pytest.fixture
def fail(monkeypatch):
    """Return what makes opening paths that end so fail with an error, a number of times."""
    monkeypatch.setattr(retry, "PAUSES_S", (0.0, 0.0))
    real, calls = os.open, []

    def fail(ending, name="EIO", times=1 << 30):
        calls.clear()

        def fake(path, *args, **kwargs):
            if str(path).endswith(ending) and len(calls) < times:
                calls.append(path)
                number = getattr(errno, name)
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", fake)
        return calls

    return fail


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors", "state.json"])
def test_an_unreadable_newest_one_is_not_passed_over(tmp_path, fail, name, file):
    store = checkpoints(tmp_path, 100, 200)
    calls = fail(f"iter_0000000200/{file}", name)
    for look in (store.newest_valid, lambda: describe(path_of(tmp_path, 200))):
        calls.clear()
        with pytest.raises(OSError) as caught:
            look()
        assert caught.value.errno == getattr(errno, name)
        assert file in caught.value.filename
        assert len(calls) == 3  # tried three times
    assert iterations_in(tmp_path) == [100, 200]


def test_what_fails_twice_is_read_at_the_third_try(tmp_path, fail):
    store = checkpoints(tmp_path, 100, 200)
    fail("iter_0000000200/manifest.json", "ESTALE", times=2)
    assert store.newest_valid().iteration == 200


@pytest.mark.parametrize("name", ["ENOENT", "ELOOP"])
def test_what_is_missing_or_a_link_is_damaged(tmp_path, fail, name):
    store = checkpoints(tmp_path, 100, 200)
    calls = fail("iter_0000000200/state.json", name)
    assert store.newest_valid().iteration == 100
    assert len(calls) == 1  # definite: not tried again


@pytest.mark.parametrize("ending", ["iter_0000000010/manifest.json", "run_id"])
def test_no_checkpoint_is_deleted_while_something_cannot_be_read(tmp_path, fail, ending):
    store = checkpoints(tmp_path, 10, keep_last=1, on_error="warn")
    run_id = (tmp_path / "run_id").read_text()
    fail(ending)
    for iteration in (20, 30):
        store.save(iteration, small_state(iteration), world_size=1)
    assert 10 in iterations_in(tmp_path)
    assert (tmp_path / "run_id").read_text() == run_id


def test_an_unreadable_one_is_neither_replaced_nor_renamed(tmp_path, fail):
    checkpoints(tmp_path, 10)
    fail("iter_0000000010/model.safetensors")
    again = checkpoints(tmp_path, on_error="warn")
    again.save(10, small_state(3), world_size=1)
    assert "Input/output error" in again.last_error
    assert os.listdir(path_of(tmp_path, 10)) != []
    fail("nothing")
    assert describe(path_of(tmp_path, 10)).valid
    assert iterations_in(tmp_path) == [10]


def test_a_scratch_folder_that_cannot_be_looked_at_is_left(tmp_path, fail):
    scratch = tmp_path / ".tmp-iter_0000000010-0123456789ab"
    scratch.mkdir()
    (scratch / "manifest.json").touch()
    os.utime(scratch, (1, 1))
    fail("manifest.json", "EMFILE")
    clear_leftovers(tmp_path, patience_s=0)
    assert scratch.exists()
    fail("nothing")
    clear_leftovers(tmp_path, patience_s=0)
    assert not scratch.exists()


def test_the_table_tells_unreadable_from_damaged(tmp_path, fail, capsys):
    checkpoints(tmp_path / "checkpoints", 10, 20, 30)
    os.truncate(path_of(tmp_path / "checkpoints", 10) / fmt.STATE_FILE, 5)
    fail("iter_0000000020/state.json")
    assert table([str(tmp_path)]) == 0
    states = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()[1:4]]
    assert [state.split(":")[0].split()[-1] for state in states] == [
        "damaged",
        "unreadable",
        "valid",
    ]


def test_lines_that_cannot_be_read_are_kept(tmp_path, fail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0, "a": 1}\n{"iteration": 5, "a": 2}\n')
    fail("metrics.jsonl", times=2)  # at the start, and for the first row
    writer = Opened(JsonLinesWriter(path), 3)
    with pytest.raises(OSError):
        writer.write(Row(3, 9, {"a": (7.0, 3)}))
    assert len(path.read_text().splitlines()) == 2
    writer.close()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [0, 3]


@pytest.mark.timeout(60)  # of a pipe that nobody writes to, opening it would wait for ever
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    store = checkpoints(tmp_path, 100)
    for name in ("run_id", "best.json", "run.yaml", "metrics.jsonl"):
        tmp_path.joinpath(name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="not a regular file"):
        read_run_id(str(tmp_path))
    with pytest.raises(RunFailed, match="run.yaml cannot be read: not a regular file"):
        read_frozen(tmp_path / "run.yaml")
    writer = Opened(JsonLinesWriter(tmp_path / "metrics.jsonl"), 3)
    with pytest.raises(OSError, match="not a regular file"):
        writer.write(Row(3, 9, {"a": (7.0, 3)}))
    (tmp_path / "run_id").unlink()
    store.save(200, small_state(), world_size=1, best={"acc": 0.5})
    assert store.wait()  # the writer process has replaced best.json
    assert json.loads((tmp_path / "best.json").read_text())["iteration"] == 200
    store.close()


def test_a_lock_that_cannot_be_read_is_not_called_free(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text("seed: 0\n")
    (tmp_path / "lock").write_text("")
    assert holder(tmp_path) is None

    def fail(fd, size, at):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match="Input/output error"):
        holder(tmp_path)
    found = JobStatus(State.UNREADABLE, "lock: Input/output error")
    assert status_of(read(tmp_path)) == found
    assert runs(["stop", str(tmp_path)]) == 2
    assert "unknown whether it runs: lock: Input/output" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["run", "file.safetensors", "file.pt"])
def test_weights_that_cannot_be_read_are_a_failure_of_one_line(tmp_path, fail, kind):
    if kind == "run":
        checkpoints(tmp_path / kind, 100).close()
    else:
        (tmp_path / kind).touch()
    fail("manifest.json" if kind == "run" else kind, "EIO")
    with pytest.raises(RunFailed, match="^init.weights=.* cannot be read: Input/output error"):
        start_from(nn.Linear(1, 1), weights=str(tmp_path / kind))


def test_a_storage_that_fails_in_a_rank_is_one_line(tmp_path, monkeypatch):
    def train(conf, run_dir):
        raise OSError(errno.EIO, "Input/output error", f"{run_dir}/logs")

    monkeypatch.setattr(training, "train", train)
    with pytest.raises(RunFailed, match=f"^{tmp_path}/logs: Input/output error$"):
        TrainJob({}, str(tmp_path))()
    append("/dev/full", "a trace that no disk takes does not hide the failure")


COMMAND = """
import builtins, errno, os, sys
from distrain.files import retry
retry.PAUSES_S = (0.0,)
ending, name = sys.argv.pop(1), sys.argv.pop(1)
real_open, real_os_open = builtins.open, os.open
def check(path):
    if isinstance(path, (str, os.PathLike)) and os.fspath(path).endswith(ending):
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number), os.fspath(path))
def os_open(path, *args, **kwargs):
    check(path)
    return real_os_open(path, *args, **kwargs)
def io_open(path, *args, **kwargs):
    check(path)
    return real_open(path, *args, **kwargs)
os.open = os_open
builtins.open = io_open
from distrain.cli.command import main
main()
"""


def command(folder, *overrides, ending="no such name", name="EIO"):
    arguments = ["--config-dir", "conf", "+experiment=tiny", *overrides]
    (folder / "failing_open.py").write_text(COMMAND)
    return run_module("failing_open", ending, name, *arguments, cwd=folder)


@pytest.fixture
def folder(tmp_path):
    code = TINY + FULL_DISK
    write_project(tmp_path, module="tiny", code=code, experiment="tiny", conf=CONF)
    return tmp_path


FULL_DISK = """
import resource

class FullDisk(HookBase):
    order = 10
    def __init__(self, after, *, checkpoints):
        self.after, self.checkpoints = after, checkpoints
    def after_step(self):
        if self.trainer.iter_done == self.after:
            self.checkpoints.wait()
            writer = self.checkpoints._requests.writer
            resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (0, 0))
"""


def contents(run):
    """Return all but what notes a start."""
    left_out = ("lock", "command.json", "rank_0.log")
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in left_out}


def one_line(result, *words):
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]  # those before it are of the log
    for word in words:
        assert word in line


def test_a_run_whose_files_cannot_be_read_is_refused_and_untouched(folder):
    assert command(folder).returncode == 0
    run = folder / "runs" / "tiny"
    before = contents(run)
    for ending, name in [
        ("iter_0000000030/model.safetensors", "EIO"),  # the newest: no older one in its place
        ("manifest.json", "ESTALE"),
        ("run_id", "EACCES"),
        ("run.yaml", "EMFILE"),
        ("command.json", "EIO"),
    ]:
        more = command(folder, "trainer.max_iter=40", ending=ending, name=name)
        one_line(more, ending, os.strerror(getattr(errno, name)))
        (run / "run.yaml").write_bytes(before[run / "run.yaml"])  # max_iter of the new start
        assert contents(run) == before, ending
    starts = json.loads((run / "command.json").read_text())["starts"]
    assert [start["end"]["code"] for start in starts] == [0, 1, 1, 1]  # the last two noted none
    assert command(folder, "trainer.max_iter=40").returncode == 0


def test_where_all_are_damaged_a_run_begins_at_0_only_if_the_user_removes_them(folder):
    assert command(folder).returncode == 0
    run = folder / "runs" / "tiny"
    for state in run.glob("checkpoints/iter_*/state.json"):
        state.write_text("{}")
    before = contents(run)
    one_line(command(folder), "none of 3 checkpoints", "state.json", "run.name", "move this folder")
    assert contents(run) == before
    (run / "checkpoints").rename(run / "damaged")
    result = command(folder)
    assert result.returncode == 0, result.stderr
    assert "continuing" not in result.stderr


def test_a_damaged_command_json_is_kept(folder):
    assert command(folder, "trainer.max_iter=10").returncode == 0
    run = folder / "runs" / "tiny"
    (run / "command.json").write_text('{"starts": [{"argv"')
    assert command(folder, "trainer.max_iter=20").returncode == 0
    (aside,) = run.glob("command-damaged-*.json")
    assert aside.read_text() == '{"starts": [{"argv"'
    assert len(json.loads((run / "command.json").read_text())["starts"]) == 1


@pytest.mark.parametrize(
    ("period", "after", "words"),
    [("10", 25, "newest checkpoint is that of iteration 20"), ("null", 5, "there is none")],
)
def test_a_last_save_that_fails_is_a_failure(folder, period, after, words):
    hook = ["+hooks.disk._target_=tiny.FullDisk", f"+hooks.disk.after={after}"]
    result = command(folder, *hook, f"hooks.checkpoint.period={period}")
    one_line(result, "distrain: trained up to iteration 30", "File too large", words)
    assert "finished" not in result.stderr
    run = folder / "runs" / "tiny"
    assert status_of(read(run)).state is State.FAILED
    result = command(folder, *hook[:1], "+hooks.disk.after=99", f"hooks.checkpoint.period={period}")
    assert result.returncode == 2  # another hook: another configuration
    result = command(folder, *hook, f"hooks.checkpoint.period={period}")
    assert (run / "checkpoints" / "iter_0000000030").exists() == (result.returncode == 0)


def test_a_run_without_hooks_checkpoint_finishes_with_a_warning(folder):
    result = command(folder, "hooks.checkpoint=null")
    assert result.returncode == 0, result.stderr
    assert "no checkpoint of the end was saved (hooks.checkpoint=null)" in result.stderr
