"""What nvcc made of the CUDA kernels, read from the built library: no GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from shedder import native

LIBRARY = native.LIBRARY_FOLDER / "libshedder_cuda.so"


def _cuobjdump() -> str | None:
    """From the PATH, or the one that Triton brings."""
    triton = find_spec("triton")
    folder = None if triton is None or triton.origin is None else Path(triton.origin).parent / "backends/nvidia/bin"
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=folder)


pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason=f"{LIBRARY} was not built"),
    pytest.mark.skipif(_cuobjdump() is None, reason="no cuobjdump"),
]


@pytest.fixture(scope="module")
def opcodes() -> dict[str, Counter[str]]:
    """Of each kernel (mangled), how often each opcode with its modifiers occurs."""
    tool = _cuobjdump()
    assert tool is not None
    dump = subprocess.Popen([tool, "-sass", str(LIBRARY)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert dump.stdout is not None
    kernels: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    instruction = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")
    for line in dump.stdout:
        if "Function : " in line:
            counts = kernels.setdefault(line.split("Function : ")[1].strip(), Counter())
        elif (match := instruction.search(line)) is not None:
            counts[match[1]] += 1
    assert dump.wait() == 0
    return kernels


FAMILIES = ["selective_scan_fwd", "selective_scan_tiled", "selective_scan_channels", "selective_scan_state_words",
            "gated_rmsnorm", "state_update", "ssd_fwd", "ssd_align", "ssd_mma", "selective_scan_complex",
            "causal_conv1d", "removed_ssm", "step_mixer", "mamba_inner_step"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_kernel_spills_or_keeps_an_array_in_local_memory(opcodes, family):
    kernels = {kernel: counts for kernel, counts in opcodes.items() if family in kernel}
    assert kernels, f"the library has no kernel called {family}"
    local = {kernel: count for kernel, counts in kernels.items()
             if (count := sum(n for opcode, n in counts.items() if opcode.startswith(("LDL", "STL"))))}
    assert not local, "loads and stores of local memory: " + ", ".join(f"{k} {n}" for k, n in local.items())


def test_code_fits_the_instruction_cache(opcodes):
    """The scan for many channels, three forms in one, is the largest. Unrolled in each of them, a path that is taken
    once a row cost a third of the time (docs/measured-facts.md)."""
    most = 16_000
    large = {kernel: n for kernel, counts in opcodes.items() if (n := sum(counts.values())) > most}
    assert not large, f"more than {most} instructions: {large}"


def test_every_kernel_waits_for_the_one_before(opcodes):
    """All are launched so that they may begin before that one has ended (csrc/ops/cuda_launch.h)."""
    _assert_all_have(opcodes, "", "ACQBULK")


@pytest.mark.parametrize(("family", "opcode"), [("ssd_fwd", "HGMMA"), ("ssd_mma", "HMMA")])
def test_products_are_done_by_the_tensor_core(opcodes, family, opcode):
    _assert_all_have(opcodes, family, opcode)


def test_the_scan_reads_and_writes_rows_on_the_grid_16_bytes_at_a_time(opcodes):
    _assert_all_have(opcodes, "selective_scan_tiled", "LDG.E.128")
    _assert_all_have(opcodes, "selective_scan_tiled", "STG.E.128")
    _assert_all_have(opcodes, "selective_scan_channels", "UTMALDG")
    _assert_all_have(opcodes, "selective_scan_channels", "STG.E.128")
    _assert_all_have(opcodes, "selective_scan_state_words", "STG.E.128")


def test_ssd_copies_and_stores_whole_pieces(opcodes):
    _assert_all_have(opcodes, "ssd_fwd", "UTMALDG")
    _assert_all_have(opcodes, "ssd_fwd", "STG.E.128")
    _assert_all_have(opcodes, "ssd_align", "LDG.E.128")
    _assert_all_have(opcodes, "ssd_align", "STG.E.128")


@pytest.mark.parametrize("family", ["selective_scan_channels", "ssd_fwd"])
def test_boxes_are_asked_for_by_one_thread_that_the_compiler_knows(opcodes, family):
    """Else each copy is a loop over the threads that may ask, 1 to 5 % of the time (docs/measured-facts.md)."""
    loops = {kernel: n for kernel, counts in opcodes.items() if family in kernel and (n := counts["BRA.U.ANY"])}
    assert not loops, f"copies of boxes in loops: {loops}"


def test_only_the_ssd_that_copies_words_has_asynchronous_copies_of_threads(opcodes):
    """Else ptxas puts loads that do nothing behind the barriers of all (docs/measured-facts.md)."""
    copying = {kernel for kernel, counts in opcodes.items()
               if "ssd_fwd" in kernel and any(one.startswith("LDGSTS") for one in counts)}
    by_words = {kernel for kernel in opcodes if "ssd_fwd" in kernel and "SsdFormE3E" in kernel}    # kWords
    assert by_words and copying == by_words


def _assert_all_have(opcodes: dict[str, Counter[str]], family: str, opcode: str) -> None:
    without = [kernel for kernel, counts in opcodes.items()
               if family in kernel and not any(one.startswith(opcode) for one in counts)]
    assert not without, f"no {opcode} in {without}"
