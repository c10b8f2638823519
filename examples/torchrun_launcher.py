"""A launcher that starts the ranks by torchrun in the background, and the client of its runs.

python -m distrain +experiment=digits launch=external +launch.ranks=2 \
    launch._target_=examples.torchrun_launcher.TorchrunLauncher
"""

import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from distrain.errors import ExitCode
from distrain.launch import Launcher
from distrain.launch.client import JobClient, JobStatus, State
from distrain.launch.external import ExternalLauncher
from distrain.runfolder import attempts as journal


class TorchrunClient(JobClient):
    def states(self, run_dirs):
        running = {run_dir: journal.read_running(run_dir) for run_dir in run_dirs}
        return {run_dir: self._status(attempt) for run_dir, attempt in running.items() if attempt}

    def _status(self, attempt):
        state = State.RUNNING if os.path.exists(f"/proc/{attempt.job_id}") else State.DEAD
        return JobStatus(state, f"torchrun {attempt.job_id}")

    def stop(self, run_dir, state):  # torchrun forwards the signal to its ranks
        os.kill(int(journal.read_running(run_dir).job_id), signal.SIGTERM)
        return True


@dataclass(frozen=True, kw_only=True)
class TorchrunLauncher(Launcher):
    waits = False
    client = TorchrunClient
    ranks: int = 2

    def start(self, job):
        run_dir = Path(job.run_dir)
        run_dir.joinpath("job.pkl").write_bytes(pickle.dumps(job))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += [f"--nproc-per-node={self.ranks}", "-m", __name__, job.run_dir]
        with run_dir.joinpath("torchrun.log").open("a") as log:
            process = subprocess.Popen(torchrun, stdout=log, stderr=log, start_new_session=True)
        journal.begin(run_dir, journal.new_attempt(run_dir, str(process.pid)))
        return ExitCode.FINISHED


if __name__ == "__main__":  # one rank; rank 0 records the end
    run_dir, outcome = Path(sys.argv[1]), "failed"
    try:
        code = ExternalLauncher().start(pickle.loads(run_dir.joinpath("job.pkl").read_bytes()))
        outcome = "finished" if code == ExitCode.FINISHED else "stopped"
    finally:
        if os.environ["RANK"] == "0":
            journal.close(run_dir, journal.read_running(run_dir), outcome=outcome)
