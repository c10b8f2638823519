"""One odd file in a run folder: that run is unreadable; other runs and the terminal are well."""

import json
import os

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_folder import conf

from distrain.errors import ConfigError
from distrain.launch.slurm.attempts import refuse_other_job
from distrain.runfolder import lock as folderlock
from distrain.runfolder.attempts import Attempt, read_attempts
from distrain.runs.__main__ import run
from distrain.runs.frozen_yaml import load_mapping

START = {"argv": ["x=1"], "overrides": ["x=1"], "folder": "/", "host": "h", "end": None}
START |= {"time": "2026-01-02T03:04:05+00:00", "git": None, "versions": {"torch": "2"}}
GOOD = {
    "run.yaml": yaml.safe_dump(json.loads(json.dumps(conf()))),
    "command.json": json.dumps({"starts": [START]}),
    "metrics.jsonl": '{"iteration": 4, "loss": 0.5}\n',
    "attempts.jsonl": "",
    "slurm/submitted.json": '{"job_id": "12"}',
    "slurm/running.json": "{}",
}
BOMB = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)
ODD = [
    ("run.yaml", "seed: " + "9" * 5000),
    ("run.yaml", "seed: 2001-99-99"),
    ("run.yaml", "a: " + "[" * 100_000),
    ("run.yaml", "- " * 100_000 + "1"),
    ("run.yaml", "a: &a [*a]"),
    ("run.yaml", BOMB),
    ("run.yaml", MERGES),
    ("run.yaml", "just text"),
    ("run.yaml", b"\xff\xfe\x00\x01"),
    ("command.json", '{"starts": [{"argv": 5}]}'),
    ("command.json", '{"starts": [{"time": "0001-01-01T00:00:00"}]}'),
    ("command.json", "[" * 100_000),
    ("command.json", '{"starts": [{"end": {"code": ' + "9" * 5000 + "}}]}"),
    ("command.json", b"\xff\xfe\x00\x01"),
    ("metrics.jsonl", '{"iteration": ' + "9" * 400 + "}\n"),
    ("metrics.jsonl", '{"iteration": 1, "loss": ' + "9" * 400 + "}\n"),
    ("metrics.jsonl", '{"iteration": 1, "loss": [1]}\n'),
    ("metrics.jsonl", "[" * 60_000 + "\n"),
    ("attempts.jsonl", '{"attempt": "x"}\n'),
    ("slurm/submitted.json", '{"job_id": "--help"}'),
    ("slurm/running.json", '{"job_id": 5}'),
]


def make(path, **files):
    (path / "slurm").mkdir(parents=True, exist_ok=True)
    for name, text in (GOOD | files).items():
        (path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def table(folder, capsys):
    """Return what the table says of each run, by its name."""
    assert run([str(folder)]) == 0
    assert run([str(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    assert not err
    return {each["name"]: each for each in json.loads(out[out.index("[\n") :])}


@pytest.mark.parametrize(("name", "text"), ODD, ids=range(len(ODD)))
def test_an_odd_file_makes_its_run_unreadable_and_no_other(tmp_path, capsys, name, text):
    make(tmp_path / "good")
    odd = make(tmp_path / "odd", **{name: text})
    runs = table(tmp_path, capsys)
    assert runs["good"]["state"] == "dead"
    assert runs["good"]["values"] == {"loss": 0.5}
    assert runs["odd"]["state"] == "unreadable"
    assert runs["odd"]["why"].startswith(f"{os.path.basename(name)}: ")
    for argv in (["show", str(odd)], ["diff", str(odd), str(tmp_path / "good")]):
        assert run(argv) == 0
        assert "unreadable: " in capsys.readouterr().out


@pytest.mark.parametrize("name", [*GOOD, "lock", "logs/rank_0.log", "git.diff"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "device"])
@pytest.mark.timeout(60)  # of a pipe that nobody writes to, opening it would wait for ever
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, capsys, name, kind):
    make(tmp_path / "good")
    odd = make(tmp_path / "odd") / name
    odd.parent.mkdir(exist_ok=True)
    odd.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(odd)
    elif kind == "folder":
        odd.mkdir()
    else:
        odd.symlink_to(odd.name if kind == "loop" else "/dev/zero")
    runs = table(tmp_path, capsys)
    assert runs["good"]["state"] == "dead"
    assert runs["odd"]["state"] == ("unreadable" if name in GOOD else "dead")
    assert run(["show", str(tmp_path / "odd")]) == 0
    assert run(["diff", str(tmp_path / "odd"), str(tmp_path / "good")]) == 0


def test_what_is_shown_of_a_run_is_masked_and_escaped(tmp_path, capsys):
    said = "cannot log in: password=hunter22 at https://me:pass5678@host \x1b[31m"
    attempt = Attempt(1, "12", 0, ["n1"], 1.0, 2.0, outcome="failed", why=said)
    start = START | {"end": {"time": START["time"], "code": 1, "why": said}}
    odd = make(
        tmp_path / "odd",
        **{
            "attempts.jsonl": json.dumps(vars(attempt)) + "\n",
            "command.json": json.dumps({"starts": [start]}),
        },
    )
    (odd / "logs").mkdir()
    (odd / "logs" / "rank_0.log").write_text(f"{said}\n")
    shown = table(tmp_path, capsys)["odd"]["why"] + "\n"
    assert run(["show", str(odd)]) == 0
    assert run(["stop", str(odd)]) == 0
    shown += capsys.readouterr().out
    # the state, the attempt, the start, the log
    assert shown.count("password=*** at https://***@host") == 5
    assert "hunter22" not in shown
    assert "pass5678" not in shown
    assert shown[shown.index("\n") :].count("\x1b") == 0


@pytest.mark.timeout(60)
def test_commands_that_write_do_not_wait_for_a_pipe_either(tmp_path):
    slurm, lock, attempts = (tmp_path / name for name in ("slurm", "lock", "attempts"))
    slurm.mkdir()
    for pipe in (slurm / "submitted.json", lock, attempts.with_suffix(".jsonl")):
        os.mkfifo(pipe)
    with pytest.raises(OSError, match="not a regular file"):
        refuse_other_job(tmp_path)
    with pytest.raises(OSError, match="not a regular file"):
        read_attempts(tmp_path)
    with pytest.raises(ConfigError, match="its file lock is not that of a run; move it away"):
        folderlock.hold(tmp_path)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400)
VALUES = st.recursive(LEAVES, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=5)
STARTS = st.fixed_dictionaries({}, optional=dict.fromkeys((*START, "why"), VALUES))
ENDS = st.fixed_dictionaries({}, optional=dict.fromkeys(("time", "code", "why"), VALUES))
ATTEMPTS = st.fixed_dictionaries({}, optional=dict.fromkeys(Attempt.__annotations__, VALUES))
ROWS = st.fixed_dictionaries(
    {"iteration": VALUES | st.just(3)}, optional=dict.fromkeys(("loss", "perf/step_s"), VALUES)
)
CONFS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("trainer", "launch", "run"), VALUES)
    | {"launch": st.fixed_dictionaries({}, optional=dict.fromkeys(("ranks", "nodes"), VALUES))},
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_values_in_any_file(tmp_path, capsys, data):
    make(tmp_path / "good")
    start = data.draw(STARTS) | {"end": data.draw(ENDS | VALUES)}
    files = {
        "run.yaml": json.dumps(data.draw(CONFS)),
        "command.json": json.dumps(data.draw(VALUES | st.just({"starts": [start]}))),
        "metrics.jsonl": json.dumps(data.draw(ROWS | VALUES)) + "\n",
        "attempts.jsonl": json.dumps(data.draw(ATTEMPTS | VALUES)) + "\n",
        "slurm/submitted.json": json.dumps(data.draw(VALUES)),
        "slurm/running.json": json.dumps(data.draw(ATTEMPTS | VALUES)),
        "lock": json.dumps(data.draw(VALUES)),
    }
    name = data.draw(st.sampled_from(sorted(files)))
    make(tmp_path / "odd", **{name: files[name]})
    assert table(tmp_path, capsys)["good"]["values"] == {"loss": 0.5}
    assert run(["show", str(tmp_path / "odd")]) == 0
    assert run(["diff", str(tmp_path / "odd"), str(tmp_path / "good")]) == 0
    capsys.readouterr()


def test_nothing_of_a_file_reaches_the_terminal_as_it_is(tmp_path, capsys):
    evil = "\x1b]0;x\x07\u202e\nnew"
    end = {"time": START["time"], "code": 1, "why": f"why {evil}"}
    files = {
        "command.json": json.dumps({"starts": [START | {"host": evil, "end": end}]}),
        "metrics.jsonl": json.dumps({"iteration": 1, f"m{evil}": 1.0}) + "\n",
        "run.yaml": yaml.safe_dump(json.loads(json.dumps(conf(vars={"x": evil})))),
    }
    path = make(tmp_path / f"n{evil}", **files)
    (path / "logs").mkdir()
    (path / "logs" / "rank_0.log").write_text(evil)
    for argv in ([str(tmp_path)], ["show", str(path)], ["diff", str(path), str(path)]):
        assert run([*argv, *["--metric", f"m{evil}"][: 2 * (argv[0] != "diff")]]) == 0
    assert run(["show", str(tmp_path / f"x{evil}"), "--folder", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "\\x1b" in out
    assert "\\u202e" in err
    assert all(c.isprintable() or c == "\n" for c in out + err)


def test_aliases_that_a_dump_writes_are_read():
    shared = [1, 2]
    assert load_mapping(yaml.safe_dump({"a": shared, "b": shared}).encode())["b"] == [1, 2]


def test_an_unknown_command_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["shwo", "mine"]) == 2
    assert "shwo: no such command; did you mean show?" in capsys.readouterr().err


def code_line(tmp_path, capsys, left, right):
    for name, start in (("a", left), ("b", right)):
        make(tmp_path / name, **{"command.json": json.dumps({"starts": [START | start]})})
    assert run(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    return capsys.readouterr().out


def test_diff_says_what_it_does_not_know_of_the_code(tmp_path, capsys):
    clean = {"git": {"commit": "abc", "changed": False}}
    dirty = {"git": {"commit": "abc", "changed": True, "diff": "git.diff"}}
    assert "code: unknown, not in git" in code_line(tmp_path, capsys, {}, {})
    assert "code: the same commit and versions" in code_line(tmp_path, capsys, clean, clean)
    assert "unknown, not in git" in code_line(tmp_path, capsys, clean, {})
    (tmp_path / "a" / "git.diff").write_text("-1\n")
    (tmp_path / "b" / "git.diff").write_text("-2\n")
    assert "changes since" in code_line(tmp_path, capsys, dirty, dirty)
    (tmp_path / "b" / "git.diff").write_text("-1\n")
    assert "code: the same commit and versions" in code_line(tmp_path, capsys, dirty, dirty)
    for name in "ab":
        (tmp_path / name / "git.diff").write_text("left out: 9 bytes\n")
    assert "code: unknown, the changes" in code_line(tmp_path, capsys, dirty, dirty)


def test_scalars_of_clocks_and_guards_are_shown_on_request(tmp_path, capsys):
    row = '{"iteration": 1, "loss": 1.0, "perf/step_s": 0.1, "guard/checksum": 5}\n'
    path = make(tmp_path / "a", **{"metrics.jsonl": row})
    for command in (["show", str(path)], ["diff", str(path), str(path)]):
        assert run(command) == 0
        assert "guard/checksum" not in capsys.readouterr().out
        assert run([*command, "--all"]) == 0
        assert "guard/checksum" in capsys.readouterr().out
