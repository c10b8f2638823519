"""The campaign of injected error numbers, in small: some operations of a run on one rank."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("io_errors.py")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here, which compiles the library")
def test_no_injected_error_loses_anything():
    command = [sys.executable, str(CAMPAIGN), "--quick", "--limit", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    num = int(re.search(r"^(\d+) trials", done.stdout, re.MULTILINE)[1])
    assert 6 <= num <= 12  # threads and processes do not make every call each time
    assert "\n0 things were wrong" in done.stdout
