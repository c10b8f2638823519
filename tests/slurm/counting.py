"""A job for tests: counts with all ranks, one all_reduce a step; can be stopped and continued."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from distrain.errors import ExitCode


@dataclass
class Count:
    """Counts to `until`; rank `fail_rank` raises before step `fail_at` of any attempt.

    What it has done is kept in checkpoints/iter_N, made every `save_every` steps and at a stop.
    Each attempt adds "FIRST WORLD_SIZE NODE" to RUN/starts.
    """

    run_dir: str
    until: int = 20
    step_s: float = 0.05
    save_every: int = 10**9
    fail_rank: int = -1
    fail_at: int = -1

    def __call__(self) -> ExitCode:
        asked: list[int] = []
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, lambda number, frame: asked.append(number))
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        rank = dist.get_rank()
        checkpoints = Path(self.run_dir, "checkpoints")
        step = max((int(path.name[5:]) for path in checkpoints.glob("iter_*")), default=0)
        dist.barrier()
        if rank == 0:
            with Path(self.run_dir, "starts").open("a") as file:
                print(step, dist.get_world_size(), os.uname().nodename, file=file)
            print("counting from", step, flush=True)
        code = ExitCode.FINISHED
        while step < self.until:
            if rank == self.fail_rank and step == self.fail_at:
                raise ValueError("user code is wrong")
            votes = torch.tensor(float(bool(asked)))
            dist.all_reduce(votes)
            if votes.item():
                code = ExitCode.STOPPED
                break
            time.sleep(self.step_s)
            step += 1
            if step % self.save_every == 0:
                self._save(checkpoints, step, rank)
        self._save(checkpoints, step, rank)
        dist.barrier()
        dist.destroy_process_group()
        return code

    def _save(self, checkpoints: Path, step: int, rank: int) -> None:
        if rank == 0:
            (checkpoints / f"iter_{step:010d}").mkdir(parents=True, exist_ok=True)

    def starts(self) -> list[str]:
        try:
            return Path(self.run_dir, "starts").read_text().splitlines()
        except FileNotFoundError:
            return []


if __name__ == "__main__":  # for a batch script: python counting.py RUN
    from distrain.launch.allocation import AllocationLauncher

    sys.path.insert(0, os.path.dirname(__file__))
    from counting import Count as Importable  # pickled under a name that the nodes can import

    sys.exit(AllocationLauncher(ranks=2).start(Importable(sys.argv[1])))
