"""The build: what setup.py understands, and how shedder.native takes libraries that are missing or broken."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shedder import native

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def build():
    """setup.py as a module: importing it builds nothing."""
    spec = importlib.util.spec_from_file_location("shedder_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("text", "archs"), [
    ("none", []), ("90a", ["90a"]), ("90", ["90a"]), ("sm_90a", ["90a"]), ("90a,80", ["80", "90a"]),
    ("80;86 ; 80", ["80", "86"]), ("all", ["80", "86", "89", "90a", "100", "120"]),
])
def test_cuda_archs_are_read_from_a_list(build, text, archs):
    assert build.parse_cuda_archs(text) == archs


@pytest.mark.parametrize("text", ["75", "hopper", ",", "none,90a", "all,90a"])
def test_unknown_cuda_archs_name_what_is_accepted(build, text):
    with pytest.raises(SystemExit, match=r"SHEDDER_CUDA_ARCHS is .*accepted: none, all, or a list out of 80,86"):
        build.parse_cuda_archs(text)


@pytest.mark.parametrize(("capability", "arch"), [
    ((8, 0), "80"), ((8, 6), "86"), ((8, 7), "86"), ((8, 9), "89"), ((9, 0), "90a"), ((10, 0), "100"), ((10, 3), "100"),
    ((12, 1), "120"), ((7, 5), None), ((11, 0), None),
])
def test_a_gpu_takes_code_of_its_own_generation(build, capability, arch):
    assert build.arch_for(*capability) == arch


def test_without_nvcc_there_is_no_cuda_library_and_a_reason(build, monkeypatch):
    monkeypatch.setenv("SHEDDER_CUDA_ARCHS", "90a")
    archs, reason = build.choose_cuda_archs(None)
    assert archs == []
    assert "nvcc was not found" in reason


def test_without_a_gpu_a_development_build_has_no_cuda_library(build, monkeypatch):
    monkeypatch.delenv("SHEDDER_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(build, "visible_capabilities", lambda: [])
    archs, reason = build.choose_cuda_archs("nvcc")
    assert archs == []
    assert "no GPU was visible" in reason


def test_without_a_compiler_the_error_says_what_to_install(build, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler .*apt-get install g\+\+"):
        build.require_compiler()


def test_every_folder_with_code_is_a_package_of_the_wheel():
    for package in ("shedder", "triton_kernels"):
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            assert (folder / "__init__.py").exists(), f"{folder} has no __init__.py: the wheel would leave it out"


# ---- loading ----------------------------------------------------------------------------------------------------

STATUS_OF = """
import json, pathlib, sys
from shedder import native
native.LIBRARY_FOLDER = pathlib.Path(sys.argv[1])
print(json.dumps({"cpu": native.cpu_status(), "cuda": native.cuda_status(), "isa": native.cpu_isa()}))
"""


def status_in_a_fresh_process(folder: Path) -> dict[str, str]:
    """A library registers its ops once per process, so each folder is tried in a process of its own."""
    done = subprocess.run([sys.executable, "-c", STATUS_OF, str(folder)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def built(name: str) -> Path:
    path = native.LIBRARY_FOLDER / name
    if not path.exists():
        pytest.skip(f"{name} is not built here")
    return path


def test_what_was_built_loads():
    built("build.json")
    assert native.cpu_status() == "loaded"
    assert native.build_info()["cpu_isa_levels"][0] == "base"
    if native.build_info()["cuda_archs"]:
        assert native.cuda_status() == "loaded"
    else:
        assert native.build_info()["no_cuda"] in native.cuda_status()


def test_nothing_built_gives_reasons(tmp_path):
    status = status_in_a_fresh_process(tmp_path)
    assert "libshedder_cpu.so was not built" in status["cpu"]
    assert "libshedder_cuda.so was not built" in status["cuda"]


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda whole: b"not a library at all, but long enough to hold the header of an ELF file", "not a shared library"),
    (lambda whole: whole[:len(whole) // 2], "is truncated"),
], ids=["text", "truncated"])
@pytest.mark.parametrize("victim", ["cpu", "cuda"])
def test_a_broken_library_gives_a_reason_and_leaves_the_other_alone(tmp_path, victim, damage, reason):
    other = "cuda" if victim == "cpu" else "cpu"
    whole = built(f"libshedder_{victim}.so").read_bytes()
    (tmp_path / f"libshedder_{victim}.so").write_bytes(damage(whole))
    if (native.LIBRARY_FOLDER / f"libshedder_{other}.so").exists():
        shutil.copy(native.LIBRARY_FOLDER / f"libshedder_{other}.so", tmp_path)
    status = status_in_a_fresh_process(tmp_path)
    assert reason in status[victim]
    if (tmp_path / f"libshedder_{other}.so").exists():
        assert status[other] == "loaded"
