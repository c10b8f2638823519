"""Inject error numbers into every file operation of a run's life, and check what comes of it.

A tiny run is started anew, or continued from the middle, while the n-th call of one kind below its
folder fails once (or from then on). The same command is then given again without faults. Every
trial is a fork of one process that has imported torch, with `io_faults.c` preloaded.
"""

from __future__ import annotations

import argparse
import collections
import copy
import ctypes
import dataclasses
import errno
import gc
import itertools
import json
import mmap
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

SOURCE = Path(__file__).with_name("io_faults.c")
KINDS = ("open", "create", "read", "write", "fsync", "rename", "unlink", "mkdir", "list")
ERRNOS = ("EIO", "EACCES", "ESTALE", "EMFILE", "ENOSPC", "EDQUOT")
USER_ERRNOS = ("EACCES", "ENOSPC", "EDQUOT")  # may be called a mistake of the user, exit code 2
ITERS, MIDDLE, PERIOD = 12, 8, 4
TRIAL_S = 60

PROJECT = """
import torch
from torch import nn
class Points(torch.utils.data.Dataset):
    def __len__(self): return 24
    def __getitem__(self, i): return torch.tensor([i / 24]), torch.tensor([i / 12])
class Fit(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)
    def forward(self, x, y): return nn.functional.mse_loss(self.net(x), y)
    @torch.no_grad()
    def metrics(self, x, y): return {"mse": (self.net(x) - y).square()[:, 0]}
"""
CONF = f"""
# @package _global_
run: {{name: tiny}}
model: {{_target_: tiny.Fit}}
data: {{batch_size: 8, train: {{_target_: tiny.Points}}, eval: {{_target_: tiny.Points}}}}
optim: {{lr: 0.05}}
trainer: {{max_iter: {ITERS}, window: 2}}
hooks: {{checkpoint: {{period: {PERIOD}}}, eval: {{period: {PERIOD}}}}}
"""


class Control(ctypes.Structure):
    """The control file of `io_faults.c`."""

    _fields_ = [
        ("root", ctypes.c_char * 1024),
        *((name, ctypes.c_int) for name in ("kind", "nth", "error", "persistent")),
        ("counts", ctypes.c_int * len(KINDS)),
        ("injected", ctypes.c_int),
        ("first", ctypes.c_char * 1024),
    ]


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault: which call of which kind fails, with which error, and whether from then on."""

    scenario: str
    kind: str
    nth: int
    error: str
    persistent: bool
    ranks: int = 1

    def __str__(self) -> str:
        lasts = " and all later" if self.persistent else ""
        return f"{self.scenario}, {self.ranks} rank(s): {self.kind} {self.nth}{lasts}: {self.error}"


@dataclasses.dataclass
class Ended:
    """How a command ended."""

    code: int
    output: str


def compiled(folder: Path) -> Path:
    """Compile the library into a folder."""
    target = folder / "io_faults.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(target), str(SOURCE)]
    subprocess.run([*command, "-ldl"], check=True)
    return target


class Campaign:
    """Runs trials in a folder of its own; this process has the library preloaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        size = ctypes.sizeof(Control)
        with open(os.environ["IO_FAULTS"], "r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self.control = Control.from_buffer(self._map)
        (folder / "conf" / "experiment").mkdir(parents=True)
        (folder / "conf" / "experiment" / "tiny.yaml").write_text(CONF)
        (folder / "tiny.py").write_text(PROJECT)
        self.run = folder / "runs" / "tiny"
        self._hydra_main = hydra.main
        self._composed: dict[tuple[str, ...], tuple[Any, Any]] = {}
        self.bases: dict[tuple[str, int], Path] = {}
        self.quiet: dict[int, dict[str, Any]] = {}

    def arm(self, fault: Fault | None) -> None:
        """Prepare a fault; None only counts."""
        for name, _ in Control._fields_:
            if name in ("counts",):
                ctypes.memset(ctypes.addressof(self.control.counts), 0, 4 * len(KINDS))
            elif name in ("root", "first"):
                setattr(self.control, name, b"")
            else:
                setattr(self.control, name, 0)
        self.control.kind = -1
        if fault is not None:
            self.control.kind = KINDS.index(fault.kind)
            self.control.nth = fault.nth
            self.control.error = getattr(errno, fault.error)
            self.control.persistent = fault.persistent
        self.control.root = os.fsencode(self.run)

    def disarm(self) -> None:
        """Let everything succeed."""
        self.control.root = b""

    def command(self, ranks: int, *overrides: str) -> Ended:
        """Run the command in forks of this process, one per rank; return how they ended."""
        launch = ["launch.in_process=true"] if ranks == 1 else ["launch=external"]
        self._compose(["--config-dir", "conf", "+experiment=tiny", *launch, *overrides])
        with tempfile.TemporaryFile("w+b") as log, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            probe.close()
            pids = [self._fork(rank, ranks, port, log.fileno()) for rank in range(ranks)]
            codes = self._reap(pids)
            log.seek(0)
            # a rank that is killed because another has failed does not count
            code = next((code for code in codes if code > 0), min(codes))
            return Ended(code, log.read().decode(errors="replace"))

    def _compose(self, argv: list[str]) -> None:
        """Let `hydra.main` hand out the configuration of these arguments, composed only once.

        It takes two thirds of the CPU time of such a run, and touches no file of the run.
        """
        sys.argv = ["distrain", *argv]
        key = tuple(argv)
        if key not in self._composed:
            OmegaConf.register_new_resolver("distrain_scratch", lambda: "", replace=True)
            here = os.getcwd()
            os.chdir(self.folder)
            take = self._hydra_main(
                config_path="pkg://distrain.conf", config_name="main", version_base="1.3"
            )
            take(lambda cfg: self._composed.update({key: (cfg, HydraConfig.get())}))()
            os.chdir(here)
        cfg, of_hydra = self._composed[key]
        HydraConfig.instance().cfg = OmegaConf.create({"hydra": of_hydra})
        hydra.main = lambda **_: lambda task: lambda: task(copy.deepcopy(cfg))

    def _fork(self, rank: int, ranks: int, port: int, log: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            os.setsid()
            os.chdir(self.folder)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank),
                LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
            )  # fmt: skip
            if ranks == 1:
                for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                    del os.environ[name]
            from distrain.cli import command as __main__
            from distrain.files import retry

            retry.PAUSES_S = (0.01, 0.02)
            __main__.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _reap(self, pids: list[int]) -> list[int]:
        codes: dict[int, int] = {}
        deadline = time.monotonic() + TRIAL_S
        while len(codes) < len(pids):
            for pid in pids:
                if pid not in codes:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        codes[pid] = os.waitstatus_to_exitcode(status)
                        if codes[pid]:  # as a launcher does
                            deadline = min(deadline, time.monotonic() + 5)
            if time.monotonic() > deadline:
                for pid in pids:
                    if pid not in codes:
                        os.killpg(pid, signal.SIGKILL)
                deadline += TRIAL_S
            time.sleep(0.01)
        return [codes[pid] for pid in pids]

    def prepare(self, ranks: int) -> dict[str, dict[str, int]]:
        """Make the quiet run and the one stopped in the middle; return the calls by scenario."""
        counts = {}
        middle = f"trainer.max_iter={MIDDLE}"
        for scenario in ("fresh", "resume"):
            self.reset(scenario, ranks)
            self.arm(None)
            ended = self.command(ranks)
            self.disarm()
            assert ended.code == 0, ended.output
            counts[scenario] = dict(zip(KINDS, self.control.counts, strict=True))
            if scenario == "fresh":
                self.quiet[ranks] = self.observed()
                shutil.rmtree(self.run)
                assert self.command(ranks, middle).code == 0
                base = self.folder / f"middle-{ranks}"
                self.run.rename(base)
                self.bases["resume", ranks] = base
        return counts

    def reset(self, scenario: str, ranks: int) -> None:
        """Put the run folder where a scenario begins."""
        shutil.rmtree(self.run, ignore_errors=True)
        if scenario == "resume":
            shutil.copytree(self.bases["resume", ranks], self.run)

    def observed(self) -> dict[str, Any]:
        """Return what the run folder holds.

        Checkpoints by iteration, the iteration of the newest state to continue from (a run whose
        end failed leaves one that is trained only), rows and curve.
        """
        from distrain.checkpoint.store import describe, find_all

        folder = self.run / "checkpoints"
        found = {one.iteration: one for one in map(describe, find_all(folder))}
        states = map(describe, find_all(folder, with_trained=True))
        newest = max((one.iteration for one in states if one.valid), default=0)
        rows, file = [], self.run / "metrics.jsonl"
        if file.exists():
            for line in file.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    row = json.loads(line)
                    rows.append((row["iteration"], row.get("loss"), row.get("eval/mse")))
        curve = self.curve()
        return {"checkpoints": found, "newest": newest, "rows": rows, "curve": curve}

    def curve(self) -> list[tuple[int, float]]:
        """Return the points of the loss in TensorBoard."""
        if not [*self.run.glob("events.out.tfevents.*")]:
            return []
        import logging

        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.run)).Reload()
        if "loss" not in events.Tags()["scalars"]:
            return []
        return [(event.step, event.value) for event in events.Scalars("loss")]

    def trial(self, fault: Fault) -> tuple[int, list[str]]:
        """Run one trial; return the exit code under the fault and what was wrong."""
        self.reset(fault.scenario, fault.ranks)
        before = self.observed()
        self.arm(fault)
        ended = self.command(fault.ranks)
        where = os.fsdecode(self.control.first).removeprefix(str(self.run))
        injected = self.control.injected
        self.disarm()
        self._await_writers()
        if not injected:
            return -1, []
        after = self.observed()
        again = self.command(fault.ranks)
        clean = self.observed()
        wrong = self.judge(fault, before, ended, after, again, clean)
        return ended.code, [f"{fault} ({where}): exit {ended.code}: {text}" for text in wrong]

    def _await_writers(self) -> None:
        """Wait until no orphaned checkpoint writer is at work."""
        from distrain.checkpoint.catalog import clear_leftovers

        if (self.run / "checkpoints").is_dir():
            clear_leftovers(self.run / "checkpoints", patience_s=10)

    def judge(
        self,
        fault: Fault,
        before: dict[str, Any],
        ended: Ended,
        after: dict[str, Any],
        again: Ended,
        clean: dict[str, Any],
    ) -> list[str]:
        """Return what was wrong."""
        wrong, quiet = [], self.quiet[fault.ranks]
        allowed = (0, 1, 2) if fault.error in USER_ERRNOS else (0, 1)
        if ended.code not in allowed:
            wrong.append(f"the code is not one of {allowed}: {ended.output[-300:]}")
        if ended.code == 0 and not self.is_final(after, quiet):
            wrong.append(f"finished without the final checkpoint: {ended.output[-300:]}")
        said = [line for line in ended.output.splitlines() if line.strip()]
        if ended.code and not any(re.search(r"distrain: \S+ .*\S", line) for line in said):
            wrong.append(f"no line tells why: {said[-3:]}")
        if "Traceback" in ended.output and ended.code:
            wrong.append(f"a traceback: {said[-4:]}")
        if again.code != 0:
            wrong.append(f"the clean command ended with {again.code}: {again.output[-400:]}")
        if not self.is_final(clean, quiet):
            wrong.append("the clean command did not reach the weights of the quiet run")
        if lost := sorted(set(before["checkpoints"]) - set(after["checkpoints"])):
            wrong.append(f"checkpoints {lost} are gone")  # three are kept: none may be deleted
        if damaged := [n for n, one in after["checkpoints"].items() if not one.valid]:
            wrong.append(f"checkpoints {damaged} are damaged")
        newest, is_done = after["newest"], ITERS in after["checkpoints"]
        if newest and not is_done and f"continuing after iteration {newest}" not in again.output:
            wrong.append(f"the clean command did not continue from {newest}")
        wrong += self.judge_curves(before, ended, after, again, clean, quiet)
        return wrong

    def is_final(self, seen: dict[str, Any], quiet: dict[str, Any]) -> bool:
        """Whether the final checkpoint is there, valid, with the weights of the quiet run."""
        one, wanted = seen["checkpoints"].get(ITERS), quiet["checkpoints"][ITERS]
        parts = ("model", "optimizer", "rng", "stream")
        return bool(one and one.valid and all(one.digests[p] == wanted.digests[p] for p in parts))

    def judge_curves(
        self,
        before: dict[str, Any],
        ended: Ended,
        after: dict[str, Any],
        again: Ended,
        clean: dict[str, Any],
        quiet: dict[str, Any],
    ) -> list[str]:
        """Return what was wrong with metrics.jsonl and TensorBoard."""
        wrong = []
        for name, writer in (("rows", "JsonLinesWriter"), ("curve", "TensorBoardWriter")):
            for when, seen in (("after", after), ("clean", clean)):
                steps = [point[0] for point in seen[name]]
                if steps != sorted(set(steps)):
                    wrong.append(f"{when}: {name} doubled or out of order: {steps}")
                if when == "after" and name == "curve":
                    continue  # values of a torn attempt count when it is purged
                missing = [point for point in before[name] if point not in seen[name]]
                if missing:
                    wrong.append(f"{when}: {name} of before the fault are gone: {missing}")
            # what waited for a disk that never took it is lost; the last line about it says so
            told = re.search(rf"{writer}: .*(\d+ records are|may be) lost", ended.output)
            if clean[name] != quiet[name] and not told:
                wrong.append(f"clean: {name} are {clean[name]}, not {quiet[name]}")
        return wrong


def faults(counts: dict[str, dict[str, int]], ranks: int, *, every: int) -> list[Fault]:
    """Return the faults to try: each call, once and from then on; the error numbers in turn.

    Args:
        counts: calls of each kind by scenario.
        ranks: of the runs.
        every: only each so-manieth call, 1 for all.
    """
    numbers = itertools.count()
    chosen = []
    for scenario, by_kind in counts.items():
        for kind, num in by_kind.items():
            for nth in range(1, num + 1, every):
                number = next(numbers)
                for persistent in (False, True):  # each error number comes in both ways
                    error = ERRNOS[(number + 3 * persistent) % len(ERRNOS)]
                    chosen.append(Fault(scenario, kind, nth, error, persistent, ranks))
    return chosen


def table(codes: dict[tuple[str, str], collections.Counter[int]]) -> str:
    """Return the counts by kind and error number: trials, then how many ended with each code."""
    lines = [f"{'':8}" + "".join(f"{name:>24}" for name in ERRNOS)]
    for kind in KINDS:
        cells = []
        for name in ERRNOS:
            seen = codes.get((kind, name), collections.Counter())
            num = sum(seen.values())
            parts = " ".join(f"{code}:{seen[code]}" for code in sorted(seen))
            cells.append(f"{f'{num} ({parts})' if num else '-':>24}")
        lines.append(f"{kind:8}" + "".join(cells))
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="some calls of each kind, one rank")
    parser.add_argument("--every", type=int, default=1, help="only each so-manieth call")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="at most so many trials on each number of ranks")
    parser.add_argument("--part", type=int, nargs=2, default=[0, 1], help="part I of N, from 0")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no trial later")
    return parser.parse_args()


def main() -> int:
    """Run the campaign and print the table; 1 if anything was wrong."""
    options = parse()
    if "IO_FAULTS" not in os.environ:
        with tempfile.TemporaryDirectory(prefix="distrain-io-") as folder:
            control = Path(folder, "control")
            control.write_bytes(bytes(ctypes.sizeof(Control)))
            env = {"IO_FAULTS": str(control), "LD_PRELOAD": str(compiled(Path(folder)))}
            env |= {"OMP_NUM_THREADS": "1", "TMPDIR": folder, "PYTHONWARNINGS": "ignore"}
            command = [sys.executable, *sys.argv]
            return subprocess.run(command, env={**os.environ, **env}, check=False).returncode
    import torch
    import torch._dynamo
    import torch.distributed.tensor.parallel.ddp

    import distrain.checkpoint.staging
    import distrain.cli.command
    import distrain.hooks
    import distrain.job.job
    import distrain.job.training  # noqa: F401

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    campaign = Campaign(Path(tempfile.mkdtemp(prefix="runs-")))
    sys.path.insert(0, str(campaign.folder))
    gc.freeze()  # a full collection in a fork need not look at what torch has
    codes: dict[tuple[str, str], collections.Counter[int]] = {}
    wrong: list[str] = []
    num, began = 0, time.monotonic()
    for ranks in [1] if options.quick else options.ranks:
        counts = campaign.prepare(ranks)
        print(f"calls of a quiet run on {ranks} rank(s): {counts}", flush=True)
        chosen = faults(counts, ranks, every=options.every)
        random.Random(options.seed).shuffle(chosen)
        limit = options.limit or (24 if options.quick else None)
        part, parts = options.part
        for fault in chosen[part::parts][:limit]:
            if time.monotonic() - began > options.seconds:
                break
            code, texts = campaign.trial(fault)
            for text in texts:
                print("WRONG", text, flush=True)
            wrong += texts
            if code >= 0 or texts:
                num += 1
                codes.setdefault((fault.kind, fault.error), collections.Counter())[code] += 1
    print(f"\n{num} trials; each cell: trials (exit code:count)\n{table(codes)}")
    print(f"{len(wrong)} things were wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
