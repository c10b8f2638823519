"""PrometheusWriter: the newest scalars for Prometheus, over HTTP or in a text file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrain.checks import whole
from distrain.extras import optional_library
from distrain.writers.base import Row, RunInfo, Writer


class PrometheusWriter(Writer):
    """Exports gauges that Prometheus scrapes, each labelled with the name of the run.

    `distrain_scalar{run="digits", name="loss"}` is the newest value of a scalar; the others are
    `distrain_iteration`, `distrain_max_iter` and `distrain_finished` (0 or 1). docs/grafana.json is
    a dashboard of them.

    Args:
        port: serve them at http://address:port/metrics while the run lasts; null: no server.
        address: that the server listens on.
        textfile: write them to this file, relative to the run folder, for the textfile collector of
            node_exporter; null: no file.

    Raises:
        ConfigError: prometheus_client is not installed, or there is neither a port nor a file.
    """

    def __init__(
        self,
        port: int | None = None,
        *,
        address: str = "127.0.0.1",
        textfile: str | os.PathLike[str] | None = "metrics.prom",
    ) -> None:
        self._library = optional_library("prometheus_client", extra="prometheus")
        self._port = None if port is None else whole("port", port, least=0)
        self._address = address
        self._textfile = None if textfile is None else Path(textfile)
        self._server: Any = None

    def open(self, run: RunInfo) -> None:
        self._registry = self._library.CollectorRegistry()
        self._name = run.run_dir.name
        if self._textfile is not None:
            self._textfile = run.run_dir / self._textfile
        self._scalar = self._gauge("scalar", "Newest value of a scalar.", "name")
        self._iteration = self._gauge("iteration", "Finished iterations.")
        self._max_iter = self._gauge("max_iter", "Iterations of the whole run.")
        self._finished = self._gauge("finished", "1 when all iterations are done.")
        self._finished.set(0)
        if self._port is not None:
            self._server, _ = self._library.start_http_server(
                self._port, self._address, registry=self._registry
            )

    def write(self, row: Row) -> None:
        for name, (value, _) in row.new.items():
            self._scalar.labels(self._name, name).set(value)
        self._iteration.set(row.iteration + 1)
        self._max_iter.set(row.max_iter)
        if not row.more_follow:
            self._write_file()

    def finish(self, metrics: Mapping[str, float]) -> None:
        self._finished.set(1)
        self._write_file()

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _gauge(self, name: str, text: str, *labels: str) -> Any:
        names = ("run", *labels)
        gauge = self._library.Gauge(f"distrain_{name}", text, names, registry=self._registry)
        return gauge if labels else gauge.labels(self._name)

    def _write_file(self) -> None:
        if self._textfile is not None:
            self._library.write_to_textfile(str(self._textfile), self._registry)
