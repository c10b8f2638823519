"""TensorBoard's event files: scalars, images, histograms, text, hyperparameters, chart layout.

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
from collections.abc import Iterable, Mapping, Sequence
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
from distrain.writers.base import NewScalars, Row
from distrain.writers.chart_layout import default_layout
from distrain.writers.event_file import record

if TYPE_CHECKING:
    from distrain.events.histogram import Histogram

_MAX_EVENTS = 16


class TensorBoardWriter:
    """Writes rows, and what describes a run, to one new event file in a folder.

    The step that TensorBoard shows is the iteration that a value belongs to, counted from 0. All
    scalars of one iteration share one event. `write` and `close` use the disk and belong behind a
    `BackgroundWriter`; the other methods only queue, so training may call them: what they give is
    written with the next row or at the end.

    Args:
        folder: made if it is missing. Each attempt of a run adds its own file.
        purge_step: first iteration to be run; TensorBoard then drops what earlier files of the
            folder hold of it and of later ones, so that a resumed curve does not double back. With
            None, earlier files stay as they are.
        new: tells what is new in a row, if other writers ask it too.

    What cannot be written now waits until it can, the file itself included.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        purge_step: int | None = None,
        new: NewScalars | None = None,
    ) -> None:
        folder = Path(folder)
        self._start = purge_step or 0
        self._new = new or NewScalars(self._start)
        self._names: set[str] = set()
        self._events: dict[tuple[str, ...], _ScalarsEvent] = {}
        self._own_layout = False
        has_start = purge_step is not None or not _has_earlier(folder)
        # the name is chosen when the file is opened: it must sort behind those that are there, and
        # these cannot be listed while the disk fails
        self._file = AppendFile(lambda: _new_event_path(folder), exclusive=True)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # TensorBoard takes the first START of a folder for its beginning, and purges from each
        # later one: so the first file needs one as well
        if has_start:
            log = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=self._start, session_log=log))
        with contextlib.suppress(OSError):  # the first row tries again, and tells
            self._file.flush()

    def write(self, row: Row) -> None:
        """Write the scalars that no earlier row held, and the row's images and histograms."""
        values: defaultdict[int, list[Summary.Value]] = defaultdict(list)
        new = self._new(row)
        for step in sorted({iteration for _, iteration in new.values()}):
            scalars = {name: value for name, (value, at) in new.items() if at == step}
            self._add_scalars(scalars, step=step)
        for name, image, iteration in row.images:
            values[iteration].append(Summary.Value(tag=name, image=_image(image)))
        for name, histogram, iteration in row.histograms:
            values[iteration].append(Summary.Value(tag=name, histo=_histogram(histogram)))
        for iteration in sorted(values):
            self._add_values(values[iteration], step=iteration)
        if not self._own_layout and not self._names.issuperset(new):
            self._names.update(new)
            self._add_layout(default_layout(self._names), step=row.iteration)
        if not row.is_followed:
            self._file.flush()

    def text(self, tag: str, markdown: str) -> None:
        """Queue a text, shown at the first step of this attempt.

        Args:
            tag: its name.
            markdown: tables and fenced code blocks (three backquotes) work.
        """
        tensor = TensorProto(
            dtype=DT_STRING, tensor_shape=TensorShapeProto(), string_val=[markdown.encode()]
        )
        value = Summary.Value(tag=tag, metadata=_metadata("text"), tensor=tensor)
        self._add_values([value], step=self._start)

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Queue the hyperparameters: the HParams tab shows them beside each curve's last value.

        No list of columns is written: TensorBoard makes it from all runs it is shown, where that
        of one run would hide what others have. For a resumed run it keeps the first attempt's.

        Args:
            values: a configuration; nested mappings become dotted names. What is neither bool,
                finite number nor string is shown as its text.
        """
        info = SessionStartInfo(start_time_secs=time.time())
        for name, value in _flatten(values):
            if isinstance(value, bool):
                info.hparams[name].bool_value = value
            elif isinstance(value, int | float) and math.isfinite(value):
                info.hparams[name].number_value = value
            else:
                info.hparams[name].string_value = str(value)
        data = HParamsPluginData(session_start_info=info)
        self._add_hparams("session_start_info", data, step=self._start)

    def finish(self, metrics: Mapping[str, float], *, iteration: int) -> None:
        """Queue the final metrics and mark the run as finished in the HParams tab.

        Only for a run that reached its end: TensorBoard does not take a status back.

        Args:
            metrics: by name; each becomes the scalar `final/<name>`.
            iteration: the last one.
        """
        scalars = [
            Summary.Value(tag=f"final/{name}", simple_value=value)
            for name, value in metrics.items()
        ]
        self._add_values(scalars, step=iteration)
        info = SessionEndInfo(status=STATUS_SUCCESS, end_time_secs=time.time())
        data = HParamsPluginData(session_end_info=info)
        self._add_hparams("session_end_info", data, step=iteration)

    def layout(self, categories: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Queue the charts of the Custom Scalars tab, in place of `default_layout`.

        Args:
            categories: heading -> title of a chart -> regular expressions that the names of its
                curves begin with.
        """
        self._own_layout = True
        self._add_layout(categories, step=self._start)

    def close(self) -> None:
        """Write what is queued and wait for the disk."""
        self._file.close()

    def _add_layout(
        self, categories: Mapping[str, Mapping[str, Sequence[str]]], *, step: int
    ) -> None:
        layout = Layout()
        for heading, charts in categories.items():
            chart = [
                Chart(title=title, multiline=MultilineChartContent(tag=tags))
                for title, tags in charts.items()
            ]
            layout.category.append(Category(title=heading, chart=chart))
        tensor = TensorProto(
            dtype=DT_STRING,
            tensor_shape=TensorShapeProto(),
            string_val=[layout.SerializeToString()],
        )
        value = Summary.Value(
            tag="custom_scalars__config__", metadata=_metadata("custom_scalars"), tensor=tensor
        )
        self._add_values([value], step=step)

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
        self._append(event.serialized(list(scalars.values()), step=step))

    def _add_values(self, values: list[Summary.Value], *, step: int) -> None:
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _add(self, event: Event) -> None:
        self._append(event.SerializeToString())

    def _append(self, event: bytes) -> None:
        self._file.append(record(event))


class _ScalarsEvent:
    """The bytes of an event, into which each row's values are put; protobuf is slower by far.

    A message in protobuf's encoding is its fields one after the other, and a scalar is a
    `Summary.Value` that ends with its value, a float of four bytes.

    Args:
        names: of the scalars.
    """

    def __init__(self, names: Sequence[str]) -> None:
        values = [Summary.Value(tag=name, simple_value=0.0) for name in names]
        ends = np.cumsum([Summary(value=[value]).ByteSize() for value in values])
        event = Event(summary=Summary(value=values)).SerializeToString()
        self._bytes = np.frombuffer(event, dtype=np.uint8).copy()
        first = len(event) - ends[-1] - 4
        self._places = (first + ends)[:, None] + np.arange(4)  # (num_names, 4)

    def serialized(self, values: Sequence[float], *, step: int) -> bytes:
        """Return the event with these values, of this moment."""
        with np.errstate(over="ignore"):  # what float32 does not hold is infinite, as in protobuf
            floats = np.array(values).astype("<f4")
        self._bytes[self._places] = floats.view(np.uint8).reshape(-1, 4)
        head: bytes = Event(wall_time=time.time(), step=step).SerializeToString()
        return head + self._bytes.tobytes()


def _stamps(folder: Path) -> list[int]:
    """Return the times in the names of a folder's event files."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    matches = (re.match(r"events\.out\.tfevents\.(\d+)\.", name) for name in names)
    return [int(match[1]) for match in matches if match]


def _has_earlier(folder: Path) -> bool:
    """Whether the folder has event files; if it cannot be read, it may have."""
    try:
        return bool(_stamps(folder))
    except OSError:
        return True


def _new_event_path(folder: Path) -> Path:
    """Return a path that sorts behind all others: TensorBoard reads them in that order."""
    # the clock of another node, or a restart within a second, must not put it in front
    stamp = max([int(time.time()), *(stamp + 1 for stamp in _stamps(folder))])
    return folder / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"


def _image(image: NDArray[Any]) -> Summary.Image:
    """Encode a (C, H, W) or (H, W) image as PNG."""
    from PIL import Image  # tensorboard requires it; only runs with images pay for its import

    if image.dtype.kind == "f":
        image = np.nan_to_num(image).clip(0, 1) * 255 + 0.5
    pixels = image.clip(0, 255).astype(np.uint8)
    if pixels.ndim == 3:
        pixels = pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    height, width = pixels.shape[:2]
    return Summary.Image(
        height=height,
        width=width,
        colorspace=1 if pixels.ndim == 2 else pixels.shape[2],
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


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
