"""Measured time: three clocks, and the latency of a whole language model on this machine.

gpu    median replay of a CUDA graph over rotated inputs, the kernels alone; where capture fails,
       the sum of kernel times that the profiler saw
wall   back-to-back host calls with one synchronisation at the end: what a user without graphs waits
step   synchronised host time of one call: a prefill, or one decode step of a model
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from shedder.nn import LanguageModel

Call = Callable[[], object]


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


# ---- the gpu clock


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One graph that holds every call once; raises what the capture raises."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def _kernel_seconds(calls: Sequence[Call], rounds: int) -> float:
    """Kernel time of one call by the profiler, the gaps between launches left out."""
    from torch.profiler import ProfilerActivity, profile

    for call in calls:
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(rounds):
            for call in calls:
                call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in trace.key_averages()) * 1e-6 / (rounds * len(calls))


def gpu_clock(sides: Sequence[Sequence[Call]], budget_s: float = 0.3, rounds: int = 50) -> tuple[list[float], str]:
    """Seconds of GPU time of one call of each side, and how they were taken ("graph", or "profiler: why").

    A side is a list of calls, the same work on different buffers: together larger than the L2
    cache, or small shapes are measured warm. Sides are replayed in turn, so that a drifting clock
    meets all of them. If one side cannot be captured, all are taken from the profiler.
    """
    try:
        graphs = [_captured(calls) for calls in sides]
    except Exception as error:                          # whatever a foreign op does under capture
        torch.cuda.synchronize()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return [_kernel_seconds(calls, 5) for calls in sides], f"profiler: {reason}"
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for graph in graphs:
        for _ in range(2):
            _replay_seconds(graph, begin, end)
    times: list[list[float]] = [[] for _ in sides]
    started = time.perf_counter()
    for round_ in range(rounds):
        for seconds, graph in zip(times, graphs, strict=True):
            seconds.append(_replay_seconds(graph, begin, end))
        if round_ >= 4 and time.perf_counter() - started > budget_s * len(sides):
            break
    return [statistics.median(seconds) / len(calls) for seconds, calls in zip(times, sides, strict=True)], "graph"


def copy_seconds(moved: float, device: torch.device | str = "cuda", copies: int = 30) -> float:
    """Seconds of one device-to-device copy that moves `moved` bytes, read and written, from and to cold memory.

    Queued back to back between two events and not replayed from a graph: a graph turns the copy into
    a copy node, which reached 2.7 TB/s on an H200 where the queued copy reaches 4.2.
    """
    size = max(int(moved / 2), 16)
    pairs = max(2, min(64, math.ceil(3 * l2_bytes(device) / (2 * size))))
    buffers = [torch.empty(2, size, dtype=torch.uint8, device=device).random_() for _ in range(pairs)]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        torch.cuda._sleep(2_000_000)                    # the host queues ahead meanwhile
        begin.record()
        for index in range(copies):
            target, source = buffers[index % pairs]
            target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) * 1e-3 / copies)
    return statistics.median(seconds)


def copy_rate(device: torch.device | str = "cuda", gibibytes: float = 1.0) -> float:
    """Bytes per second of a large device-to-device copy, bytes read and bytes written both counted."""
    moved = 2 * gibibytes * 2 ** 30
    return moved / copy_seconds(moved, device, copies=10)


def l2_bytes(device: torch.device | str = "cuda") -> int:
    """Bytes of a GPU's L2 cache; 0 on a CPU, where nothing is rotated."""
    if torch.device(device).type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


# ---- the wall and step clocks, on any device


def wall_clock(call: Call, device: torch.device | str, calls: int = 200, budget_s: float = 2.0) -> float:
    """Host seconds of one of `calls` back-to-back calls with one synchronisation at the end.

    Fewer calls where they would take longer than `budget_s`.
    """
    for _ in range(3):
        call()
    synchronize(device)
    once = step_clock(call, device, repeats=1)
    calls = max(5, min(calls, int(budget_s / max(once, 1e-9))))
    started = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def step_clock(call: Call, device: torch.device | str, repeats: int = 10, warmup: int = 1) -> float:
    """Median of the synchronised host seconds of one call."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


# ---- a whole model


@dataclass(frozen=True)
class Latency:
    """What one model costs on this machine; medians."""

    device: str
    dtype: str
    threads: int
    batch: int
    prompt: int
    prefill_ms: float
    decode_ms: float                                    # per token and call, whatever the batch
    tokens_per_second: float                            # of decode, over the batch

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def measure(model: LanguageModel, *, batch: int = 1, prompt: int = 512, tokens: int = 32, repeats: int = 5) -> Latency:
    """Prefill of `prompt` tokens and decode steps after it, logits of the last token only.

    Prefill is the median over `repeats` fresh states. Decode is the median over `tokens` single
    steps that continue one sequence, each fed the most likely token, so that its cost includes
    what any generation loop pays.
    """
    for name, value in (("batch", batch), ("prompt", prompt), ("tokens", tokens), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} is {value}; accepted: an integer >= 1")
    weight = next(model.parameters())
    device = weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator).to(device)

    def prefill() -> tuple[Tensor, Any]:
        state = model.allocate_state(batch)
        return model(ids, state=state, last_only=True), state

    prefill_s = step_clock(prefill, device, repeats=repeats)
    logits, state = prefill()

    def step() -> None:
        nonlocal logits
        logits = model(logits[:, -1:].argmax(-1), state=state, last_only=True)

    decode_s = step_clock(step, device, repeats=tokens, warmup=3)
    return Latency(device=str(device), dtype=str(weight.dtype).removeprefix("torch."), threads=torch.get_num_threads(),
                   batch=batch, prompt=prompt, prefill_ms=prefill_s * 1e3, decode_ms=decode_s * 1e3,
                   tokens_per_second=batch / decode_s)


def compare(models: dict[str, LanguageModel], *, batch: int = 1, prompt: int = 512, tokens: int = 32,
            rounds: int = 3) -> dict[str, Latency]:
    """The latency of several models, measured in turn `rounds` times; of each the round that was disturbed least."""
    seen: dict[str, list[Latency]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            seen[name].append(measure(model, batch=batch, prompt=prompt, tokens=tokens, repeats=3))
    result = {}
    for name, runs in seen.items():
        decode_ms = min(run.decode_ms for run in runs)
        result[name] = Latency(**{**asdict(runs[0]), "decode_ms": decode_ms,
                                  "prefill_ms": min(run.prefill_ms for run in runs),
                                  "tokens_per_second": batch / decode_ms * 1e3})
    return result
