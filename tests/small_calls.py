"""Every kernel of a GPU backend on small shapes, with next to nothing else on the GPU: what compute-sanitizer runs.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/small_calls.py cuda

Inputs are made on the CPU and copied, each (by that variable) into an allocation of exactly its size: an access beyond
a tensor is one beyond an allocation, and what was not written was never written. Outputs are NaN before each call and
must be finite after it, since initcheck does not see what the copy engine writes. Numbers are compared elsewhere.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

from poison import poisoned

from shedder.ops import cuda, triton

BACKENDS = {"cuda": cuda, "triton": triton}
EVERY = {"cuda": 1, "triton": 8}                        # of the calls: Triton compiles for nearly each
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Call = tuple[str, str, list[Any]]                       # what a failure is known by, the op, its arguments


def normal(*shape: int, dtype: torch.dtype = F32, last: int = -1) -> Tensor:
    """last: the dimension that is contiguous in memory."""
    return torch.randn(shape).to(dtype).movedim(last, -1).contiguous().cuda().movedim(-1, last)


def negative(*shape: int) -> Tensor:
    return -torch.exp2(torch.rand(shape) * 6 - 2).cuda()


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).cuda()


def sequences(batch: int, length: int) -> Tensor:
    """seq_idx of four sequences a row, with padding before the second."""
    row = torch.arange(length).mul(4).div(length, rounding_mode="floor").int()
    row[length // 4 - 1] = -1
    return row.repeat(batch, 1).cuda()


def scans() -> Iterator[Call]:
    def scan(batch: int, channels: int, length: int, dstate: int, dtype: torch.dtype = BF16, *, last: int = -1,
             groups: int = 1, extras: bool = True, packed: bool = False) -> Call:
        u, delta, z = (normal(batch, channels, length, dtype=dtype, last=last) for _ in range(3))
        B, C = (normal(batch, groups, dstate, length, dtype=dtype) for _ in "BC")
        channel_to_group = integers(*torch.randint(groups, (channels,)).tolist()) if groups > 1 else None
        optional = [normal(channels), z, normal(channels), True, normal(batch, channels, dstate)]
        return (f"B{batch} D{channels} L{length} N{dstate} {dtype} last {last} G{groups}", "selective_scan",
                [u, delta, negative(channels, dstate), B, C, *(optional if extras else [None, None, None, True, None]),
                 channel_to_group, sequences(batch, length) if packed else None])

    for dtype in (F32, F16, BF16):
        yield scan(2, 45, 63, 16, dtype)
        yield scan(2, 4500, 21, 11, dtype, last=1)
        yield scan(2, 13001, 9, 16, dtype)
    for dstate in (1, 4, 5, 7, 8, 10, 12, 13):
        yield scan(2, 13001, 9, dstate)
    for dstate in range(1, 17):                         # many channels, rows on the grid; a lane, two or four for some
        yield scan(2, 8501 if dstate % 4 < 2 else 13001, 72, dstate, F16 if dstate % 2 else BF16)
    for dstate in range(11, 17):                        # and two warps of 16 channels for each scheduler
        yield scan(2, 8201, 72, dstate, F16 if dstate % 2 else BF16)
    for channels, dstate in ((13001, 2), (5001, 7), (1500, 12), (13001, 16)):   # and off the grid
        yield scan(2, channels, 277, dstate, F16 if dstate % 2 else BF16)
    name, op, arguments = scan(2, 9001, 264, 7)         # u one row for all, B off the grid
    u, _, _, B, *_ = arguments
    arguments[0], arguments[3] = u[:, :1].expand_as(u), normal(*B.shape[:-1], 265, dtype=BF16)[..., 1:]
    yield f"{name}, one row of u", op, arguments
    for dstate in (9, 16):
        yield scan(2, 5101, 24, dstate)                 # two kinds of CTAs
    for dstate in (4, 8, 12):
        yield scan(2, 4500, 24, dstate)
        yield scan(2, 45, 24, dstate)
    for dstate in (17, 31, 48, 64, 96, 128, 192, 256):
        yield scan(1, 33, 40, dstate)
    yield scan(1, 640, 500, 16)                         # a cluster along L
    yield scan(1, 61, 517, 5, F32)
    yield scan(1, 40, 1, 16)
    yield scan(2, 75, 33, 12, groups=4)
    yield scan(2, 75, 33, 100, groups=4)
    yield scan(2, 45, 40, 12, packed=True)
    yield scan(2, 45, 40, 16, extras=False)


def ssds(dtypes: tuple[torch.dtype, ...]) -> Iterator[Call]:
    def ssd(batch: int, length: int, heads: int, headdim: int, dstate: int, dtype: torch.dtype = BF16, *,
            groups: tuple[int, ...] = (), extras: bool = True, packed: bool = False) -> Call:
        groups = groups or (0,) * heads
        x, z = (normal(batch, length, heads, headdim, dtype=dtype) for _ in "xz")
        B, C = (normal(batch, length, max(groups) + 1, dstate, dtype=dtype) for _ in "BC")
        optional = [normal(heads), z, normal(heads), True, 0.05, 0.4]
        initial = normal(batch, heads, headdim, dstate) if extras else None
        return (f"B{batch} L{length} H{heads} P{headdim} N{dstate} {dtype} G{max(groups) + 1}", "ssd",
                [x, normal(batch, length, heads, dtype=dtype), negative(heads), B, C,
                 *(optional if extras else [None, None, None, True, 0.0, math.inf]),
                 integers(*groups), initial, sequences(batch, length) if packed else None])

    for dtype in dtypes:
        for headdim, dstate in ((64, 128), (60, 100), (61, 101), (56, 104), (48, 96), (13, 5), (32, 64), (64, 256)):
            yield ssd(1, 150, 3, headdim, dstate, dtype, extras=dtype != BF16 or headdim != 64)
    for headdim, dstate in ((1, 1), (64, 80), (64, 17), (128, 128), (256, 192)):
        yield ssd(1, 70, 2, headdim, dstate)
    yield ssd(2, 333, 5, 61, 101, packed=True)
    yield ssd(2, 130, 7, 64, 100, groups=(1, 0, 2, 2, 0, 1, 1))
    yield ssd(1, 130, 4, 56, 104, groups=(0, 0, 1, 1), extras=False)
    for extras in (False, True):                        # y by the copy engine
        yield ssd(2, 150, 3, 56, 101, extras=extras)
    yield ssd(27, 130, 20, 61, 16, extras=False)                     # a large x, which comes by words
    yield ssd(30, 150, 5, 32, 100, extras=False)                     # two heads side by side in a consumer's rows
    yield ssd(20, 150, 7, 16, 128, extras=False)
    yield ssd(34, 130, 4, 48, 100, extras=False)
    yield ssd(1, 1, 4, 64, 128)
    yield ssd(1, 1000, 3, 64, 128)                      # segments
    yield ssd(1, 1000, 140, 8, 64, extras=False)        # of the last heads only
    yield ssd(4, 130, 67, 61, 101, packed=True)         # clusters
    yield ssd(4, 270, 67, 61, 101, extras=False)        # and heads taken in parts
    yield ssd(4, 270, 67, 64, 64, extras=False)
    yield ssd(1, 770, 201, 16, 144, extras=False)       # and in chains
    yield ssd(6, 130, 70, 64, 40, extras=False)         # three on a multiprocessor
    yield ssd(6, 130, 70, 60, 20, extras=False)
    yield ssd(4, 270, 68, 60, 100, extras=False)        # two heads that share pieces of y,
    yield ssd(4, 270, 72, 61, 101, extras=False)        # and some with other pairs


def convolutions() -> Iterator[Call]:
    for dtype in (F32, F16, BF16):
        for last, channels, length, width in ((-1, 61, 63, 3), (1, 61, 63, 4), (-1, 16, 1030, 4), (1, 264, 140, 2),
                                              (1, 263, 140, 4), (1, 5, 2, 4), (-1, 8, 64, 1)):
            x, initial = (normal(2, channels, n, dtype=dtype, last=last) for n in (length, width - 1))
            for state, packed in ((initial, None), (None, sequences(2, length))):
                yield (f"D{channels} L{length} W{width} {dtype} last {last}", "causal_conv1d",
                       [x, normal(channels, width), normal(channels), True, state, packed])
        for last, channels, tokens, width, kept, ring in ((1, 131, 1, 4, 4, False), (1, 64, 3, 4, 3, False),
                                                          (-1, 30, 7, 3, 5, True), (1, 5, 2, 2, 1, True)):
            x, state = (normal(b, channels, n, dtype=dtype, last=last) for b, n in ((3, tokens), (5, kept)))
            yield (f"D{channels} S{tokens} W{width} {dtype} last {last} ring {ring}", "causal_conv1d_update",
                   [x, state, normal(channels, width), normal(channels), True,
                    integers(0, 2, 9) if ring else None, integers(4, -1, 0)])


def norms() -> Iterator[Call]:
    for dtype in (F32, F16, BF16):
        widest = [[4096], [480] * 8] if dtype is F32 else [[5120], [640] * 8]
        for segments in (*widest, [61, 7, 200], [519], [1301, 1302, 1302]):
            for gated in (True, False):
                x, z = (normal(3, sum(segments), dtype=dtype) for _ in "xz")
                yield (f"segments {segments} {dtype} gated {gated}", "gated_rmsnorm",
                       [x, normal(sum(segments)), None, z if gated else None, segments, [1e-5] * len(segments), gated])


def steps() -> Iterator[Call]:
    def tied(heads: int, headdim: int, dstate: int, groups: int, dtype: torch.dtype, state: torch.dtype) -> Call:
        x, z = (normal(3, heads, headdim, dtype=dtype) for _ in "xz")
        B, C = (normal(3, groups, dstate, dtype=dtype) for _ in "BC")
        D, bias = (normal(heads)[:, None].expand(-1, headdim) for _ in range(2))
        return (f"H{heads} P{headdim} N{dstate} {dtype} state {state}", "state_update",
                [normal(5, heads, headdim, dstate, dtype=state), x,
                 normal(3, heads, dtype=dtype)[..., None].expand(-1, -1, headdim),
                 negative(heads)[:, None, None].expand(-1, headdim, dstate), B, C, D, z, bias, True,
                 integers(*torch.randint(groups, (heads,)).tolist()), integers(4, -1, 0)])

    def channels(count: int, dstate: int, dtype: torch.dtype, state: torch.dtype, batch: int = 3) -> Call:
        x, z, dt = (normal(batch, 1, count, dtype=dtype) for _ in range(3))
        B, C = (normal(batch, 1, dstate, dtype=dtype) for _ in "BC")
        return (f"D{count} N{dstate} {dtype} state {state}", "state_update",
                [normal(batch, 1, count, dstate, dtype=state), x, dt, negative(1, count, dstate), B, C,
                 normal(1, count), z, normal(1, count), True, integers(*[0] * count), None])

    for dtype, state in ((BF16, BF16), (BF16, F32), (F32, F32), (F16, F16)):
        for headdim, dstate in ((64, 128), (60, 100), (61, 101), (13, 5)):
            yield tied(3, headdim, dstate, 2, dtype, state)
        for count, dstate in ((129, 16), (75, 5), (61, 256)):
            yield channels(count, dstate, dtype, state)
    yield channels(640, 16, BF16, BF16, 16)


def mixer_steps() -> Iterator[Call]:
    for dtype in (F32, BF16):
        for heads, headdim, groups, dstate in ((4, 16, 2, 32), (7, 13, 1, 101), (3, 64, 1, 128), (5, 16, 1, 0)):
            inner, steps = heads * headdim, heads if dstate else 0
            channels = inner + 2 * groups * dstate
            yield (f"H{heads} P{headdim} N{dstate} {dtype}", "step_mixer",
                   [normal(3, inner + channels + steps + 3, dtype=dtype), normal(5, channels, 4, dtype=dtype, last=1),
                    normal(5, heads, headdim, dstate, dtype=dtype) if dstate else None,
                    normal(channels, 4, dtype=dtype), normal(channels, dtype=dtype), normal(heads) if dstate else None,
                    negative(heads) if dstate else None, normal(heads), normal(inner, dtype=dtype), groups,
                    integers(*torch.randint(groups, (heads,)).tolist()), [inner - 8, 8], [1e-5, 1e-5], False, 0.0,
                    math.inf, None, integers(4, -1, 0)])
        for channels, dstate, rank in ((129, 16, 9), (64, 5, 4)):
            yield (f"D{channels} N{dstate} R{rank} {dtype}", "mamba_inner_step",
                   [normal(3, 2 * channels, dtype=dtype), normal(5, channels, 4, dtype=dtype, last=1),
                    normal(5, channels, dstate, dtype=dtype), normal(channels, 4, dtype=dtype),
                    normal(channels, dtype=dtype), normal(rank + 2 * dstate, channels, dtype=dtype),
                    normal(channels, rank, dtype=dtype), normal(channels), negative(channels, dstate), normal(channels),
                    None, None, integers(4, -1, 0)])


def removed() -> Iterator[Call]:
    for dtype in (F32, F16, BF16):
        for width, length, segments in ((4, 37, [80]), (3, 5, [16, 40, 24]), (2, 140, [640]), (1, 3, []), (4, 1, [80])):
            channels = sum(segments) or 80
            z, x, _ = normal(2, length, 2 * channels + 8, dtype=dtype).split([channels, channels, 8], dim=-1)
            history = normal(2, channels, width - 1, dtype=dtype) if length < 100 else None
            yield (f"C{channels} L{length} W{width} {dtype}", "removed_ssm",
                   [x, z, normal(channels, width), normal(channels), normal(5, channels // 5),
                    normal(channels) if segments else None, segments, [1e-5] * len(segments), False, history])


def calls(backend: str) -> Iterator[Call]:
    """An op that a backend lacks is not called."""
    makers: list[Callable[[], Iterator[Call]]] = [scans, convolutions, norms, steps, mixer_steps, removed]
    for make in makers:
        yield from make()
    yield from ssds((F16, BF16) if backend == "cuda" else (F32, BF16))


@torch.no_grad()
def main(backend: str, only: str = "") -> None:
    """only: part of the name of an op."""
    torch.manual_seed(0)
    torch.empty, torch.empty_like = poisoned(torch.empty), poisoned(torch.empty_like)
    module, count, failed, last = BACKENDS[backend], 0, [], ""
    if reason := module.available():
        sys.exit(f"the {backend} backend cannot run here: {reason}")
    for index, (name, op, arguments) in enumerate(calls(backend)):
        if not hasattr(module, op) or only not in op or index % EVERY[backend]:
            continue
        if op != last:
            print(f"{count} calls, {len(failed)} failed; now {op}", flush=True)
            last = op
        try:
            result = getattr(module, op)(*arguments)
            outputs = [output.cpu() for output in (result if isinstance(result, tuple) else (result,))]
        except RuntimeError as error:
            failed.append(f"{op} {name}: {str(error).splitlines()[0]}")
            continue
        if not all(output.isfinite().all() for output in outputs):
            failed.append(f"{op} {name}: not finite")
        count += 1
    print(*failed, f"{count} calls of {backend}", sep="\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
