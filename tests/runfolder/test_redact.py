"""Secrets are masked wherever a configuration or a command is shown or kept."""

import json
import stat

import pytest
import yaml
from test_folder import conf, freeze

from distrain import TrainerBase
from distrain.cli.sweep import folder_name
from distrain.errors import ConfigError, ExitCode
from distrain.hooks.writer import PeriodicWriter
from distrain.redact import is_secret, masked, masked_overrides, masked_text, secrets_of
from distrain.runfolder.folder import RunFolder
from distrain.runs.control import command
from distrain.runs.records import read_starts
from distrain.writers.tensorboard import TensorBoardWriter


@pytest.mark.parametrize(
    "key",
    ["password", "db.PASSWORD", "hooks.wandb.api_key", "apiKey", "data.hf_token", "token"]
    + ["aws_secret_access_key", "client-secret", "credentials.user", "accessToken", "auth"],
)
def test_names_of_secrets(key) -> None:
    assert is_secret(key, "text")


@pytest.mark.parametrize(
    "key",
    ["max_tokens", "num_tokens", "tokenizer", "author", "pad_token", "token_dropout", "authors"]
    + ["secretary", "data.passwords_file_count", "keys", "model.eos_token"],
)
def test_names_that_only_look_like_it(key) -> None:
    assert not is_secret(key, "text")


def test_numbers_of_tokens_are_compared_not_masked() -> None:
    assert masked({"token": 5, "auth": True, "password": 1234, "api_key": None}) == {
        "token": 5,
        "auth": True,
        "password": "***",
        "api_key": None,
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a.password=hunter2", "a.password=***"),
        ("+a.password='hunter 2, x'", "+a.password=***"),
        ("+hooks.w={api_key: hunter2, n: 3}", "+hooks.w={api_key: ***, n: 3}"),
        ("+hooks.w={'token': 'hunter2'}", "+hooks.w={'token': ***}"),
        ("data.path=s3://me:hunter2@host/x", "data.path=s3://***@host/x"),
        ("a.token=${oc.env:HF_TOKEN}", "a.token=${oc.env:HF_TOKEN}"),
        ("a.token=$\\{oc.env:HF_TOKEN\\}", "a.token=$\\{oc.env:HF_TOKEN\\}"),
        ("optim.lr=0.1", "optim.lr=0.1"),
    ],
)
def test_overrides(text, shown) -> None:
    assert masked_overrides([text]) == [shown]


def test_messages_keep_their_words() -> None:
    assert masked_text("a.token: expected a text, a.token=...") == (
        "a.token: expected a text, a.token=***"
    )
    assert masked_text("cannot log in: password=hunter2") == "cannot log in: password=***"
    known = secrets_of(["+a.password='hunter2'"], {"b": {"api_key": "k-1234"}})
    assert masked_text("no login with hunter2 and k-1234", known) == "no login with *** and ***"


SECRET = {"hooks": {"tracker": {"api_key": "hunter2", "url": "https://me:hunter2@host"}}}
ARGV = ["+hooks.tracker.api_key=hunter2", "+hooks.tracker.url=https://me:hunter2@host"]


def test_a_run_folder_holds_no_secret_and_is_private(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # in no git repository, whose changes would be kept
    path = freeze(tmp_path / "a", ARGV, **SECRET).path

    def fail():
        raise ValueError("no login with hunter2")

    with RunFolder(path) as folder:
        folder.freeze(conf(**SECRET), ARGV)
        with pytest.raises(ValueError, match="hunter2"):
            folder.watch(fail)
    files = [path / "run.yaml", path / "command.json"]
    assert not any("hunter2" in file.read_text() for file in files)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    tracker = yaml.safe_load((path / "run.yaml").read_text())["hooks"]["tracker"]
    assert tracker == {"api_key": "***", "url": "https://***@host"}
    last = json.loads((path / "command.json").read_text())["starts"][-1]
    assert last["end"]["why"] == "no login with ***"
    assert last["end"]["code"] == ExitCode.FAILED


def test_another_secret_is_the_same_run_and_resume_asks_for_it(tmp_path) -> None:
    path = freeze(tmp_path / "a", ["+hooks.t.token=old"], hooks={"t": {"token": "old"}}).path
    freeze(path, ["+hooks.t.token=new"], hooks={"t": {"token": "new"}})
    (_, last) = read_starts(path)
    with pytest.raises(ConfigError, match=r"hooks\.t\.token: command\.json holds no secrets"):
        command(last, [], run_dir=path)
    assert "+hooks.t.token=x" in command(last, ["hooks.t.token=x"], run_dir=path)


def test_the_folder_of_a_sweep_does_not_show_it() -> None:
    names = {folder_name(f"a.password={value}", shown="a.password=***") for value in ("one", "two")}
    assert len(names) == 2
    assert all(name.startswith("a.password=___-") for name in names)


def test_tensorboard_shows_no_secret(tmp_path) -> None:
    conf = {"model": {"token": "hunter2"}}
    hook = PeriodicWriter([TensorBoardWriter()], run_dir=str(tmp_path), conf=conf)
    TrainerBase([hook]).train(0, 0)
    (file,) = (each for each in tmp_path.rglob("*") if each.is_file())
    assert b"model.token" in file.read_bytes()
    assert b"hunter2" not in file.read_bytes()
