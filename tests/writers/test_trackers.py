"""Trackers: what their own libraries read back is what metrics.jsonl has; none holds up a run."""

import csv
import json
import logging
import math
import struct
import sys
import threading
import urllib.request
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from run_module import run_module

from distrain.errors import ConfigError
from distrain.events.histogram import Histogram
from distrain.writers import (
    CsvWriter,
    JsonLinesWriter,
    MlflowWriter,
    PrometheusWriter,
    Row,
    RunInfo,
    WandbWriter,
    Writer,
)
from distrain.writers import background as background_module
from distrain.writers.background import BackgroundWriter

CONF = {"optim": {"lr": 0.1, "note": "x" * 900}, "hooks": {"a": 1}}


def row(iteration, **scalars):
    values = {name: (value, iteration) for name, value in scalars.items()}
    image = ("picture", np.zeros((1, 4, 4), dtype=np.float32), iteration)
    counts, edges = np.array([1.0, 2.0]), np.array([0.0, 1.0, 2.0])
    histogram = ("weights", Histogram(counts, edges, 0.0, 2.0, 3.0, 5.0, 3), iteration)
    return Row(iteration, 40, values, [image], [histogram], new=values)


def write(writer, run_dir, iterations, *, start=0, finishes=True):
    """Write rows as one attempt that starts at an iteration; the end of a killed one is missing."""
    writer.open(RunInfo(run_dir, start, CONF))
    for i in iterations:
        extra = {"eval/accuracy": i / 100} if i % 2 else {}
        writer.write(row(i, loss=1 / (i + 1), **extra))
    if finishes:
        writer.finish({"loss": 0.5})
        writer.close()


def records(path):
    """Yield the records of a file of W&B: a log in blocks of 32 KiB, as LevelDB writes it."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""  # after the file's header
    while position + 7 <= len(data):
        if (left := 2**15 - position % 2**15) < 7:
            position += left  # no room for a header: zeros
            continue
        size, kind = struct.unpack_from("<HB", data, position + 4)  # after the checksum
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def wandb_files(run_dir):
    """Return the history {step: {name: value}}, configuration, ids and exit codes of all files."""
    import wandb

    wandb.teardown()  # its process writes the last records when it ends
    history, config, ids, codes = defaultdict(dict), {}, set(), []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
            if record.HasField("exit"):
                codes.append(record.exit.exit_code)
            if record.HasField("history"):
                for item in record.history.item:
                    name = item.key or ".".join(item.nested_key)
                    history[record.history.step.num][name] = json.loads(item.value_json)
    return history, config, ids, codes


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    import wandb
    from wandb.sdk.data_types._private import MEDIA_TMP

    Path(MEDIA_TMP.name).mkdir(exist_ok=True, parents=True)  # made at the import, by another test
    yield WandbWriter("mine", options={"tags": ["t"]})

    wandb.teardown()  # its service process


def test_wandb_has_the_rows_of_both_attempts_under_one_id(offline, tmp_path):
    write(offline, tmp_path, [4, 9, 14], finishes=False)
    offline._run.finish(exit_code=1)
    threading.Event().wait(1.1)  # W&B names the folder of an attempt after the second it starts in
    write(WandbWriter("mine"), tmp_path, [14, 19], start=10)
    history, config, ids, codes = wandb_files(tmp_path)
    assert ids == {(tmp_path / "wandb_run_id").read_text()}
    assert {step: values["loss"] for step, values in history.items()} == {
        i: 1 / (i + 1) for i in (4, 9, 14, 19)
    }
    assert [step for step, values in history.items() if "eval/accuracy" in values] == [9, 19]
    kinds = {name: value for name, value in history[4].items() if name.endswith("._type")}
    assert kinds == {"picture._type": "image-file", "weights._type": "histogram"}
    assert config["optim"]["lr"] == 0.1
    assert codes == [1, 0]


def test_wandb_gets_no_command_line_whose_overrides_may_be_secrets(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distrain", "data.train.api_key=of-the-user"])
    write(offline, tmp_path, [4])
    assert wandb_files(tmp_path)[0][4]["loss"] == 1 / 5
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in found if b"of-the-user" in path.read_bytes()]


def test_wandb_without_a_key_is_offline(offline, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))  # without ~/.netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    write(offline, tmp_path, [4])
    assert wandb_files(tmp_path)[0][4]["loss"] == 1 / 5
    assert "The run is offline: upload it by `wandb sync`" in caplog.text


def test_mlflow_has_the_rows_of_both_attempts_once(tmp_path):
    from mlflow import MlflowClient

    run_dir = tmp_path / "runs" / "mine"
    run_dir.mkdir(parents=True)
    write(MlflowWriter(), run_dir, [4, 9, 14], finishes=False)  # killed
    again = MlflowWriter()
    again.open(RunInfo(run_dir, 10, CONF))
    again.write(row(14, loss=1 / 15))  # trained again
    again.write(row(14, loss=1 / 15, **{"eval/accuracy": 0.14, "odd[name]": math.nan}))
    again.write(row(19, loss=1 / 20))
    again.close()  # not finished
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    run_id = (run_dir / "mlflow_run_id").read_text()
    history = {
        name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)]
        for name in ("loss", "eval/accuracy")
    }
    assert history["loss"] == [(i, 1 / (i + 1)) for i in (4, 9, 14, 19)]
    assert history["eval/accuracy"] == [(9, 0.09), (14, 0.14)]
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("mine", "KILLED")
    assert run.data.params == {"optim.lr": "0.1", "optim.note": "x" * 500}
    assert math.isnan(run.data.metrics["odd_name_"])
    assert client.list_artifacts(run_id, "images")
    assert (tmp_path / "runs" / "mlflow-artifacts").is_dir()
    assert not logging.getLogger("distrain").disabled


def test_csv_gets_a_column_for_each_new_name_and_drops_what_is_trained_again(tmp_path):
    write(CsvWriter(), tmp_path, [4, 9, 14], finishes=False)
    write(CsvWriter(), tmp_path, [14, 19], start=10)
    lines = [*csv.DictReader((tmp_path / "metrics.csv").open(newline=""))]
    assert [int(line["iteration"]) for line in lines] == [4, 9, 14, 19]
    assert [line["eval/accuracy"] or "" for line in lines] == ["", "0.09", "", "0.19"]
    assert [float(line["loss"]) for line in lines] == [1 / 5, 1 / 10, 1 / 15, 1 / 20]


def test_prometheus_serves_and_writes_the_newest_values(tmp_path):
    writer = PrometheusWriter(port=0)
    writer.open(RunInfo(tmp_path))
    writer.write(row(4, loss=0.25))
    port = writer._server.server_port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        served = answer.read().decode()
    name = tmp_path.name
    assert f'distrain_scalar{{name="loss",run="{name}"}} 0.25' in served
    assert f'distrain_iteration{{run="{name}"}} 5.0' in served
    assert (tmp_path / "metrics.prom").read_text() == served
    writer.finish({})
    writer.close()
    assert f'distrain_finished{{run="{name}"}} 1.0' in (tmp_path / "metrics.prom").read_text()
    dashboard = json.loads(Path("docs/grafana.json").read_text())
    queries = " ".join(t["expr"] for panel in dashboard["panels"] for t in panel["targets"])
    for gauge in ("distrain_scalar", "distrain_iteration", "distrain_max_iter"):
        assert gauge in queries


def test_mlflow_gets_the_rows_that_a_killed_process_had_not_sent(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # MLflow puts images into mlruns/ here

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    write(MlflowWriter(uri), tmp_path, [4, 9], finishes=False)  # killed; 14 and 19 were waiting
    lines = [{"iteration": i, "loss": 1 / (i + 1), "odd": "NaN"} for i in (4, 9, 14, 19)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    write(MlflowWriter(uri), tmp_path, [24], start=20)
    history = MlflowClient(uri).get_metric_history((tmp_path / "mlflow_run_id").read_text(), "loss")
    assert [(m.step, m.value) for m in history] == [(i, 1 / (i + 1)) for i in (4, 9, 14, 19, 24)]


def test_a_parameter_that_mlflow_refuses_costs_a_warning(tmp_path, monkeypatch, caplog):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # MLflow puts images into mlruns/ here

    writer = MlflowWriter(f"sqlite:///{tmp_path}/mlflow.db")
    writer.open(RunInfo(tmp_path, 0, {"data": {"x" * 300: 1}}))
    for i in range(3):
        writer.write(row(i, loss=1.0))
    writer.close()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("distrain").experiment_id
    (run,) = client.search_runs([experiment])
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [0, 1, 2]
    assert "are missing: 'Param key' exceeds the maximum length" in caplog.text


@pytest.mark.parametrize("kind", [WandbWriter, MlflowWriter, PrometheusWriter])
def test_a_missing_library_is_one_line(kind, monkeypatch):
    for name in ("wandb", "mlflow", "prometheus_client"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r'expected \w+; pip install "distrain\[\w+\]"'):
        kind()


class Hanging(Writer):
    """A tracker whose server does not answer."""

    is_remote = True

    def __init__(self):
        self.gate, self.entered, self.iterations = threading.Event(), threading.Event(), []

    def write(self, row):
        self.entered.set()
        self.gate.wait()
        self.iterations.append(row.iteration)


def test_a_tracker_that_hangs_holds_up_nothing_and_counts_its_losses(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(background_module, "MAX_WAITING_ROWS_OF_TRACKER", 3)
    monkeypatch.setattr(background_module, "TRACKER_END_S", 0.01)
    tracker = Hanging()
    writer = BackgroundWriter([tracker, JsonLinesWriter()], RunInfo(tmp_path))
    writer.write(row(0, loss=1.0))
    tracker.entered.wait()
    for iteration in range(1, 10):
        writer.write(row(iteration, loss=1.0))
    writer.flush()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 10
    writer.close()
    tracker.gate.set()
    writer._trackers[0]._thread.join()
    assert tracker.iterations == [0, 1, 2, 3]
    assert [record.getMessage() for record in caplog.records] == [
        "Hanging hangs: rows from iteration 4 on are lost",
        "Hanging hangs: 6 rows were lost",
    ]


def test_all_trackers_by_the_command(tmp_path, offline):
    names = "wandb,mlflow,csv,prometheus"
    words = ["+experiment=digits", f"+with=[{names}]", "launch.ranks=2", "hooks.eval.period=20"]
    for max_iter in (20, 40):  # continued
        done = run_module("distrain", *words, f"trainer.max_iter={max_iter}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
    run_dir = tmp_path / "runs" / "digits"
    rows = defaultdict(dict)
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        rows[values.pop("iteration")] |= values
    history = wandb_files(run_dir)[0]
    for iteration, values in rows.items():
        assert {k: v for k, v in history[iteration].items() if k in values} == values
    assert set(history) == set(rows)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    run_id = (run_dir / "mlflow_run_id").read_text()
    for name in ("loss", "eval/accuracy", "lr"):
        found = [(m.step, m.value) for m in client.get_metric_history(run_id, name)]
        assert found == [(i, values[name]) for i, values in rows.items() if name in values], name
    with (run_dir / "metrics.csv").open(newline="") as file:
        lines = {int(line["iteration"]): line for line in csv.DictReader(file) if line["loss"]}
    assert {i: float(line["loss"]) for i, line in lines.items()} == {
        i: values["loss"] for i, values in rows.items() if "loss" in values
    }
    assert 'name="eval/accuracy"' in (run_dir / "metrics.prom").read_text()
