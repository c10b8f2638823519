"""MlflowWriter: scalars, images and configuration to MLflow."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrain.extras import optional_library
from distrain.files import atomic
from distrain.run_layout import METRICS_FILE, MLFLOW_RUN_ID
from distrain.writers.base import Row, RunInfo, Writer
from distrain.writers.hyperparameters import hyperparameters
from distrain.writers.pixels import pixels

logger = logging.getLogger(__name__)

_MAX_METRICS = 1000  # per request, limits of MLflow's REST API
_MAX_PARAMS = 100
_MAX_PARAM_CHARS = 500
_LAST_ITERATION = "distrain.last_iteration"  # tag; set in the request that logs the metrics


class MlflowWriter(Writer):
    """Logs to MLflow the scalars of metrics.jsonl and the images that TensorBoard gets.

    The step is the iteration of the row. The id of the MLflow run is kept in the run folder: a
    resumed run continues it, does not log again the rows that it has, and takes from metrics.jsonl
    those that it lacks, as a killed process had not sent them yet. The configuration's values are
    its parameters. Characters that MLflow does not allow in a name become "_".
    Histograms are not logged, as MLflow has none.

    Args:
        tracking_uri: of the server or store; null: MLFLOW_TRACKING_URI, or else the file mlflow.db
            (SQLite) next to the run folder, with images in mlflow-artifacts/ there. To see them:
            `mlflow ui --backend-store-uri sqlite:///runs/mlflow.db`.
        experiment: of MLflow.
        name: of the run; null: the run folder's.

    Raises:
        ConfigError: mlflow is not installed.
    """

    is_remote = True

    def __init__(
        self,
        tracking_uri: str | None = None,
        *,
        experiment: str = "distrain",
        name: str | None = None,
    ) -> None:
        self._mlflow = optional_library("mlflow", extra="mlflow")
        self._uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._experiment = experiment
        self._name = name
        self._client: Any = None
        self._logged_until = -1  # iteration of the newest row of earlier attempts
        self._is_finished = False

    def open(self, run: RunInfo) -> None:
        self._run = run
        optional_library("mlflow.tracking", extra="mlflow")  # an import may draw random numbers
        if self._uri is None or self._uri.startswith("sqlite:"):
            optional_library("sqlalchemy", extra="mlflow")

    def write(self, row: Row) -> None:
        if self._client is None:  # not in `open`: it waits for the server
            self._connect()
        new = row.new
        if row.iteration < self._logged_until:
            return
        if row.iteration == self._logged_until:  # the last row may have got values since
            new = {name: value for name, value in new.items() if not self._has(name, row.iteration)}
        metrics = [(name, value, row.iteration) for name, (value, _) in new.items()]
        self._log(self._client, metrics)
        for name, image, at in row.images:
            self._client.log_image(self._run_id, pixels(image), key=_allowed(name), step=at)

    def _log(self, client: Any, values: list[tuple[str, float, int]]) -> None:
        """Log (name, value, iteration), in the order of iterations."""
        from mlflow.entities import Metric, RunTag

        now_ms = int(time.time() * 1000)
        metrics = [Metric(_allowed(name), value, now_ms, step) for name, value, step in values]
        for first in range(0, len(metrics), _MAX_METRICS):
            is_last = first + _MAX_METRICS >= len(metrics)
            tags = [RunTag(_LAST_ITERATION, str(metrics[-1].step))] if is_last else []
            part = metrics[first : first + _MAX_METRICS]
            client.log_batch(self._run_id, metrics=part, tags=tags)

    def finish(self, metrics: Mapping[str, float]) -> None:
        self._is_finished = True

    def close(self) -> None:
        if self._client is not None:
            status = "FINISHED" if self._is_finished else "KILLED"
            self._client.set_terminated(self._run_id, status)

    def _connect(self) -> None:
        """Continue the run whose id is in the run folder, or create one."""
        folder = self._run.run_dir
        parent = folder.absolute().parent
        client = self._mlflow.MlflowClient(self._uri or f"sqlite:///{parent}/mlflow.db")
        path = folder / MLFLOW_RUN_ID
        try:
            self._run_id = path.read_text().strip()
        except FileNotFoundError:
            self._run_id = self._create(client, None if self._uri else parent)
            # before anything else may fail: the next row would create another run
            atomic.write(path, self._run_id.encode())
            self._log_params(client)
        else:
            client.update_run(self._run_id, status="RUNNING")
            tags = client.get_run(self._run_id).data.tags
            self._logged_until = int(tags.get(_LAST_ITERATION, -1))
            self._log(client, self._missing())
        self._client = client

    def _missing(self) -> list[tuple[str, float, int]]:
        """Return the values of metrics.jsonl that earlier attempts did not log."""
        path, found = self._run.run_dir / METRICS_FILE, []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                values = json.loads(line)
            except ValueError:  # a line of this attempt, which is being written
                break
            iteration = values.pop("iteration")
            if self._logged_until < iteration < self._run.start_iteration:
                found += [(name, float(value), iteration) for name, value in values.items()]
        return found

    def _create(self, client: Any, folder: Path | None) -> str:
        """Create a run; return its id."""
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            location = None if folder is None else f"file://{folder}/mlflow-artifacts"
            experiment_id = client.create_experiment(self._experiment, artifact_location=location)
        run = client.create_run(experiment_id, run_name=self._name or self._run.run_dir.name)
        return str(run.info.run_id)

    def _log_params(self, client: Any) -> None:
        """Log the configuration as parameters; a part that MLflow refuses costs a warning."""
        from mlflow.entities import Param

        params = [
            Param(_allowed(key), str(value)[:_MAX_PARAM_CHARS])
            for key, value in hyperparameters(self._run.conf)
        ]
        for first in range(0, len(params), _MAX_PARAMS):
            part = params[first : first + _MAX_PARAMS]
            try:
                client.log_batch(self._run_id, params=part)
            except self._mlflow.MlflowException as error:
                names = f"{part[0].key} to {part[-1].key}"
                logger.warning("MLflow: the parameters %s are missing: %s", names, error)

    def _has(self, name: str, step: int) -> bool:
        history = self._client.get_metric_history(self._run_id, _allowed(name))
        return any(metric.step == step for metric in history)


def _allowed(name: str) -> str:
    return re.sub(r"[^\w\-./: ]", "_", name)
