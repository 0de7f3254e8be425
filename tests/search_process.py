"""Searches in processes of their own, for test_search.py: shared by torchrun, and killed again and again.

    torchrun --nproc-per-node 2 tests/search_process.py together OUT LOG
    python tests/search_process.py killed OUT LOG KILLS SEED
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from shedder.layout import NormSegment, SSDLayout
from shedder.nn import LanguageModel, ModelConfig
from shedder.prune import Plan, search
from shedder.prune.parallel import torchrun

LAYOUT = SSDLayout(headdim=4, dstate=8, ngroups=2, head_to_group=(0, 0, 0, 0, 1, 1, 1, 1),
                   norm_segments=(NormSegment(16, 1e-5), NormSegment(16, 1e-5)))
LAYERS = 6
TOKENS = torch.randint(0, 32, (400,), generator=torch.Generator().manual_seed(1))


def model() -> LanguageModel:
    torch.manual_seed(2)
    built = LanguageModel(ModelConfig("mamba2", d_model=16, vocab_size=32, layers=(LAYOUT,) * LAYERS)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return built


def plan(log: Path | None) -> Plan:
    return search(model(), TOKENS, {"params": 0.7}, sequences=4, length=64, batch=2, bundle=0.25, progress=False,
                  log=log)


def together(out: Path, log: Path) -> None:
    with torchrun() as workers:
        found = plan(log)
        (out / f"plan.{workers.rank}.json").write_text(found.to_json())


def killed(out: Path, log: Path, kills: int, seed: int) -> None:
    """Forks a search and kills it at random points, so often; then lets it end. Writes how long the log was each time.

    Each is killed within some milliseconds of having written a random number of bytes more than the one before.
    """
    draw = random.Random(seed)
    whole = out / "whole.jsonl"
    (out / "whole.json").write_text(plan(whole).to_json())
    lengths = [0]
    while len(lengths) <= kills:
        child = _fork(out, log)
        until = lengths[-1] + draw.randrange(whole.stat().st_size // (2 * kills))
        while _size(log) < until:
            time.sleep(1e-4)
        time.sleep(draw.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            lengths.append(_size(log))
    os.waitpid(_fork(out, log), 0)
    (out / "lengths.json").write_text(json.dumps(lengths[1:]))


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def _fork(out: Path, log: Path) -> int:
    child = os.fork()
    if child == 0:
        (out / "resumed.json").write_text(plan(log).to_json())
        os._exit(0)
    return child


if __name__ == "__main__":
    torch.set_num_threads(1)                           # of a forked process no other thread is alive
    mode, folder, path, *rest = sys.argv[1:]
    if mode == "together":
        together(Path(folder), Path(path))
    else:
        killed(Path(folder), Path(path), *map(int, rest))
