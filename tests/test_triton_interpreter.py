"""Runs triton_interpreter_cases.py in a process of its own: a kernel is interpreted or not from its definition on."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

pytest.importorskip("triton")
if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
    pytest.skip(f"Triton's interpreter needs numpy < 2.4, this is {numpy.__version__}", allow_module_level=True)
CASES = Path(__file__).with_name("triton_interpreter_cases.py")


def test_the_kernels_match_the_reference_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env=environment, cwd=CASES.parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout.splitlines()[-1]
