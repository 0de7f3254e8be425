"""What the CTAs of the CUDA SSD take of the heads, compiled for the host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
COMPILER = shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_every_chunk_is_taken_once_and_nobody_waits_for_ever(tmp_path):
    (tmp_path / "cuda.h").write_text("struct CUtensorMap {};\n")
    program = tmp_path / "ssd_pieces_check"
    subprocess.run([str(COMPILER), "-std=c++17", "-O1", f"-I{TESTS.parent / 'csrc'}", f"-I{tmp_path}",
                    str(TESTS / "ssd_pieces_check.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[-2]) > 1000
