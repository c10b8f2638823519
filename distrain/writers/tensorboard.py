"""TensorBoardWriter: scalars, images, histograms, configuration and chart layouts.

Written with tensorboard's protobuf messages alone (0.05 s to import; torch.utils.tensorboard and
tensorboard's EventFileWriter would bring tensorflow in where it is installed).
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import socket
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_TENSOR,
    HistogramProto,
    Summary,
    SummaryMetadata,
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING
from tensorboard.plugins.custom_scalar.layout_pb2 import (
    Category,
    Chart,
    Layout,
    MultilineChartContent,
)
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)

from distrain.files.append_file import AppendFile
from distrain.scalar_names import GUARD
from distrain.writers.base import Row, RunInfo, Writer
from distrain.writers.chart_layout import default_layout
from distrain.writers.event_file import record
from distrain.writers.hyperparameters import hyperparameters
from distrain.writers.pixels import pixels

if TYPE_CHECKING:
    from distrain.events.histogram import Histogram

_MAX_EVENTS = 16  # sets of names whose encoded event is kept


class TensorBoardWriter(Writer):
    """Writes scalars, images, histograms, the configuration and chart layouts to event files.

    The step that TensorBoard shows is the iteration that a value belongs to, counted from 0. All
    scalars of one iteration share one event. Each attempt of a run adds its own file, from whose
    first iteration on TensorBoard drops the values of earlier files, so that curves do not double
    back. While writes fail, the events wait in memory.

    Args:
        folder: the folder of the files, relative to the run folder; the run folder itself, whose
            name TensorBoard shows then, by default.
    """

    def __init__(self, folder: str | os.PathLike[str] = ".") -> None:
        self._folder = Path(folder)
        self._names: set[str] = set()
        self._events: dict[tuple[str, ...], _ScalarsEvent] = {}
        self._step = 0  # the newest iteration written

    def open(self, run: RunInfo) -> None:
        folder = run.run_dir / self._folder
        self._step = start = run.start_iteration
        # the path is chosen when the file is opened: it must sort after the existing ones, and
        # these cannot be listed while the disk fails
        self._file = AppendFile(lambda: _new_event_path(folder), exclusive=True)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # TensorBoard takes the first START of a folder for its beginning, and purges from each
        # later one: so the first file needs one as well
        log = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=start, session_log=log))
        if run.conf:
            self._add_conf(run.conf, step=start)
        if run.changes:
            markdown = "\n".join(f"- `{line}`" for line in run.changes)
            self._add_text("changes", markdown, plugin="text", step=start)
        with contextlib.suppress(OSError):  # the first row tries again, and its error is logged
            self._file.flush()

    def write(self, row: Row) -> None:
        self._step = row.iteration
        for step in sorted({iteration for _, iteration in row.new.values()}):
            # a checksum is no curve: it is in metrics.jsonl, for programs
            scalars = {
                name: value
                for name, (value, at) in row.new.items()
                if at == step and not name.startswith(GUARD)
            }
            if scalars:
                self._add_scalars(scalars, step=step)
        values: defaultdict[int, list[Summary.Value]] = defaultdict(list)
        for name, image, iteration in row.images:
            values[iteration].append(Summary.Value(tag=name, image=_image(image)))
        for name, histogram, iteration in row.histograms:
            values[iteration].append(Summary.Value(tag=name, histo=_histogram(histogram)))
        for iteration in sorted(values):
            self._add_values(values[iteration], step=iteration)
        if not self._names.issuperset(row.new):
            self._names.update(row.new)
            self._add_layout(step=row.iteration)
        if not row.more_follow:
            self._file.flush()

    def finish(self, metrics: Mapping[str, float]) -> None:
        # only a run that reached its end is finished: TensorBoard does not take a status back
        info = SessionEndInfo(status=STATUS_SUCCESS, end_time_secs=time.time())
        data = HParamsPluginData(session_end_info=info)
        self._add_hparams("session_end_info", data, step=self._step)

    def close(self) -> None:
        self._file.close()

    def _add_conf(self, conf: Mapping[str, Any], *, step: int) -> None:
        """Add the configuration as text and as hyperparameters.

        No list of columns is written: TensorBoard makes it from all runs that it shows, where that
        of one run would hide the columns of others. For a resumed run it keeps the first attempt's.
        """
        import yaml  # here, as only rank 0 needs it

        markdown = f"```yaml\n{yaml.safe_dump(conf, sort_keys=False)}\n```"
        self._add_text("config", markdown, plugin="text", step=step)
        info = SessionStartInfo(start_time_secs=time.time())
        for name, value in hyperparameters(conf):
            if isinstance(value, bool):
                info.hparams[name].bool_value = value
            elif isinstance(value, int | float) and math.isfinite(value):
                info.hparams[name].number_value = value
            else:
                info.hparams[name].string_value = str(value)
        data = HParamsPluginData(session_start_info=info)
        self._add_hparams("session_start_info", data, step=step)

    def _add_text(self, tag: str, text: str | bytes, *, plugin: str, step: int) -> None:
        data = text.encode() if isinstance(text, str) else text
        tensor = TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(), string_val=[data])
        value = Summary.Value(tag=tag, metadata=_metadata(plugin), tensor=tensor)
        self._add_values([value], step=step)

    def _add_layout(self, *, step: int) -> None:
        layout = Layout()
        for heading, charts in default_layout(self._names).items():
            chart = [
                Chart(title=title, multiline=MultilineChartContent(tag=tags))
                for title, tags in charts.items()
            ]
            layout.category.append(Category(title=heading, chart=chart))
        content = layout.SerializeToString()
        self._add_text("custom_scalars__config__", content, plugin="custom_scalars", step=step)

    def _add_hparams(self, kind: str, data: HParamsPluginData, *, step: int) -> None:
        # all is in the metadata; the tensor only has to be there
        empty = TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)])
        value = Summary.Value(
            tag=f"_hparams_/{kind}",
            metadata=_metadata("hparams", data.SerializeToString()),
            tensor=TensorProto(dtype=DT_FLOAT, tensor_shape=empty),
        )
        self._add_values([value], step=step)

    def _add_scalars(self, scalars: Mapping[str, float], *, step: int) -> None:
        names = tuple(scalars)
        event = self._events.get(names)
        if event is None:
            if len(self._events) >= _MAX_EVENTS:
                self._events.clear()
            event = self._events[names] = _ScalarsEvent(names)
        self._file.append(record(event.serialized(list(scalars.values()), step=step)))

    def _add_values(self, values: list[Summary.Value], *, step: int) -> None:
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _add(self, event: Event) -> None:
        self._file.append(record(event.SerializeToString()))


class _ScalarsEvent:
    """An encoded event into whose bytes the values are put: 20 times as fast as protobuf.

    A message in protobuf's encoding is its fields one after the other, and a scalar is a
    `Summary.Value` that ends with its value, a float of four bytes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        values = [Summary.Value(tag=name, simple_value=0.0) for name in names]
        ends = np.cumsum([Summary(value=[value]).ByteSize() for value in values])
        event = Event(summary=Summary(value=values)).SerializeToString()
        self._bytes = np.frombuffer(event, dtype=np.uint8).copy()
        first = len(event) - ends[-1] - 4
        self._places = (first + ends)[:, None] + np.arange(4)  # (num_names, 4)

    def serialized(self, values: Sequence[float], *, step: int) -> bytes:
        """Return the event with these values and the current time."""
        with np.errstate(over="ignore"):  # beyond float32's range: infinite, as in protobuf
            floats = np.array(values).astype("<f4")
        self._bytes[self._places] = floats.view(np.uint8).reshape(-1, 4)
        head: bytes = Event(wall_time=time.time(), step=step).SerializeToString()
        return head + self._bytes.tobytes()


def _new_event_path(folder: Path) -> Path:
    """Return a path that sorts after all existing ones: TensorBoard reads them in that order."""
    names = os.listdir(folder) if folder.exists() else []
    matches = (re.match(r"events\.out\.tfevents\.(\d+)\.", name) for name in names)
    # the clock of another node, or a restart within a second, must not put it first
    stamp = max([int(time.time()), *(int(match[1]) + 1 for match in matches if match)])
    return folder / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"


def _image(image: NDArray[Any]) -> Summary.Image:
    """Encode a (C, H, W) or (H, W) image as PNG."""
    from PIL import Image  # tensorboard requires it; only runs with images pay for its import

    found, file = pixels(image), io.BytesIO()
    Image.fromarray(found).save(file, format="PNG")
    height, width = found.shape[:2]
    return Summary.Image(
        height=height,
        width=width,
        colorspace=1 if found.ndim == 2 else found.shape[2],
        encoded_image_string=file.getvalue(),
    )


def _histogram(histogram: Histogram) -> HistogramProto:
    return HistogramProto(
        min=histogram.min,
        max=histogram.max,
        num=histogram.num,
        sum=histogram.sum,
        sum_squares=histogram.sum_squares,
        bucket_limit=histogram.edges[1:].tolist(),
        bucket=histogram.counts.tolist(),
    )


def _metadata(plugin: str, content: bytes = b"") -> SummaryMetadata:
    data = SummaryMetadata.PluginData(plugin_name=plugin, content=content)
    return SummaryMetadata(plugin_data=data, data_class=DATA_CLASS_TENSOR)
