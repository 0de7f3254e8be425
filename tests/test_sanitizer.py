"""compute-sanitizer finds nothing in small calls of every kernel; -n 8 runs all tools at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_calls import BACKENDS

from shedder import native

CALLS = Path(__file__).resolve().parent / "small_calls.py"
SANITIZER = shutil.which("compute-sanitizer")

pytestmark = [pytest.mark.gpu, pytest.mark.slow,
              pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on the PATH")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_small_calls_are_clean(tool, backend):
    if reason := BACKENDS[backend].available():
        pytest.skip(reason)
    if backend == "cuda" and tool in ("racecheck", "initcheck") and not native.build_info().get("sanitizer"):
        pytest.skip("racecheck counts an arrival at an mbarrier for one lane, initcheck a word that is waited for as "
                    "read too early: build with SHEDDER_SANITIZER=1")
    assert SANITIZER is not None
    done = subprocess.run([SANITIZER, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only",
                           sys.executable, str(CALLS), backend], capture_output=True, text=True,
                          env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert f"calls of {backend}" in done.stdout
