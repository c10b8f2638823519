"""The folder of a run: whose it is, what is frozen into it, and that nothing of others is lost."""

import copy
import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkpoint_cases import checkpoints

from distrain.config.check_keys import check
from distrain.errors import ConfigError, RunFailed
from distrain.runfolder import lock as folderlock
from distrain.runfolder.allowed_changes import changes_of_run
from distrain.runfolder.differences import differences
from distrain.runfolder.folder import RunFolder, await_run
from distrain.runfolder.provenance import git_state

HOLD = """
import sys
from distrain.runfolder.folder import RunFolder
with RunFolder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def conf(**changes):
    """Return a resolved configuration; `optim__lr=1` changes `optim.lr`."""
    base = {
        "run": {"name": "a", "dir": "runs/a"},
        "seed": 0,
        "resume": "auto",
        "plan": False,
        "trainer": {"max_iter": 30, "clip_norm": None},
        "optim": {"lr": 0.1, "betas": (0.9, 0.99)},
        "data": {"batch_size": 8, "workers": 0},
        "launch": {"ranks": 2},
        "checkpoint": {"mirror": None},
        "hooks": {},
        "vars": {},
    }
    for key, value in changes.items():
        *nodes, last = key.split("__")
        node = base
        for name in nodes:
            node = node[name]
        node[last] = value
    return base


def freeze(path, argv=("x=1",), *, is_restart=False, **changes):
    """Make or continue a run; return its folder after the end of the `with`."""
    with RunFolder(path) as folder:
        folder.freeze(conf(**changes), argv, is_restart=is_restart)
    return folder


def starts(path):
    return json.loads((path / "command.json").read_text())["starts"]


def contents(path):
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != "lock"}


def fill_disk(monkeypatch, full_at):
    """Let files whose names have this in them be emptied and take nothing."""
    real = os.open

    def fill(path, flags, *args, **kwargs):
        fd = real(path, flags, *args, **kwargs)
        if flags & os.O_TRUNC and full_at in str(path):
            os.close(fd)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fd

    monkeypatch.setattr(os, "open", fill)


@pytest.mark.parametrize("full_at", ["run.yaml", "command.json"])
def test_a_full_disk_at_the_start_is_a_line_and_leaves_nothing(tmp_path, monkeypatch, full_at):
    fill_disk(monkeypatch, full_at)
    with pytest.raises(ConfigError, match=f"{full_at} cannot be written: No space left"):
        freeze(tmp_path / "a")
    assert not contents(tmp_path)


def test_a_full_disk_damages_no_file_of_an_earlier_start(tmp_path, monkeypatch):
    path = freeze(tmp_path / "a").path
    before = contents(path)
    fill_disk(monkeypatch, "run.yaml")
    with pytest.raises(ConfigError, match=r"run.yaml cannot be written: No space left"):
        freeze(path, data={**conf()["data"], "workers": 3})
    assert contents(path) == before


def test_a_new_folder_holds_the_configuration_and_the_command(tmp_path):
    folder = freeze(tmp_path / "runs" / "a", ["optim.lr=0.1"])
    assert folder.is_new
    assert folder.done_iter is None
    text = (folder.path / "run.yaml").read_text()
    assert text.startswith("# Resolved configuration")
    assert yaml.safe_load(text)["optim"] == {"lr": 0.1, "betas": [0.9, 0.99]}
    (start,) = starts(folder.path)
    assert start["argv"] == ["optim.lr=0.1"]
    assert (start["pid"], start["host"]) == (os.getpid(), socket.gethostname())
    assert start["versions"]["torch"]
    assert start["changed"] == {}
    has_diff = bool((start["git"] or {}).get("diff"))
    names = ["command.json", *(["git.diff"] if has_diff else []), "lock", "run.yaml"]
    assert sorted(os.listdir(folder.path)) == names


def test_the_same_again_is_a_second_start_and_changes_nothing_else(tmp_path):
    path = freeze(tmp_path / "a").path
    before = (path / "run.yaml").read_bytes()
    again = freeze(path, ["x=2"])
    assert not again.is_new
    assert (path / "run.yaml").read_bytes() == before
    assert [start["argv"] for start in starts(path)] == [["x=1"], ["x=2"]]


@pytest.mark.parametrize(
    "changes",
    [
        {"launch__ranks": 4},
        {"data__workers": 2},
        {"vars__width": 3},
        {"run__name": "b"},
        {"resume": "auto"},
    ],
)
def test_what_does_not_change_the_result_may_change(tmp_path, changes):
    path = freeze(tmp_path / "a").path
    folder = freeze(path, **changes)
    assert folder.notices == []
    ((key, value),) = changes.items()
    frozen = yaml.safe_load((path / "run.yaml").read_text())
    assert differences(frozen, conf(**{key: value})) == {}


def test_a_run_may_be_made_longer_and_the_user_is_told(tmp_path):
    path = freeze(tmp_path / "a").path
    folder = freeze(path, trainer__max_iter=60)
    assert folder.notices == ["trainer.max_iter: 30 -> 60 from here on"]
    assert starts(path)[1]["changed"] == {"trainer.max_iter": [30, 60]}
    assert yaml.safe_load((path / "run.yaml").read_text())["trainer"]["max_iter"] == 60


def test_a_mirror_that_is_left_out_is_reported(tmp_path):
    path = freeze(tmp_path / "a", checkpoint__mirror="s3://bucket/a").path
    folder = freeze(path)
    assert folder.notices == ["checkpoint.mirror: s3://bucket/a -> null from here on"]


def test_the_data_may_lie_elsewhere_and_the_user_is_told(tmp_path):
    path = freeze(tmp_path / "a", data__train={"root": "/job_a/data", "split": "train"}).path
    moved = {"root": "/job_b/data", "split": "train"}
    folder = freeze(path, data__train=moved)
    assert folder.notices == ["data.train.root: /job_a/data -> /job_b/data from here on"]
    assert starts(path)[1]["changed"] == {"data.train.root": ["/job_a/data", "/job_b/data"]}
    assert yaml.safe_load((path / "run.yaml").read_text())["data"]["train"] == moved


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"data__train": {"split": "train"}}, {"data__train": {"split": "test"}}),  # no path
        ({"data__train": {"root": None}}, {"data__train": {"root": "/data"}}),  # none before
        ({"model": {"vocabulary": "/a/words"}}, {"model": {"vocabulary": "/b/words"}}),  # no data
    ],
)
def test_other_texts_are_no_paths_of_data_and_may_not_change(tmp_path, before, now):
    path = freeze(tmp_path / "a", **before).path
    with pytest.raises(ConfigError, match="another configuration"):
        freeze(path, **now)


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path):
    path = freeze(tmp_path / "a").path
    before = contents(path)
    with pytest.raises(ConfigError) as caught:
        freeze(
            path,
            optim__lr=0.2,
            trainer__clip_norm=1.0,
            launch__ranks=3,
            hooks__x={"_target_": "m.X"},
        )
    text = str(caught.value)
    assert "optim.lr: 0.1 -> 0.2" in text
    assert "trainer.clip_norm: null -> 1.0" in text
    assert "hooks.x._target_: null -> m.X" in text
    assert "launch" not in text
    assert "\n" not in text
    assert contents(path) == before


def test_keys_that_are_newer_than_a_run_have_their_defaults_in_it(tmp_path):
    whole = {
        "run": {"name": "a", "dir": "runs/a"},
        "data": {"batch_size": 8, "train": {"_target_": "my.Data"}},
        "trainer": {"max_iter": 30},
        "model": {"_target_": "my.Model"},
        "launch": {"_target_": "my.Launcher"},
    }
    with RunFolder(tmp_path / "a") as folder:
        folder.freeze(check(copy.deepcopy(whole)), ("x=1",))
    file = tmp_path / "a" / "run.yaml"
    frozen = yaml.safe_load(file.read_text())
    del frozen["trainer"]["deterministic"]  # as an earlier version had it
    file.write_text(yaml.safe_dump(frozen))
    with RunFolder(tmp_path / "a") as folder:
        folder.freeze(check(copy.deepcopy(whole)), ("x=1",))
    whole["trainer"]["deterministic"] = True
    with pytest.raises(ConfigError, match=r"trainer\.deterministic: false -> true"):
        with RunFolder(tmp_path / "a") as folder:
            folder.freeze(check(whole), ("x=1",))


def test_of_many_keys_five_are_named(tmp_path):
    path = freeze(tmp_path / "a").path
    with pytest.raises(ConfigError, match=r"and 2 more\)"):
        freeze(path, optim={"lr": 0.1, "betas": [0.9, 0.99]} | dict.fromkeys("abcdefg", 1))


def test_nan_is_no_difference():
    old = {"fill": float("nan"), "fills": [1.0, float("nan")]}
    assert differences(old, {"fill": float("nan"), "fills": [1.0, float("nan")]}) == {}
    assert set(differences(old, {"fill": 0.0, "fills": [2.0, float("nan")]})) == {"fill", "fills"}


def test_differences_by_hand():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": {}, "e": 1}
    new = {"a": {"b": 2, "c": (1, 2)}, "d": {"x": 0}}
    assert differences(old, new) == {
        "a.b": (1, 2),
        "d": ({}, None),
        "e": (1, None),
        "d.x": (None, 0),
    }


def test_resume_never_and_must(tmp_path):
    path = freeze(tmp_path / "a").path
    with pytest.raises(ConfigError, match="resume=never: .* holds a run; give another run.name"):
        freeze(path, resume="never")
    freeze(path, resume="never", is_restart=True)  # an agent's own restart is the same run
    with pytest.raises(ConfigError, match="resume=must: .* holds no checkpoint"):
        freeze(path, resume="must")
    with pytest.raises(ConfigError, match="resume=must: .* holds no run"):
        freeze(tmp_path / "new", resume="must")
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    mine = tmp_path / "mine"
    (mine / "deep").mkdir(parents=True)
    (mine / "thesis.txt").write_text("all of it")
    (mine / "deep" / "x").write_text("x")
    with pytest.raises(ConfigError, match="holds no run, but deep, thesis.txt; give another one"):
        freeze(mine)
    assert contents(mine) == {mine / "thesis.txt": b"all of it", mine / "deep" / "x": b"x"}
    assert sorted(os.listdir(mine)) == ["deep", "thesis.txt"]


def test_hidden_files_of_others_survive_a_mistake(tmp_path):
    mine = tmp_path / "mine"
    (mine / ".git").mkdir(parents=True)
    (mine / ".git" / "HEAD").write_text("ref")
    with pytest.raises(ConfigError, match="found by a rank"), RunFolder(mine) as folder:
        folder.freeze(conf(), [])
        (mine / "logs").mkdir()
        raise ConfigError("found by a rank")
    assert sorted(os.listdir(mine)) == [".git"]
    assert (mine / ".git" / "HEAD").read_text() == "ref"


def test_a_mistake_leaves_no_new_folder(tmp_path):
    path = tmp_path / "x" / "y" / "run"
    with pytest.raises(ConfigError), RunFolder(path) as folder:
        folder.freeze(conf(), [])
        (path / "logs").mkdir()
        (path / "logs" / "rank_0.log").write_text("...")
        raise ConfigError("found by a rank")
    assert os.listdir(tmp_path) == []


def test_a_mistake_in_a_used_folder_restores_it(tmp_path):
    path = freeze(tmp_path / "a").path
    before = contents(path)
    with pytest.raises(ConfigError), RunFolder(path) as folder:
        folder.freeze(conf(trainer__max_iter=60), ["y"])
        assert contents(path) != before
        raise ConfigError("found by a rank")
    assert contents(path) == before


def test_a_failure_that_is_no_mistake_keeps_the_folder(tmp_path):
    with pytest.raises(KeyError), RunFolder(tmp_path / "a") as folder:
        folder.freeze(conf(), [])
        raise KeyError("a crash")
    assert (tmp_path / "a" / "run.yaml").exists()


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    path = freeze(tmp_path / "a").path
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "held\n"
        before = contents(path)
        with pytest.raises(ConfigError) as caught:
            freeze(path)
        assert f"process {other.pid} on {socket.gethostname()}" in str(caught.value)
        assert "runs here already" in str(caught.value)
        assert contents(path) == before
    finally:
        other.communicate("")
    freeze(path)  # it is free again


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, ConfigError), (errno.EIO, RunFailed)])
def test_a_folder_that_cannot_be_listed_is_one_error(tmp_path, monkeypatch, number, kind):
    def failing(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", failing)
        with pytest.raises(kind, match=f"run.dir={tmp_path / 'a'}: {os.strerror(number)}"):
            RunFolder(tmp_path / "a").__enter__()
    with RunFolder(tmp_path / "a"):  # it is free again
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "a")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    other.kill()
    other.communicate()
    assert json.loads((tmp_path / "a" / "lock").read_text())["pid"] == other.pid
    assert freeze(tmp_path / "a").is_new


def test_ranks_that_outlive_their_killed_command_are_waited_for_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(folderlock, "_ENDING_S", 0.3)
    gone = subprocess.Popen(["true"])
    gone.wait()
    fd = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    os.write(fd, json.dumps({"pid": gone.pid, "host": socket.gethostname()}).encode())
    fcntl.flock(fd, fcntl.LOCK_EX)  # as a rank that inherited it
    with pytest.raises(ConfigError, match=f"process {gone.pid} .* runs here already"):
        RunFolder(tmp_path).__enter__()
    os.close(fd)
    with RunFolder(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "\0" * 64, '{"p', '{"pid": 1', '{"pid": 1}'])
def test_a_lock_that_nobody_holds_is_free_whatever_was_left_of_its_text(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    assert freeze(tmp_path).is_new


@pytest.mark.parametrize("text", ["nonsense", "[1]", '{"packages": []}', "{\n", "\n"])
def test_a_users_own_file_called_lock_is_left_alone(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with pytest.raises(ConfigError, match="run.dir=.* its file lock is not that of a run; move it"):
        freeze(tmp_path)
    assert os.listdir(tmp_path) == ["lock"]
    assert (tmp_path / "lock").read_text() == text
    (tmp_path / "lock").unlink()
    assert freeze(tmp_path).is_new


@pytest.mark.parametrize("name", ["my run", "it's", 'a"b', "a;touch x", "$(touch x)", "ü", "-rf"])
def test_any_name_is_only_a_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    freeze(os.path.join("runs", name))
    assert os.listdir(tmp_path) == ["runs"]
    assert os.listdir(tmp_path / "runs") == [name]


def test_a_folder_that_cannot_be_made_is_a_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run.dir=.*/file/a: Not a directory"):
        freeze(tmp_path / "file" / "a")
    with pytest.raises(ConfigError, match="File name too long"):
        freeze(tmp_path / ("n" * 300))
    assert os.listdir(tmp_path) == ["file"]


def test_other_ranks_wait_for_a_run_until_they_do_not(tmp_path):
    with pytest.raises(ConfigError, match=r"rank 0 started no run within 0.1 s"):
        await_run(tmp_path, timeout_s=0.1)
    await_run(freeze(tmp_path / "a").path, timeout_s=0.1)


def git(folder, *arguments):
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_state_of_the_users_repository_is_recorded(tmp_path, monkeypatch):
    repo, path = tmp_path / "repo", tmp_path / "run"
    repo.mkdir()
    monkeypatch.chdir(repo)
    assert git_state(str(repo)) == (None, "")
    git(repo, "init", "-q")
    (repo / "model.py").write_text("width = 1\n")
    (repo / ".gitignore").write_text("*.log\n")
    git(repo, "add", ".")
    git(repo, "commit", "-qm", "one")
    freeze(path)
    commit = git(repo, "rev-parse", "HEAD")
    assert starts(path)[0]["git"] == {"commit": commit, "changed": False, "untracked": []}
    assert not list(path.glob("*.diff"))
    (repo / "model.py").write_text("width = 2\n")
    (repo / "new.py").write_text("")
    (repo / "x.log").write_text("")
    freeze(path)
    second = starts(path)[1]["git"]
    assert second == {
        "commit": commit,
        "changed": True,
        "untracked": ["new.py"],
        "diff": "git-1.diff",
    }
    assert "+width = 2" in (path / "git-1.diff").read_text().splitlines()
    assert Path(path, "run.yaml").exists()


def test_fewer_iterations_than_are_done_are_refused_and_change_nothing(tmp_path):
    path = freeze(tmp_path / "a", trainer__max_iter=150).path
    checkpoints(path / "checkpoints", 150)
    before = contents(path)
    words = "trainer.max_iter=50: expected more than 150, the iterations that are done"
    with pytest.raises(ConfigError, match=words):
        freeze(path, trainer__max_iter=50)
    assert contents(path) == before
    assert freeze(path, trainer__max_iter=150).done_iter == 150


def test_a_permitted_change_is_recorded_with_its_iteration(tmp_path):
    path = freeze(tmp_path / "a").path
    checkpoints(path / "checkpoints", 20)
    folder = freeze(path, optim__lr=0.05, allow_changes=["optim"])
    assert folder.notices == ["optim.lr: 0.1 -> 0.05 from here on"]
    assert starts(path)[1]["iteration"] == 20
    assert starts(path)[1]["changed"]["optim.lr"] == [0.1, 0.05]
    freeze(path, optim__lr=0.05)
    assert changes_of_run(path) == ["optim.lr: 0.1 -> 0.05 after iteration 20"]


@pytest.mark.parametrize("values", [(10, 20), (None, "1 epoch")])
def test_periods_and_paths_of_hooks_need_no_permission(tmp_path, values):
    hooks = [
        {"eval": {"period": period}, "own": {"folder": folder}}
        for period, folder in zip(values, ("/a/b", "/c/d"), strict=True)
    ]
    path = freeze(tmp_path / "a", hooks=hooks[0]).path
    freeze(path, hooks=hooks[1])
    with pytest.raises(ConfigError, match=r"allow_changes=\[hooks.own.size\]$"):
        freeze(path, hooks={**hooks[1], "own": {"folder": "/c/d", "size": 3}})


def test_what_no_permission_covers(tmp_path):
    path = freeze(tmp_path / "a", optim={"lr": 0.1, "target": "a.B"}).path
    before = contents(path)
    with pytest.raises(ConfigError, match="optim.target: a.B -> a.C.* to continue it$"):
        freeze(path, optim={"lr": 0.1, "target": "a.C"}, allow_changes=["optim"])
    with pytest.raises(ConfigError, match=r"^allow_changes=\[optm\]: no such key; did you mean"):
        freeze(path, optim={"lr": 0.1, "target": "a.B"}, allow_changes=["optm"])
    assert contents(path) == before
