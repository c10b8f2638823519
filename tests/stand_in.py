"""The stand-in of NVIDIA's driver library: compiled once, and told what its GPUs say."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SOURCE = Path(__file__).with_name("nvml_stand_in.c")
LIBRARY = "libnvidia-ml.so.1"


@pytest.fixture(scope="session")
def libraries() -> Iterator[Path]:
    """A folder with `new` and `old` (it counts no energy), each with the library in it."""
    if shutil.which("gcc") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        packages = ["gcc", "libc6-dev"]
        for command in (["update", "-q"], ["install", "-qy", "--no-install-recommends", *packages]):
            subprocess.run(["apt-get", *command], env=env, capture_output=True, check=False)
    if shutil.which("gcc") is None:
        pytest.skip("no gcc here, which compiles the stand-in of NVIDIA's driver library")
    with tempfile.TemporaryDirectory(prefix="distrain-nvml-") as folder:
        for name, flags in (("new", []), ("old", ["-DWITHOUT_ENERGY"])):
            target = Path(folder, name, LIBRARY)
            target.parent.mkdir()
            command = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", *flags]
            command += [f"-Wl,-soname,{LIBRARY}", "-o", str(target), str(SOURCE)]
            subprocess.run(command, check=True)
        yield Path(folder)


class Driver:
    """What the stand-in says: its file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def says(self, **values: object) -> None:
        """Write all it says; `gpu0_power=1` is key "0.power"."""
        keys = {
            name.replace("gpu", "", 1).replace("_", ".", 1) if name != "gpus" else name: value
            for name, value in values.items()
        }
        partial = self.path.with_suffix(".new")
        partial.write_text("".join(f"{key} {value}\n" for key, value in keys.items()))
        partial.rename(self.path)  # a reader sees all or nothing

    def calls(self) -> list[str]:
        """Return the calls of nvmlInit and nvmlShutdown so far."""
        return Path(f"{self.path}.calls").read_text().split()


def with_stand_in(
    folder: Path, fn: Callable[..., Any], *args: Any, ranks: int = 1, old: bool = False
) -> list[Any]:
    """Return what `fn(rank, driver, *args)` returns in forked ranks that have the stand-in.

    There pynvml finds it by its name, for a library of that name is loaded already.
    """
    library = folder / ("old" if old else "new") / LIBRARY

    def work(rank: int) -> Any:
        ctypes.CDLL(str(library))
        torch.cuda.is_available = lambda: False  # its GPUs are there for NVML alone
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        with tempfile.TemporaryDirectory() as own:
            os.environ["NVML_STAND_IN"] = f"{own}/says"
            return fn(rank, Driver(Path(own, "says")), *args)

    from ranks import run_ranks  # imports much of torch

    return run_ranks(work, ranks)
