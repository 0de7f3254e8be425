"""Every Triton kernel compiles for sm_90 without a GPU: no spills, little shared memory, at even and odd sizes."""

import math
import random
import re
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.__version__.startswith("3.6."):
    pytest.skip(f"reads compiler internals of triton 3.6, this is {triton.__version__}", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from shedder.triton_kernels import (  # noqa: E402
    causal_conv1d,
    gated_rmsnorm,
    selective_scan,
    ssd,
    ssd_fused,
    state_update,
)

SM90 = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 99 * 1024            # of one program on sm_86 and sm_89, the least of the GPUs we name
F32, BF16 = torch.float32, torch.bfloat16


class Recorder:
    """Stands in for the kernels of a module and keeps the arguments of every launch."""

    def __init__(self, monkeypatch, module):
        self.launches, self.compiled_ahead = [], []
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, self.of(kernel))

    def of(self, kernel):
        class Launcher:
            def __getitem__(_, grid):
                return lambda *args, **kwargs: self.launches.append((kernel, args, kwargs))

            def warmup(_, *args, grid, **kwargs):
                self.compiled_ahead.append((kernel, args, kwargs))
        return Launcher()


def compile_launch(kernel, args, kwargs):
    """(spilled bytes, shared bytes) of the kernel as specialised for this launch."""
    backend = make_backend(SM90)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    compiled = triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=SM90, options=options.__dict__)
    log = subprocess.run([triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-o", "/dev/stdout", "-"],
                         input=compiled.asm["ptx"].encode(), capture_output=True, check=True).stderr.decode()
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    print(f"{kernel.__name__}: {registers} registers, {spilled} bytes spilled, {compiled.metadata.shared} bytes shared")
    return spilled, compiled.metadata.shared


@pytest.fixture
def check(monkeypatch):
    """Calls a launcher and compiles what it launches."""
    def compile_all(launcher, *arguments, spills=0):
        recorder = Recorder(monkeypatch, sys.modules[launcher.__module__])
        launcher(*arguments)
        monkeypatch.undo()
        assert recorder.launches, "TRITON_INTERPRET is set"
        for launch in recorder.launches:
            spilled, shared = compile_launch(*launch)
            assert spilled <= spills
            assert shared <= SHARED_MEMORY
    return compile_all


def ssd_arguments(dtype, headdim, dstate):
    heads, groups, length = 5, 2, 100
    x = torch.empty(1, length, heads, headdim, dtype=dtype)
    B = torch.empty(1, length, groups, dstate, dtype=dtype)
    vector = torch.empty(heads)
    return (x, x[..., 0], vector, B, B, vector, x, vector, True, 0.0, 1.0, torch.zeros(heads, dtype=torch.int32),
            torch.empty(1, heads, headdim, dstate), torch.zeros(1, length, dtype=torch.int32))


@pytest.mark.parametrize(("dtype", "headdim", "dstate"), [
    (BF16, 64, 256), (F32, 64, 128), (F32, 61, 101), (F32, 13, 256)])
def test_ssd(check, dtype, headdim, dstate):
    check(ssd.ssd, *ssd_arguments(dtype, headdim, dstate))


@pytest.mark.parametrize(("headdim", "dstate", "spills"), [(64, 64, 100), (64, 128, 400), (60, 100, 600)])
def test_ssd_fused(check, headdim, dstate, spills):
    """A warp keeps a state of 64 x 128, scores and y at once: a few addresses move out of 255 registers, once a chunk.

    With none spilled two launches took 2.4 times as long on an H200 (docs/measured-facts.md).
    """
    check(ssd_fused.ssd_fused, *ssd_arguments(BF16, headdim, dstate), spills=spills)


@pytest.mark.parametrize(("dtype", "channels", "length", "dstate", "groups"), [
    (BF16, 5120, 48, 16, 1), (BF16, 5120, 50, 16, 1), (BF16, 37, 50, 12, 1), (BF16, 640, 64, 8, 1), (F32, 37, 50, 5, 3),
    (F32, 64, 50, 128, 1), (BF16, 61, 50, 256, 2)])
def test_selective_scan(check, dtype, channels, length, dstate, groups):
    u, B = torch.empty(1, channels, length, dtype=dtype), torch.empty(1, groups, dstate, length, dtype=dtype)
    vector = torch.empty(channels)
    check(selective_scan.selective_scan, u, u, torch.empty(channels, dstate), B, B, vector, u, vector, True,
          torch.empty(1, channels, dstate), torch.zeros(channels, dtype=torch.int32),
          torch.zeros(1, length, dtype=torch.int32))


@pytest.mark.parametrize(("headdim", "dstate"), [(64, 128), (60, 100), (61, 101), (3, 256)])
@pytest.mark.parametrize("tied", [True, False])
def test_state_update(check, headdim, dstate, tied):
    heads = 5
    x, B = torch.empty(2, heads, headdim, dtype=BF16), torch.empty(2, 2, dstate, dtype=BF16)
    if tied:
        A, dt, D = (torch.empty(heads)[:, None, None].expand(-1, headdim, dstate), x[..., :1].expand(-1, -1, headdim),
                    torch.empty(heads)[:, None].expand(-1, headdim))
    else:
        A, dt, D = torch.empty(heads, headdim, dstate), x, torch.empty(heads, headdim)
    check(state_update.state_update, torch.empty(2, heads, headdim, dstate), x, dt, A, B, B, D, x, D, True,
          torch.zeros(heads, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("channels", [5376, 61])
@pytest.mark.parametrize("channel_last", [True, False])
def test_causal_conv1d(check, channels, channel_last):
    x = torch.empty(1, 300, channels, dtype=BF16).mT if channel_last else torch.empty(1, channels, 300, dtype=BF16)
    weight = torch.empty(channels, 4)
    check(causal_conv1d.causal_conv1d, x, weight, weight[:, 0], True, x[..., :3],
          torch.zeros(1, 300, dtype=torch.int32))
    state, one = torch.empty(2, channels, 4, dtype=BF16), torch.zeros(1, dtype=torch.int32)
    check(causal_conv1d.causal_conv1d_update, x[..., :1], state, weight, weight[:, 0], True, one, one)


@pytest.mark.parametrize("segments", [[5120], [61], [60, 100, 7]])
def test_gated_rmsnorm(check, segments):
    x, weight = torch.empty(3, sum(segments), dtype=BF16), torch.empty(sum(segments))
    check(gated_rmsnorm.gated_rmsnorm, x, weight, weight, x, segments, [1e-5] * len(segments), False)


def variants(recorder, of="launches"):
    """How many times the launches that were recorded make Triton compile."""
    backend = make_backend(SM90)
    keys = set()
    for kernel, args, kwargs in getattr(recorder, of):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = bind(*args, **kwargs)
        keys.add((kernel.__name__, str(specialization), str(sorted(options.items()))))
    return len(keys)


def test_layers_of_many_shapes_compile_few_kernels(monkeypatch):
    """64 layers, no two alike, as a pruned model has them: the first output must not wait for 64 compilations."""
    monkeypatch.setattr(sys.modules[ssd_fused.compile_side_by_side.__module__], "_known", set())
    draw = random.Random(0)
    scans, fused = Recorder(monkeypatch, selective_scan), Recorder(monkeypatch, ssd_fused)
    convolutions, norms = Recorder(monkeypatch, causal_conv1d), Recorder(monkeypatch, gated_rmsnorm)
    for _ in range(64):
        channels, dstate = draw.randint(300, 5120), draw.randint(2, 16)
        u, projected = torch.empty(1, 100, channels, dtype=BF16).mT, torch.empty(1, 100, 30 + 2 * dstate, dtype=BF16)
        B, C = (part.mT[:, None] for part in projected[..., 30:].chunk(2, dim=-1))
        vector = torch.empty(channels)
        selective_scan.selective_scan(u, u, torch.empty(channels, dstate), B, C, vector, u, vector, True,
                                      None, None, None)

        heads, headdim, dstate = draw.randint(5, 80), draw.randint(13, 64), draw.randint(5, 128)
        inner, vector = heads * headdim, torch.empty(heads)
        rows = torch.empty(1, 100, 2 * inner + 2 * dstate + heads + 7 & -8, dtype=BF16)
        conv_channels = inner + 2 * dstate
        causal_conv1d.causal_conv1d(rows[..., inner:inner + conv_channels].mT, torch.empty(conv_channels, 4), None,
                                    True, None, None)
        gated_rmsnorm.gated_rmsnorm(torch.empty(100, inner, dtype=BF16), torch.empty(inner), None, rows[0, :, :inner],
                                    [inner], [1e-5], False)
        x, B, C = torch.empty(1, 100, inner + 2 * dstate, dtype=BF16).split([inner, dstate, dstate], dim=-1)
        ssd_fused.ssd_fused(x.unflatten(-1, (heads, headdim)), torch.empty(1, 100, heads), vector, B[:, :, None],
                            C[:, :, None], vector, None, vector, True, 0.0, math.inf,
                            torch.zeros(heads, dtype=torch.int32), None, None)
    assert 1 < variants(scans) <= 8
    assert 1 < variants(fused) <= 6
    assert 1 < variants(convolutions) <= 2
    assert 1 < variants(norms) <= 4
    for recorder in (fused, norms):
        ahead = variants(recorder, "compiled_ahead")
        recorder.launches += recorder.compiled_ahead
        assert ahead == variants(recorder), "something was launched that had not been compiled with the first one"
