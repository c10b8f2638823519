"""The heartbeat: what is read is what was beaten, and where the loop beats."""

import contextlib
import os
import time
import timeit
from multiprocessing import get_context

import pytest

from distrain import HookBase, TrainerBase, heartbeat
from distrain.heartbeat import NUM_BYTES, Beat, Heartbeat, Phase


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "beats" / "rank_0"
    path.parent.mkdir()
    path.write_bytes(bytes(NUM_BYTES))
    descriptor = os.open(path, os.O_RDONLY)
    yield path, descriptor
    os.close(descriptor)


def test_what_is_read_is_what_was_beaten(file):
    path, descriptor = file
    assert heartbeat.read(descriptor) == Beat(0, Phase.NONE, 0.0, False)
    pulse = Heartbeat(str(path))
    pulse.iteration = 57
    before = time.monotonic()
    pulse.beat(Phase.DATA)
    beat = heartbeat.read(descriptor)
    assert beat[:2] == (57, Phase.DATA)
    assert before <= beat.time_s <= time.monotonic()
    pulse.finish()
    assert heartbeat.read(descriptor)[:2] == (57, Phase.DATA)
    assert heartbeat.read(descriptor).finished


def test_a_phase_ends_in_the_one_before_even_after_an_error(file):
    path, descriptor = file
    pulse = Heartbeat(str(path))
    pulse.beat(Phase.HOOKS)
    with contextlib.suppress(KeyError), pulse.phase(Phase.SAVING):
        assert heartbeat.read(descriptor).phase is Phase.SAVING
        raise KeyError
    assert heartbeat.read(descriptor).phase is Phase.HOOKS


def test_nothing_is_left_in_the_folder(file):
    path, _ = file
    Heartbeat(str(path))
    assert not path.parent.exists()


def test_the_environment_names_it_once(file, monkeypatch):
    path, descriptor = file
    monkeypatch.setattr(heartbeat, "_own", heartbeat._own)
    silent = heartbeat.current()
    silent.beat(Phase.DATA)
    with silent.phase(Phase.SAVING):
        silent.finish()
    monkeypatch.setenv(heartbeat.VARIABLE, str(path))
    pulse = heartbeat.current()
    assert heartbeat.VARIABLE not in os.environ  # for the children of this process
    assert heartbeat.current() is pulse
    pulse.beat(Phase.DATA)
    assert heartbeat.read(descriptor).phase is Phase.DATA


def test_another_process_reads_it_also_after_a_kill(file):
    path, descriptor = file

    def child():
        pulse = Heartbeat(str(path))
        pulse.iteration = 3
        pulse.beat(Phase.BACKWARD)
        os.kill(os.getpid(), 9)

    process = get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert heartbeat.read(descriptor)[:2] == (3, Phase.BACKWARD)


def test_the_loop_beats_twice_an_iteration_and_at_the_end(monkeypatch):
    class Recorded:
        iteration = 0

        def __init__(self):
            self.beats = []

        def beat(self, phase):
            self.beats.append((self.iteration, Phase(phase).name))

    class Where(HookBase):
        def after_step(self):
            assert self.trainer.pulse.beats[-1] == (self.trainer.iter, "HOOKS")

    class Steps(TrainerBase):
        def run_step(self):
            assert self.pulse.beats[-1] == (self.iter, "DATA")

    pulse = Recorded()
    monkeypatch.setattr(heartbeat, "_own", pulse)
    Steps([Where()]).train(4, 6)
    assert pulse.beats == [(4, "DATA"), (4, "HOOKS"), (5, "DATA"), (5, "HOOKS"), (6, "END")]


def test_a_beat_costs_little(file):
    beat = Heartbeat(str(file[0])).beat
    number = 20_000
    best = min(timeit.repeat(lambda: beat(Phase.DATA), number=number, repeat=10)) / number
    assert best < 2e-6  # 0.2 us, were this machine ours alone
