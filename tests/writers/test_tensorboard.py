"""All that is written is read back with tensorboard's own readers."""

import io
import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginAccumulator,
)
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS
from writer_cases import Opened

from distrain.events.histogram import Histogram
from distrain.writers import tensorboard
from distrain.writers.base import Row
from distrain.writers.chart_layout import default_layout
from distrain.writers.event_file import record
from distrain.writers.tensorboard import TensorBoardWriter


def row(iteration: int, **scalars: float) -> Row:
    return Row(iteration, 100, {name: (value, iteration) for name, value in scalars.items()})


def read(folder: Path) -> Any:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def read_as_tensorboard(folder: Path) -> Any:
    """Return the accumulator that the server uses, whose purging differs from the old one's."""
    return PluginAccumulator(str(folder), tensor_size_guidance={"scalars": 0}).Reload()


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Return (step, value) of a scalar, after both readers agreed on it."""
    old = [(e.step, e.value) for e in read(folder).Scalars(tag)]
    tensors = read_as_tensorboard(folder).Tensors(tag)
    assert [(e.step, e.tensor_proto.float_val[0]) for e in tensors] == old
    return old


def events(folder: Path) -> list[Any]:
    paths = sorted(folder.iterdir())
    return [Event.FromString(raw) for p in paths for raw in RawEventFileLoader(str(p)).Load()]


def test_record_format() -> None:
    data = b"some event"
    length = struct.pack("<Q", 10)
    masked = pywrap_tensorflow.masked_crc32c
    assert record(data) == (
        length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))
    )


def test_scalars_belong_to_their_iteration_and_share_an_event(tmp_path: Path) -> None:
    writer = Opened(TensorBoardWriter(tmp_path))
    writer.write(Row(19, 100, {"a": (0.5, 19), "b": (1.5, 19), "eval/a": (2.5, 9)}))
    writer.write(Row(39, 100, {"a": (0.25, 39), "b": (math.nan, 38), "eval/a": (2.5, 9)}))
    writer.close()
    assert points(tmp_path, "a") == [(19, 0.5), (39, 0.25)]
    assert points(tmp_path, "eval/a") == [(9, 2.5)]
    (first, second) = read(tmp_path).Scalars("b")
    assert (first.step, first.value, second.step) == (19, 1.5, 38)
    assert math.isnan(second.value)
    scalars = [
        (e.step, [v.tag for v in e.summary.value])
        for e in events(tmp_path)
        if e.HasField("summary") and e.summary.value[0].HasField("simple_value")
    ]
    assert scalars == [(9, ["eval/a"]), (19, ["a", "b"]), (38, ["b"]), (39, ["a"])]


def test_a_row_can_be_read_at_once(tmp_path: Path) -> None:
    writer = Opened(TensorBoardWriter(tmp_path))
    writer.write(row(0, loss=0.5))
    assert points(tmp_path, "loss") == [(0, 0.5)]
    writer.close()


def test_images(tmp_path: Path) -> None:
    colour = np.arange(3 * 2 * 4, dtype=np.uint8).reshape(3, 2, 4) * 10
    grey = np.array([[0.0, 0.5, 1.0], [-1.0, 2.0, np.nan]], dtype=np.float32)
    writer = Opened(TensorBoardWriter(tmp_path))
    images = [("colour", colour, 7), ("grey", grey, 8), ("one", grey[None], 8), ("grey", grey, 9)]
    writer.write(Row(9, 100, {}, images=images))
    writer.close()
    found = read(tmp_path)
    (event,) = found.Images("colour")
    assert (event.step, event.width, event.height) == (7, 4, 2)
    pixels = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    np.testing.assert_array_equal(pixels, colour.transpose(1, 2, 0))
    assert [e.step for e in found.Images("grey")] == [8, 9]
    for tag in ("grey", "one"):
        pixels = np.asarray(Image.open(io.BytesIO(found.Images(tag)[0].encoded_image_string)))
        assert pixels.tolist() == [[0, 128, 255], [0, 255, 0]]


def test_histogram(tmp_path: Path) -> None:
    # values 1, 1, 2, 5 in four bins of width 1
    histogram = Histogram(
        counts=np.array([2.0, 1.0, 0.0, 1.0]),
        edges=np.array([1.0, 2.0, 3.0, 4.0, 5.0]),
        min=1.0,
        max=5.0,
        sum=9.0,
        sum_squares=31.0,
        num=4,
    )
    writer = Opened(TensorBoardWriter(tmp_path))
    writer.write(Row(9, 100, {}, histograms=[("weights", histogram, 6)]))
    writer.close()
    (event,) = read(tmp_path).Histograms("weights")
    value = event.histogram_value
    assert (event.step, value.min, value.max, value.num, value.sum, value.sum_squares) == (
        6, 1.0, 5.0, 4.0, 9.0, 31.0,
    )  # fmt: skip
    assert value.bucket_limit == [2.0, 3.0, 4.0, 5.0]
    assert value.bucket == [2.0, 1.0, 0.0, 1.0]
    # what the dashboards draw: left, right, count
    (tensor,) = read_as_tensorboard(tmp_path).Tensors("weights")
    drawn = np.frombuffer(tensor.tensor_proto.tensor_content, dtype=np.float32)
    assert drawn.reshape(-1, 3).tolist() == [[1, 2, 2], [2, 3, 1], [3, 4, 0], [4, 5, 1]]


def test_text(tmp_path: Path) -> None:
    writer = Opened(TensorBoardWriter(tmp_path), 20, lr=0.1)
    writer.close()
    found = read_as_tensorboard(tmp_path)
    (event,) = found.Tensors("config")
    assert (event.step, event.tensor_proto.string_val) == (20, [b"```yaml\nlr: 0.1\n\n```"])
    assert found.PluginTagToContent("text").keys() == {"config"}


def test_hparams_and_final_metrics(tmp_path: Path) -> None:
    writer = Opened(
        TensorBoardWriter(tmp_path),
        seed=1,
        optim={"lr": 0.5, "nesterov": True, "name": "sgd"},
        milestones=[10, 20],
        nothing=None,
        bound=math.inf,
        run={"name": "a"},  # changes nothing that is learned
    )
    writer.write(row(9, accuracy=0.5))
    writer.finish({"accuracy": 0.75})
    writer.close()
    content = read_as_tensorboard(tmp_path).PluginTagToContent("hparams")
    start = hparams_metadata.parse_session_start_info_plugin_data(
        content[hparams_metadata.SESSION_START_INFO_TAG]
    )
    assert {name: getattr(v, v.WhichOneof("kind")) for name, v in start.hparams.items()} == {
        "seed": 1.0,
        "optim.lr": 0.5,
        "optim.nesterov": True,
        "optim.name": "sgd",
        "milestones": "[10, 20]",
        "nothing": "None",
        "bound": "inf",
    }
    end = hparams_metadata.parse_session_end_info_plugin_data(
        content[hparams_metadata.SESSION_END_INFO_TAG]
    )
    assert end.status == STATUS_SUCCESS
    assert end.end_time_secs >= start.start_time_secs > 0
    assert points(tmp_path, "accuracy") == [(9, 0.5)]


def layout_of(folder: Path) -> dict[str, dict[str, list[str]]]:
    event = read_as_tensorboard(folder).Tensors("custom_scalars__config__")[-1]
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    return {c.title: {x.title: list(x.multiline.tag) for x in c.chart} for c in layout.category}


def test_layout_follows_the_names(tmp_path: Path) -> None:
    writer = Opened(TensorBoardWriter(tmp_path))
    for _ in range(3):
        writer.write(row(9, loss=1.0))
    writer.write(row(19, loss=1.0, accuracy=0.5))
    writer.close()
    assert layout_of(tmp_path) == default_layout(["loss", "accuracy"])
    assert len(read_as_tensorboard(tmp_path).Tensors("custom_scalars__config__")) == 2


def test_default_layout_shows_each_curve_where_it_belongs() -> None:
    names = [
        "total_loss", "loss_box", "eval/loss", "accuracy", "eval/accuracy", "iou", "c++", "lr",
        "lr/head", "perf/step_s", "perf/data_s", "perf/eta_s", "perf/samples_per_s",
        "gpu/0/memory_bytes",
    ]  # fmt: skip
    shown = {
        (heading, title): [
            name for name in names for tag in tags if re.compile(tag).match(name)
        ]  # as the tab matches
        for heading, charts in default_layout(names).items()
        for title, tags in charts.items()
    }
    assert shown == {
        ("losses", "losses"): ["total_loss", "loss_box", "eval/loss"],
        ("metrics", "accuracy"): ["accuracy", "eval/accuracy"],
        ("metrics", "iou"): ["iou"],
        ("metrics", "c++"): ["c++"],
        ("learning rate", "lr"): ["lr", "lr/head"],
        ("performance", "seconds"): ["perf/step_s", "perf/data_s"],
        ("performance", "perf samples_per_s"): ["perf/samples_per_s"],
        ("performance", "gpu memory_bytes"): ["gpu/0/memory_bytes"],
    }
    assert [*default_layout(["accuracy"])] == ["metrics"]


def test_resume_shows_each_step_once_with_the_new_value(tmp_path: Path) -> None:
    for attempt, (start, end) in enumerate([(0, 60), (40, 80), (20, 50)]):
        writer = Opened(TensorBoardWriter(tmp_path), start)
        for iteration in range(start + 9, end, 10):
            writer.write(row(iteration, loss=float(iteration + 1000 * attempt)))
        writer.close()
    assert len([*tmp_path.iterdir()]) == 3
    assert points(tmp_path, "loss") == [
        (9, 9.0),
        (19, 19.0),
        (29, 2029.0),
        (39, 2039.0),
        (49, 2049.0),
    ]


def test_resume_drops_steps_that_are_not_written_again(tmp_path: Path) -> None:
    first = Opened(TensorBoardWriter(tmp_path), 0)
    first.write(row(9, old=1.0))
    first.write(row(19, old=2.0))
    first.close()
    Opened(TensorBoardWriter(tmp_path), 10).close()
    assert points(tmp_path, "old") == [(9, 1.0)]


class Unset:
    """In the place of SessionLog: an event without a status."""

    START = SessionLog.STATUS_UNSPECIFIED

    def __new__(cls, status: int) -> Any:
        return SessionLog(status=status)


def test_without_the_start_event_a_curve_doubles_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for start, value in ((0, 1.0), (10, 2.0)):
        writer = Opened(TensorBoardWriter(tmp_path), start)
        writer.write(row(9, loss=value))
        writer.write(row(19, loss=value))
        writer.close()
        monkeypatch.setattr(tensorboard, "SessionLog", Unset)
    assert points(tmp_path, "loss") == [(9, 1.0), (19, 1.0), (19, 2.0)]


def test_a_value_from_before_the_resume_is_not_written_again(tmp_path: Path) -> None:
    writer = Opened(TensorBoardWriter(tmp_path), 20)
    writer.write(Row(29, 100, {"loss": (1.0, 29), "eval/loss": (2.0, 19)}))
    writer.close()
    assert "eval/loss" not in read(tmp_path).Tags()["scalars"]


def test_files_of_a_fast_clock_are_read_before(tmp_path: Path) -> None:
    first = Opened(TensorBoardWriter(tmp_path), 0)
    first.write(row(9, loss=1.0))
    first.close()
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / "events.out.tfevents.9999999990.zzz.1.0")
    second = Opened(TensorBoardWriter(tmp_path), 5)
    second.write(row(9, loss=2.0))
    second.close()
    assert points(tmp_path, "loss") == [(9, 2.0)]


def test_torn_end_of_an_earlier_file_hides_nothing(tmp_path: Path) -> None:
    first = Opened(TensorBoardWriter(tmp_path), 0)
    first.write(row(9, loss=1.0))
    first.write(row(19, loss=1.0))
    first.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    second = Opened(TensorBoardWriter(tmp_path), 10)
    second.write(row(19, loss=2.0))
    second.close()
    assert points(tmp_path, "loss") == [(9, 1.0), (19, 2.0)]


def test_import_is_light() -> None:
    script = (
        "import sys, distrain.writers.tensorboard\n"
        "heavy = {'torch', 'tensorflow', 'tensorboard.compat.tensorflow_stub', 'PIL', 'grpc'}\n"
        "assert not heavy & {*sys.modules}, heavy & {*sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
