"""Drives CMake: compiles csrc/ into shedder/_lib. The metadata is in pyproject.toml.

SHEDDER_CUDA_ARCHS says for which GPUs the CUDA library is compiled: a list such as 80,90a; `all` for a release;
`none` for no CUDA library. Unset: for the GPUs that are visible here, and none without a GPU or without nvcc.
SHEDDER_SANITIZER=1 compiles a slower CUDA library that compute-sanitizer's racecheck and initcheck understand.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_ARCHS = ("80", "86", "89", "90a", "100", "120")
OLDEST_TORCH = (2, 10)


class BuildError(SystemExit):
    """What stops the build, and what would let it go on."""

    def __init__(self, message: str) -> None:
        super().__init__(f"\nshedder cannot be built: {message}\n")


def parse_cuda_archs(text: str) -> list[str]:
    """The architectures that SHEDDER_CUDA_ARCHS names; [] for none."""
    names = text.replace(";", ",").replace(" ", ",").split(",")
    names = [name.removeprefix("sm_") for name in names if name]
    if names == ["none"]:
        return []
    if names == ["all"]:
        return list(CUDA_ARCHS)
    names = ["90a" if name == "90" else name for name in names]
    unknown = [name for name in names if name not in CUDA_ARCHS]
    if unknown or not names:
        accepted = f"none, all, or a list out of {','.join(CUDA_ARCHS)}"
        raise BuildError(f"SHEDDER_CUDA_ARCHS is {text!r}; accepted: {accepted}")
    return sorted(set(names), key=CUDA_ARCHS.index)


def arch_for(major: int, minor: int) -> str | None:
    """The architecture whose code this GPU runs: that of its own major, with the highest minor up to its own."""
    best = None
    for name in CUDA_ARCHS:
        number = int(name.rstrip("a"))
        if number // 10 == major and number % 10 <= minor:
            best = name
    return best


def visible_capabilities() -> list[tuple[int, int]]:
    """Compute capability of each GPU that the driver shows; [] where there is no driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)     # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)     # ..._MINOR
        found.append((major.value, minor.value))
    return found


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (nvcc := shutil.which("nvcc", path=os.path.join(home, "bin"))):
            return nvcc
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def choose_cuda_archs(nvcc: str | None) -> tuple[list[str], str]:
    """(architectures, why there are none or '')."""
    wish = os.environ.get("SHEDDER_CUDA_ARCHS")
    archs = parse_cuda_archs(wish) if wish else []
    if wish and not archs:
        return [], f"SHEDDER_CUDA_ARCHS={wish}"
    if nvcc is None:
        return [], "nvcc was not found when shedder was built (looked in CUDA_HOME, CUDACXX, PATH, /usr/local/cuda)"
    if not wish:
        capabilities = visible_capabilities()
        if not capabilities:
            return [], "no GPU was visible when this was built (SHEDDER_CUDA_ARCHS=90a or all builds it all the same)"
        matches = {arch_for(*capability) for capability in capabilities}
        archs = [name for name in CUDA_ARCHS if name in matches]
        if not archs:
            major, minor = capabilities[0]
            return [], f"the visible GPU is sm_{major}{minor}; there are CUDA kernels for {', '.join(CUDA_ARCHS)}"
    codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout
    known = [name for name in archs if f"sm_{name.rstrip('a')}" in codes.split()]
    if not known:
        return [], f"{nvcc} knows none of the architectures {','.join(archs)}"
    return known, ""


def find_torch() -> tuple[Path, str]:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not in this environment; pip install torch first, or drop --no-build-isolation")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise BuildError(f"torch is {version}; accepted: 2.10 or later")
    return Path(spec.submodule_search_locations[0]), version


def find_tool(name: str, folder_attribute: str) -> str:
    """A build tool out of its PyPI package, else from PATH."""
    if importlib.util.find_spec(name) is not None:
        folder = getattr(importlib.import_module(name), folder_attribute, None)
        if folder and (tool := shutil.which(name, path=str(folder))):
            return tool
    tool = shutil.which(name)
    if tool is None:
        raise BuildError(f"{name} was not found; pip install {name}")
    return tool


def require_compiler() -> None:
    wish = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([wish.split()[0]] if wish else ["c++", "g++", "clang++"])):
        looked = f"CXX={wish}" if wish else "c++, g++ and clang++ on PATH"
        raise BuildError(f"no C++ compiler (looked for {looked}). On Debian: apt-get install g++. Or name one in CXX.")


class CMakeBuild(build_ext):
    """Compiles csrc into shedder/_lib of the build tree, or of the source tree for an editable install."""

    def library_folder(self) -> Path:
        in_source = self.inplace or getattr(self, "editable_mode", False)
        return (ROOT if in_source else Path(self.build_lib).resolve()) / "shedder" / "_lib"

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted(self.library_folder().glob("*"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def run(self) -> None:
        require_compiler()
        torch_folder, torch_version = find_torch()
        nvcc = find_nvcc()
        archs, no_cuda = choose_cuda_archs(nvcc)
        sanitizer = bool(archs) and os.environ.get("SHEDDER_SANITIZER") == "1"
        print(f"shedder: building the CPU library{' and the CUDA library for ' + ','.join(archs) if archs else ''}"
              f"{'; no CUDA library: ' + no_cuda if no_cuda else ''}", file=sys.stderr)

        tree = ROOT / "build" / "cmake"
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        configure = [cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", "-Wno-dev",
                     f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}", "-DCMAKE_BUILD_TYPE=Release",
                     f"-DSHEDDER_TORCH_DIR={torch_folder}", f"-DSHEDDER_CUDA_ARCHS={';'.join(archs) or 'none'}",
                     f"-DSHEDDER_SANITIZER={'ON' if sanitizer else 'OFF'}"]
        if archs:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        self.call(configure)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        self.call([cmake, "--build", str(tree), "--parallel", jobs])

        target = self.library_folder()
        target.mkdir(parents=True, exist_ok=True)
        built = {path.name for path in tree.glob("libshedder_*.so")}
        for stale in ("libshedder_cpu.so", "libshedder_cuda.so"):
            wanted = stale in built and (archs or "cuda" not in stale)
            if not wanted:
                (target / stale).unlink(missing_ok=True)
                continue
            # A new file under the name: a process that runs the old one keeps its own.
            shutil.copy2(tree / stale, target / f"{stale}.new")
            os.replace(target / f"{stale}.new", target / stale)
        facts = json.loads((tree / "build.json").read_text())
        facts |= {"torch": torch_version, "cuda_archs": archs, "no_cuda": no_cuda, "sanitizer": sanitizer}
        (target / "build.json").write_text(json.dumps(facts, indent=2) + "\n")

    @staticmethod
    def call(command: list[str]) -> None:
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise BuildError(f"this command failed ({done.returncode}), its output is above: {' '.join(command)}")


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the stable ABI needs no Python headers, so one wheel serves every Python."""

    def run(self) -> None:
        # A module that was deleted since the last build must not travel in the wheel.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(ext_modules=[Extension("shedder._lib", sources=[])],
          cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel})
