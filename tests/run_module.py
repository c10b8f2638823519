"""`python -m MODULE` in a fork of a process that has imported torch and Hydra already.

Importing them takes most of the time of a short command. distrain itself is imported by each
command, which ends as any process does. A test of the start of a process, such as its signals or
its words in /proc, needs a real one: `subprocess`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from typing import Any

from distrain.launch.options import RankOptions
from distrain.process.garbage import importing

IMPORTED = [  # of other projects, by a command that trains on two ranks
    "torch._dynamo",
    "torch.distributed.tensor.parallel.ddp",
    "torch.utils.data",
    "torch.utils.tensorboard",
    "hydra.main",
    "hydra.utils",
    "numpy.random",
    "rich.progress",
    "safetensors.torch",
    "sklearn.datasets",
]


class _Server:
    """Forks one command after another, and ends with this process."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            subprocess.run(command, pass_fds=[theirs.fileno()], check=True)

    def run(self, request: dict[str, Any], files: list[int], timeout_s: float) -> int:
        self._socket.settimeout(timeout_s)
        pid = None
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], files)
            pid = int(self._socket.recv(64))
            return int(self._socket.recv(64))
        except BaseException as error:  # pytest raises its own at the limit of a test
            self._socket.close()  # the end of this command would be taken for that of the next
            del _servers[os.getpid()]
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
            if isinstance(error, TimeoutError):
                raise subprocess.TimeoutExpired(request["argv"], timeout_s) from None
            raise


_servers: dict[int, _Server] = {}  # by the process that uses it


def run_module(
    module: str,
    *arguments: str,
    cwd: os.PathLike[str] | str = ".",
    env: dict[str, str] | None = None,
    timeout_s: float = 200,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` to its end; return its exit code and output."""
    if os.getpid() not in _servers:
        _servers[os.getpid()] = _Server()
    request = {
        "argv": [module, *arguments],
        "cwd": os.path.abspath(cwd),
        "env": dict(os.environ if env is None else env),
    }
    with (
        open(os.devnull) as nothing,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        files = [file.fileno() for file in (nothing, out, err)]
        code = _servers[os.getpid()].run(request, files, timeout_s)
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(request["argv"], code, out.read(), err.read())


def _next_command(connection: socket.socket) -> dict[str, Any]:
    """Fork for each request; return it in the fork. The process itself ends with the requests."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            connection.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            request: dict[str, Any] = json.loads(message)
            return request
        for file in files:
            os.close(file)
        with contextlib.suppress(BrokenPipeError):  # interrupted: no more requests follow
            connection.send(str(pid).encode())
            _, status = os.waitpid(pid, 0)
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def _serve() -> None:
    if os.fork():
        os._exit(0)  # it is no child of pytest: tests look at those
    RankOptions().with_start_method()  # imports torch, and sees that ranks can be forked
    with importing():
        for name in IMPORTED:
            importlib.import_module(name)
    request = _next_command(socket.socket(fileno=int(sys.argv[1])))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:1] = [request["cwd"], *paths]  # its first is this folder
    sys.argv[1:] = request["argv"][1:]
    runpy.run_module(request["argv"][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
