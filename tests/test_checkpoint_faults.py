"""Faults of files and of the machine: none loses a checkpoint, loads a wrong one, or ends in a traceback."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shedder
from shedder import atomic_folder, checkpoint
from shedder.checkpoint import CheckpointError
from shedder.cli import main
from shedder.layout import NormSegment, RemovedBlock, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, ModelConfig

REPOSITORY = Path(__file__).resolve().parent.parent
SSD = SSDLayout(headdim=4, dstate=6, ngroups=1, head_to_group=(0,) * 3, norm_segments=(NormSegment(12, 1e-5),))
CONFIG = ModelConfig("mamba2", 8, 32, (SSD, RemovedBlock(), SSD))


def build(seed: int, config: ModelConfig = CONFIG) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel(config).eval()
    model.provenance = {"seed": seed}
    return model


@pytest.fixture(name="folder")
def _folder(tmp_path):
    """A checkpoint of every kind of file: config, shards, index, tokenizer."""
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    model = build(0)
    model.tokenizer_folder = source
    model.save_pretrained(tmp_path / "model", max_shard_bytes=1024)
    return tmp_path / "model"


def same_weights(a: LanguageModel, b: LanguageModel) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return a.config == b.config and all(torch.equal(ours[name], theirs[name]) for name in ours)


def refused_or_unchanged(folder: Path, capsys) -> bool:
    """True when the command line refuses the folder as it should; False when it loads what was saved."""
    code = main(["inspect", str(folder)])
    error = capsys.readouterr().err
    if code == 0:
        loaded = shedder.load(folder)
        assert same_weights(loaded, build(0)) and loaded.provenance == {"seed": 0}
        return False
    assert code == 1
    assert error.startswith("shedder: error: ") and error.count("\n") == 1, error
    assert any(path.name in error for path in [folder, *folder.iterdir()]), error
    return True


def damaged(data: bytes, chance: random.Random) -> bytes:
    """One of: cut, a bit flipped, bytes doubled, a run overwritten, emptied."""
    kind, at = chance.randrange(5), chance.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1:]
    if kind == 2:
        return data[:at] + data[at:at + 16] + data[at:]
    if kind == 3:
        return data[:at] + chance.randbytes(8) + data[at + 8:]
    return b""


def test_cut_flipped_or_overwritten_files_are_refused(folder, capsys):
    chance = random.Random(0)
    refused = tried = 0
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for _ in range(40):
            path.write_bytes(damaged(data, chance))
            tried += path.read_bytes() != data
            refused += refused_or_unchanged(folder, capsys)
        path.write_bytes(data)
        path.unlink()
        assert refused_or_unchanged(folder, capsys), path
        path.write_bytes(data)
    assert refused > 0.95 * tried                       # the rest hit blanks of config.json, or a header's metadata
    assert not refused_or_unchanged(folder, capsys)


def test_files_swapped_between_checkpoints_are_refused(folder, tmp_path, capsys):
    other = build(1)
    (tmp_path / "other-tokenizer").mkdir()
    (tmp_path / "other-tokenizer/tokenizer.json").write_text('{"model": {"vocab": {"b": 0, "a": 1}}}')
    other.tokenizer_folder = tmp_path / "other-tokenizer"
    other.save_pretrained(tmp_path / "other", max_shard_bytes=1024)
    names = sorted(os.listdir(folder))
    assert names == sorted(os.listdir(tmp_path / "other"))
    for name in names:
        data = (folder / name).read_bytes()
        shutil.copyfile(tmp_path / "other" / name, folder / name)
        is_index = name.endswith(".index.json")         # equal in both
        assert refused_or_unchanged(folder, capsys) != is_index, name
        (folder / name).write_bytes(data)
    first, second = sorted(folder.glob("model-*"))[:2]
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    assert not refused_or_unchanged(folder, capsys)     # every tensor is there, once, and is the right one
    first.write_bytes(data[1])
    second.write_bytes(data[1])
    assert refused_or_unchanged(folder, capsys)


def test_swapped_layers_are_refused(folder, capsys):
    build(0).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    swapped = {"0": "2", "2": "0"}
    save_file({re.sub(r"layers\.(\d)", lambda match: f"layers.{swapped[match[1]]}", name): tensor
               for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert refused_or_unchanged(folder, capsys)


@pytest.mark.parametrize("is_honest", [True, False])
def test_a_header_that_declares_terabytes_is_refused(is_honest, folder, capsys):
    """With a sparse file of that size, or without."""
    build(0).save_pretrained(folder)
    path, rows = folder / "model.safetensors", 10**11
    header = json.dumps({"backbone.embedding.weight": {"dtype": "F32", "shape": [rows, 8],
                                                       "data_offsets": [0, 32 * rows]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    if is_honest:
        os.truncate(path, 8 + len(header) + 32 * rows)
    assert refused_or_unchanged(folder, capsys)


def test_a_model_that_memory_cannot_hold_is_refused(folder, monkeypatch):
    real = checkpoint.LanguageModel

    def huge(config, device=None, **options):
        if device == "cpu":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8796093022208 bytes")
        return real(config, device, **options)

    monkeypatch.setattr(checkpoint, "LanguageModel", huge)
    with pytest.raises(CheckpointError, match=r"config.json: the model does not fit into this machine's memory"):
        shedder.load(folder)


# ---- foreign folders have no digests, but nothing is allocated, opened or executed on their word alone ----

FOREIGN = ModelConfig("mamba1", 8, 32, (ScanLayout(16, 4, 1),) * 2)
FOREIGN_CONFIG = {"d_model": 8, "n_layer": 2, "vocab_size": 32, "ssm_cfg": {"layer": "Mamba1", "d_state": 4}}


@pytest.fixture(name="foreign")
def _foreign(tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    tensors = {name: tensor.clone() for name, tensor in build(0, FOREIGN).state_dict().items()
               if name != "lm_head.weight"}
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "config.json").write_text(json.dumps(FOREIGN_CONFIG))
    write_index(folder, {name: file for file, part in halves.items() for name in part})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_shards_of_others_are_read(foreign):
    assert same_weights(shedder.load(foreign), build(0, FOREIGN))


@pytest.mark.parametrize("name", ["../b.safetensors", "/etc/passwd", "..", ".", "", "sub/b.safetensors",
                                  "..\\b.safetensors", "b.safetensors\0", ".b.safetensors", "b.safetensors ",
                                  "config.json", "missing.safetensors", "C:b.safetensors"])
def test_an_index_cannot_reach_other_files(name, foreign, capsys):
    shutil.copyfile(foreign / "b.safetensors", foreign.parent / "b.safetensors")
    (foreign / "sub").mkdir()
    shutil.copyfile(foreign / "b.safetensors", foreign / "sub/b.safetensors")
    write_index(foreign, {key: name if file.startswith("b") else file for key, file in read_index(foreign).items()})
    with pytest.raises(CheckpointError, match=r"index.json: weight_map names|config.json: not a file of tensors"):
        shedder.load(foreign)
    assert main(["inspect", str(foreign)]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("change", "message"), [
    (lambda index: index.update({next(iter(index)): "b.safetensors"}), r"weight_map has \S+ in b.saf\S+, it is in a"),
    (lambda index: index.pop(next(iter(index))), r"weight_map has \S+ in no file, it is in a.safetensors"),
    (lambda index: index.update(extra="a.safetensors"), r"weight_map has extra in a.safetensors, it is in none"),
    (lambda index: index.update(extra=3), r"weight_map is not an object of tensor name to file name"),
    (lambda index: index.clear(), r"weight_map is not an object"),
])
def test_an_index_that_lies_is_refused(change, message, foreign):
    index = read_index(foreign)
    change(index)
    write_index(foreign, index)
    with pytest.raises(CheckpointError, match=message):
        shedder.load(foreign)


def test_a_tensor_in_two_shards_is_refused(foreign):
    both = {**load_file(foreign / "a.safetensors"), **load_file(foreign / "b.safetensors")}
    save_file(both, foreign / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"b.safetensors: \S+ is in a.safetensors too"):
        shedder.load(foreign)


@pytest.mark.parametrize("change", [
    {"d_model": 10**9}, {"d_model": 10**30}, {"n_layer": 10**9}, {"n_layer": 10**30}, {"vocab_size": 10**12},
    {"d_model": -8}, {"n_layer": -1}, {"d_model": 8.5}, {"n_layer": True}, {"pad_vocab_size_multiple": 0},
    *({"ssm_cfg": {"layer": layer, **ssm}} for layer in ("Mamba1", "Mamba2") for ssm in (
        {"expand": 10**9}, {"expand": 1e300}, {"expand": float("inf")}, {"expand": float("nan")}, {"d_state": 10**9},
        {"d_conv": 10**9}, {"dt_rank": 10**12}, {"headdim": 1, "expand": 10**12}, {"ngroups": 0}, {"headdim": 0})),
])
def test_huge_and_impossible_sizes_are_refused_before_anything_is_allocated(change, foreign, capsys):
    (foreign / "config.json").write_text(json.dumps({**FOREIGN_CONFIG, **change}))
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"config.json|the layout in config.json"):
        shedder.load(foreign)
    assert time.monotonic() - started < 2
    assert main(["inspect", str(foreign)]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_tensor_that_is_larger_than_its_storage_is_refused(foreign):
    tensors = {**load_file(foreign / "a.safetensors"), **load_file(foreign / "b.safetensors")}
    tensors["backbone.embedding.weight"] = torch.zeros(1).expand(10**9, 10**6)      # four petabytes in four bytes
    for path in foreign.glob("*.safetensors*"):
        path.unlink()
    torch.save(tensors, foreign / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"embedding.weight is \(1000000000, 1000000\), the file holds 4 bytes"):
        shedder.load(foreign)


def test_damaged_pickles_of_others_are_refused_or_load(foreign, capsys):
    tensors = {**load_file(foreign / "a.safetensors"), **load_file(foreign / "b.safetensors")}
    for path in foreign.glob("*.safetensors*"):
        path.unlink()
    path, chance = foreign / "pytorch_model.bin", random.Random(0)
    torch.save(tensors, path)
    data = path.read_bytes()
    codes = set()
    for _ in range(60):
        path.write_bytes(damaged(data, chance))
        codes.add(main(["inspect", str(foreign)]))
        assert "Traceback" not in capsys.readouterr().err
    assert codes <= {0, 1} and 1 in codes


# ---- a machine that fails while it saves ----

def in_fresh_process(script: str, *wrapper: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python without threads, so that it may fork children to kill."""
    paths = [str(Path(__file__).parent), str(REPOSITORY)]
    code = (f"import sys; sys.path[:0] = {paths!r}\nimport os, torch; torch.set_num_threads(1)\n"
            f"from test_checkpoint_faults import *\n{script}")
    return subprocess.run([*wrapper, sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=cwd)


def in_child(run: Callable[[], object]) -> int:
    """A forked process that runs this and exits."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def save_forever(folder: Path, count: int = 10**9) -> None:
    models = [build(seed) for seed in range(3)]
    for number in range(count):
        models[number % 3].save_pretrained(folder, max_shard_bytes=1024)


def kill_savers(folder: Path, kills: int) -> None:
    build(0).save_pretrained(folder)
    chance, seeds = random.Random(0), set()
    for _ in range(kills):
        child = in_child(lambda: save_forever(folder))
        time.sleep(chance.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = shedder.load(folder)
        seeds.add(loaded.provenance["seed"])
        assert same_weights(loaded, build(loaded.provenance["seed"]))
    assert len(seeds) > 1, "no save of the loop was finished"
    build(0).save_pretrained(folder)
    assert os.listdir(folder.parent) == [folder.name]   # and what the killed ones left is swept away


def test_a_killed_save_leaves_one_whole_checkpoint(tmp_path):
    done = in_fresh_process(f"kill_savers(Path({str(tmp_path / 'model')!r}), kills=20)")
    assert done.returncode == 0, done.stderr


STEPS = {"mkdtemp": (atomic_folder.tempfile, "mkdtemp"), "save_file": (checkpoint, "save_file"),
         "exchange": (atomic_folder, "_exchange"), "rename": (os, "rename"), "rmtree": (atomic_folder.shutil, "rmtree")}


def die_at(step: str, is_after: bool, can_exchange: bool) -> None:
    """The next call of that step ends the process, before it or after it."""
    module, name = STEPS[step]
    if not can_exchange:
        atomic_folder._exchange = lambda a, b: False
    real = getattr(module, name)

    def dying(*arguments, **options):
        if is_after:
            real(*arguments, **options)
        os._exit(9)

    setattr(module, name, dying)


def die_at_every_step(parent: Path) -> None:
    """Each call of a save that changes the disk is the last one of its process, once before it and once after it."""
    cases = itertools.product(STEPS, (False, True), (False, True))
    for number, (step, is_after, can_exchange) in enumerate(cases):
        folder = parent / str(number) / "model"
        build(0).save_pretrained(folder)

        def save_and_die(step=step, is_after=is_after, can_exchange=can_exchange, folder=folder):
            die_at(step, is_after, can_exchange)
            build(1).save_pretrained(folder)

        os.waitpid(in_child(save_and_die), 0)
        found = folder
        if not folder.is_dir():                         # between the two renames of a system without exchange
            assert not can_exchange and step == "rename" and is_after
            with pytest.raises(CheckpointError, match="interrupted save left the previous checkpoint at ") as caught:
                shedder.load(folder)
            found = Path(str(caught.value).rsplit(" at ", 1)[1])
        loaded = shedder.load(found)
        assert same_weights(loaded, build(loaded.provenance["seed"]))
        build(2).save_pretrained(folder)
        assert os.listdir(folder.parent) == ["model"] and shedder.load(folder).provenance == {"seed": 2}


def test_a_save_killed_at_each_step_leaves_one_whole_checkpoint(tmp_path):
    done = in_fresh_process(f"die_at_every_step(Path({str(tmp_path)!r}))")
    assert done.returncode == 0, done.stderr


def read_while_two_save(folder: Path) -> None:
    build(0).save_pretrained(folder)
    children = [in_child(lambda: save_forever(folder, 40)) for _ in range(2)]
    codes = []
    while len(codes) < 2:
        child, code = os.waitpid(-1, os.WNOHANG)
        codes += [code] if child else []
        try:
            loaded = shedder.load(folder)
        except CheckpointError:                         # half of the one and half of the other: refused
            continue
        assert same_weights(loaded, build(loaded.provenance["seed"]))
    assert codes == [0, 0] and len(children) == 2
    assert os.listdir(folder.parent) == [folder.name]


def test_two_processes_that_save_at_once_leave_one_whole_checkpoint(tmp_path):
    done = in_fresh_process(f"read_while_two_save(Path({str(tmp_path / 'model')!r}))")
    assert done.returncode == 0, done.stderr


def in_namespace(tmp_path: Path, mount: str, script: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with a mount that only it sees."""
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    return in_fresh_process(script, "unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", cwd=tmp_path)


def test_a_full_disk_loses_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = in_namespace(tmp_path, f"mount -t tmpfs -o size=64k tmpfs {disk}", f"""
build(0).save_pretrained({str(disk / 'model')!r})
failed = 0
for room in range(60, 0, -4):
    with open({str(disk / 'filler')!r}, "wb", buffering=0) as filler:
        try:
            filler.write(bytes(room * 1024))
        except OSError:
            pass
    try:
        build(1).save_pretrained({str(disk / 'model')!r})
    except CheckpointError as error:
        failed += 1
        assert "model: not saved" in str(error) and "No space left" in str(error), error
        assert "what was there is untouched" in str(error), error
        assert sorted(os.listdir({str(disk)!r})) == ["filler", "model"]
        assert same_weights(shedder.load({str(disk / 'model')!r}), build(0))
    else:
        break
assert failed, "there was room for two"
assert same_weights(shedder.load({str(disk / 'model')!r}), build(1))
""")
    assert done.returncode == 0, done.stderr


def test_a_read_only_disk_is_said_to_be_one(tmp_path):
    disk = tmp_path / "disk"
    build(0).save_pretrained(disk / "model")
    done = in_namespace(tmp_path, f"mount --bind {disk} {disk} && mount -o remount,bind,ro {disk}", """
Path("plan.json").write_text('{"version": 1, "family": "mamba2", "layers": {"0": {"block": true}}}')
assert main(["inspect", "disk/model"]) == 0
for target in ("disk/small", "disk/deep/er/small"):
    assert main(["prune", "disk/model", "--plan", "plan.json", "--out", target]) == 1
assert main(["prune", "disk/model", "--plan", "plan.json", "--out", "small"]) == 0
""")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("shedder: error: ") == 2 and done.stderr.count("Read-only file system") == 2
    assert "Traceback" not in done.stderr
    assert not (disk / "small").exists() and same_weights(shedder.load(disk / "model"), build(0))


def test_a_file_size_limit_loses_nothing(tmp_path):
    build(0).save_pretrained(tmp_path / "model")
    done = in_fresh_process(f"""
import resource
model = build(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    model.save_pretrained({str(tmp_path / 'model')!r})
except ValueError as error:
    print(error)
""")
    assert "model: not saved" in done.stdout and "File too large" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == ["model"] and same_weights(shedder.load(tmp_path / "model"), build(0))
