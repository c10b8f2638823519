"""Imports and the end of a process are not searched for garbage, all between them is."""

import os
import subprocess
import sys

import pytest

IMPORT = """
import gc
from distrain.process.garbage import importing

collections = []
gc.callbacks.append(lambda phase, info: collections.append(info["generation"]))
with importing():
    import torch
print(len(collections), gc.get_freeze_count() > 200_000, gc.isenabled())
"""
COMMAND = """
import atexit, gc, sys
from distrain.cli.command import main

atexit.register(lambda: print("searched at the end", len(gc.get_objects()), gc.isenabled()))
sys.argv[1:] = ["+experiment=digits", "trainer.max_iter=1", *sys.argv[1:]]
main()
"""


def output_of(code, *arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_no_collection_during_an_import(tmp_path):
    assert output_of(IMPORT, cwd=tmp_path) == "0 True True"


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", ["launch.in_process=true", "launch.ranks=2"])
def test_the_end_of_the_command_searches_next_to_nothing(tmp_path, ranks):
    *words, number, is_enabled = output_of(COMMAND, ranks, cwd=tmp_path).split()
    assert words == ["searched", "at", "the", "end"]
    assert int(number) < 20_000, "torch and its compiler are a million objects"
    assert is_enabled == "True"
