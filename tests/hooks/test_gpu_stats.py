"""GPU telemetry in training, through NVIDIA's binding and a stand-in of the driver's library."""

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from project import write_project
from ranks import run_ranks
from stand_in import LIBRARY, with_stand_in
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import TensorDataset

from distrain import Trainer
from distrain.data.loader import TrainLoader
from distrain.errors import ConfigError
from distrain.hooks import CallbackHook, GpuStats

ROOT = Path(__file__).parents[2]
TWO = {
    "gpu0_uuid": "GPU-aaaa",
    "gpu0_name": "Card",
    "gpu0_utilization": 10,
    "gpu0_memory_busy": 0,
    "gpu0_temperature": 40,
    "gpu0_energy": 5_000_000,
    "gpu0_throttle": 0,
    "gpu0_ecc": 0,
    "gpu1_uuid": "GPU-bbbb",
    "gpu1_name": "Card",
    "gpu1_utilization": 30,
    "gpu1_memory_busy": 0,
    "gpu1_temperature": 70,
    "gpu1_energy": 7_000_000,
}
FAR_S = 1000.0  # so that only the first and the last reading are taken, and those a test asks for
pytestmark = pytest.mark.ranks


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)

    def forward(self, batch):
        return self.net(batch[0]).square().mean()


def train(rank, *hooks, world_size=1, max_iter=5, period_s=FAR_S, each_up_to=16):
    """Train with a batch of 8 over all ranks and windows of 2; return the trainer."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = TrainLoader(
        TensorDataset(torch.randn(16, 3)), batch_size=8, rank=rank, world_size=world_size
    )
    hooks = [GpuStats(period_s, each_up_to), *hooks]
    trainer = Trainer(model, optimizer, data, hooks=hooks, window=2)
    trainer.train(0, max_iter)
    return trainer


def series(trainer):
    """Return all values under gpu/ by name, each with its iteration."""
    histories = trainer.storage.histories()
    return {n: h.values() for n, h in histories.items() if n.startswith("gpu/")}


def one_node(rank, driver):
    if rank == 0:
        driver.says(gpus=2, **TWO)

    def work_hard(trainer):
        if trainer.iter == 3 and rank == 0:
            changed = {"gpu0_energy": 5_400_000, "gpu1_energy": 7_200_000, "gpu1_utilization": 90}
            driver.says(gpus=2, **TWO | changed)

    trainer = train(rank, CallbackHook(before_step=work_hard), world_size=2)
    threads = [t.name for t in threading.enumerate() if t.name == "distrain-gpu"]
    return series(trainer), threads, driver.calls() if rank == 0 else None


def test_values_of_a_node_over_its_gpus_and_energy_by_hand(libraries):
    (found, threads, calls), (others, _, _) = with_stand_in(libraries, one_node, ranks=2)
    assert found == others
    # read at the start, put with the first window; read at the end, put with the last step
    assert found["gpu/utilization_percent"] == [(20.0, 1), (50.0, 4)]
    assert found["gpu/1/utilization_percent"] == [(30.0, 1), (90.0, 4)]
    assert found["gpu/temperature_c"] == [(70.0, 1), (70.0, 4)]
    assert found["gpu/throttled"] == [(0.0, 1), (0.0, 4)]  # of the one card that says it
    assert "gpu/1/throttled" not in found
    assert "gpu/power_w" not in found  # no card says it
    # 400 J + 200 J in 5 steps of 8 samples
    assert found["gpu/energy_j"] == [(0.0, 1), (0.0, 3), (600.0, 4)]
    assert found["gpu/energy_per_sample_j"] == [(0.0, 1), (0.0, 3), (15.0, 4)]
    assert threads == []
    assert calls == ["init", "shutdown"]


def two_nodes(rank, driver, each_up_to):
    os.environ["LOCAL_RANK"] = str(rank % 2)
    names = type("Names", (), {"nodename": f"n{rank // 2}"})
    os.uname = lambda: names
    second = {"gpu0_utilization": 50, "gpu1_temperature": 95} if rank >= 2 else {}
    says = TWO | second
    if rank >= 2:
        del says["gpu1_utilization"]
    driver.says(gpus=2, **says)

    def work_hard(trainer):
        if trainer.iter == 3:
            energy = 5_000_000 + 1000 * (rank + 1)  # rank 0 reads its node, rank 2 the other
            driver.says(gpus=2, **says | {"gpu0_energy": energy})

    hook = CallbackHook(before_step=work_hard)
    return series(train(rank, hook, world_size=4, each_up_to=each_up_to))


def test_two_nodes_do_not_clash(libraries):
    first, *others = with_stand_in(libraries, two_nodes, 4, ranks=4)
    assert all(found == first for found in others)
    assert first["gpu/utilization_percent"][0] == (30.0, 1)  # 10, 30 and 50: one does not say
    assert first["gpu/temperature_c"][0] == (95.0, 1)
    each = {rank: first[f"gpu/{rank}/temperature_c"][0][0] for rank in range(4)}
    assert each == {0: 40.0, 1: 70.0, 2: 40.0, 3: 95.0}
    assert first["gpu/energy_j"][-1] == (4.0, 4)  # 1 J + 3 J
    assert first["gpu/energy_per_sample_j"][-1] == (0.1, 4)


def test_many_ranks_put_no_single_gpus(libraries):
    found = with_stand_in(libraries, two_nodes, 3, ranks=4)[0]
    assert "gpu/utilization_percent" in found
    assert not [name for name in found if name[4].isdigit()]


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []
        logging.getLogger("distrain").addHandler(self)
        logging.getLogger("distrain").setLevel(logging.INFO)

    def emit(self, record):
        self.lines.append((record.levelname, record.getMessage()))


def trouble(rank, driver):
    lines = Lines()
    healthy = TWO | {"gpu1_throttle": 0, "gpu1_ecc": 0}
    driver.says(gpus=2, **healthy)
    os.environ["CUDA_VISIBLE_DEVICES"] = "1,0"  # rank 0 has GPU 1
    events = {
        1: {"gpu1_throttle": 0x40},
        2: {"gpu1_throttle": 0x44},
        3: {"gpu1_ecc": 2, "gpu1_xid": "94 2"},
        4: {"gpu1_lost": 1},
        5: {"gpu1_lost": 1},
    }

    def go_wrong(trainer):
        driver.says(gpus=2, **healthy | events.get(trainer.iter, {}))
        trainer.hooks["GpuStats"]._sampler.sample()

    trainer = train(rank, CallbackHook(before_step=go_wrong), max_iter=7)
    return lines.lines, series(trainer), trainer.iter_done, driver.calls()


def test_trouble_is_told_in_one_line_and_training_goes_on(libraries):
    [(lines, found, done, calls)] = with_stand_in(libraries, trouble)
    host = os.uname().nodename
    assert done == 7
    assert lines[0] == ("INFO", f"reading the GPUs of {host}: rank 0: Card GPU-bbbb")
    assert lines[1:] == [
        ("WARNING", f"GPU 1 of {host} (GPU-bbbb, rank 0): {what}")
        for what in (
            "throttled by its temperature (hardware)",
            "throttled by its power limit and its temperature (hardware)",
            "Xid 94: contained memory error: this process ends, others continue",
            "2 more uncorrected ECC error(s)",
            "lost (GPU is lost); training continues while it can",
        )
    ]
    assert found["gpu/xid_errors"][-1] == (2.0, 3)
    # three readings until the first window's end, one of them held back; then one of two
    assert found["gpu/throttle_thermal"] == [(1 / 3, 1), (0.5, 3)]
    assert found["gpu/throttle_power_cap"] == [(0.0, 1), (0.5, 3)]
    assert "gpu/0/throttle_thermal" not in found
    assert calls == ["init", "shutdown"]


def without(rank):
    lines = Lines()
    logging.getLogger("distrain").setLevel(logging.DEBUG)
    trainer = train(rank, world_size=2)
    return lines.lines, series(trainer), trainer.hooks["GpuStats"]._sampler


def test_without_a_driver_training_goes_on():
    first, second = run_ranks(without, 2)
    [(level, line)] = first[0]
    assert level == "DEBUG"
    assert line.startswith("no telemetry of GPUs under gpu/: ")
    assert first[1:] == ({}, None)
    assert second == ([], {}, None)


def failing(rank, driver):
    driver.says(gpus=2, **TWO)

    def fail(trainer):
        if trainer.iter == 3:
            raise KeyError("broken on purpose")

    with pytest.raises(KeyError):
        train(rank, CallbackHook(before_step=fail), period_s=0.001)
    names = [thread.name for thread in threading.enumerate()]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return names, series(train(rank)), driver.calls()


def test_nothing_is_left_when_training_fails_or_no_gpu_is_visible(libraries):
    [(names, found, calls)] = with_stand_in(libraries, failing)
    assert "distrain-gpu" not in names
    assert found == {}
    assert calls == ["init", "shutdown"] * 2


def test_wrong_arguments():
    with pytest.raises(ConfigError, match="period_s=0"):
        GpuStats(0)
    with pytest.raises(ConfigError, match="each_up_to=-1"):
        GpuStats(each_up_to=-1)


CODE = """
import os, torch
from pathlib import Path
from torch import nn
from distrain import get_event_storage

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, i):
        return torch.tensor([i / 40.0])

class Fit(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)
    def forward(self, x):
        if os.environ["RANK"] == "0":  # a step takes 40 J on each of the two cards
            path = Path(os.environ["NVML_STAND_IN"])
            new = path.with_suffix(".next")
            energy = 1_000_000 + 40_000 * (get_event_storage().iter + 1)
            text = path.read_text().splitlines()[:-2]
            new.write_text("\\n".join([*text, f"0.energy {energy}", f"1.energy {energy}", ""]))
            new.rename(path)
        return self.net(x).square().mean()
"""
CONF = """
# @package _global_
run: {name: watts}
model: {_target_: watts.Fit}
data: {batch_size: 8, train: {_target_: watts.Points}}
trainer: {max_iter: 25, window: 10}
hooks: {gpu: {period_s: 0.01}}
launch: {ranks: 2, share: true}    # the driver says that memory is in use
"""


def test_the_command_shows_what_the_driver_says(libraries, tmp_path):
    write_project(tmp_path, module="watts", code=CODE, experiment="watts", conf=CONF)
    says = {
        f"{gpu}.{key}": value + gpu * step
        for gpu in (0, 1)
        for key, value, step in (
            ("utilization", 80, 10),
            ("memory_busy", 40, 0),
            ("memory_total", 80 * 2**30, 0),
            ("memory_used", 2**30, 2**30),
            ("power", 300_000, 50_000),
            ("temperature", 60, 5),
            ("sm_clock", 1400, 10),
        )
    }
    says |= {f"{gpu}.uuid": f"GPU-{gpu}" for gpu in (0, 1)}
    says |= {f"{gpu}.name": "Card" for gpu in (0, 1)}
    says |= {"gpus": 2, "0.energy": 1_000_000, "1.energy": 1_000_000}
    driver = tmp_path / "says"
    driver.write_text("".join(f"{key} {value}\n" for key, value in says.items()))
    done = subprocess.run(
        [sys.executable, "-m", "distrain", "--config-dir", "conf", "+experiment=watts"],
        cwd=tmp_path,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "LD_LIBRARY_PATH": str((libraries / "new" / LIBRARY).parent),
            "NVML_STAND_IN": str(driver),
            "DISTRAIN_LEASES": str(tmp_path / "leases"),
            "CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1",  # nothing for CUDA, wherever this runs
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "watts"
    expected = {
        "gpu/utilization_percent": 85,
        "gpu/memory_busy_percent": 40,
        "gpu/memory_used_mib": 2048,
        "gpu/memory_total_mib": 81920,
        "gpu/power_w": 325,
        "gpu/temperature_c": 65,
        "gpu/sm_clock_mhz": 1405,
        "gpu/energy_j": 2000,  # 25 steps of 2 x 40 J
        "gpu/energy_per_sample_j": 10,  # of 8 samples
        "gpu/1/power_w": 350,
        "gpu/0/memory_used_mib": 1024,
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {name: rows[-1][name] for name in expected} == expected
    reader = EventAccumulator(str(run))
    reader.Reload()
    shown = {name: reader.Scalars(name)[-1].value for name in expected}
    assert shown == pytest.approx(expected)
    assert "reading the GPUs of" in done.stderr
    assert Path(f"{driver}.calls").read_text().split() == ["init", "shutdown"]
