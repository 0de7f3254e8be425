"""Our checkpoints: what is written is read back, anything else is refused by file and key, and saving loses nothing."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shedder
from shedder import atomic_folder, checkpoint
from shedder.checkpoint import CheckpointError
from shedder.layout import NormSegment, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, ModelConfig

REPOSITORY = Path(__file__).resolve().parent.parent
SSD = SSDLayout(headdim=8, dstate=12, ngroups=2, head_to_group=(1, 0, 1, 1, 0),
                norm_segments=(NormSegment(16, 1e-5), NormSegment(24, 1.5e-5)), row_padding=3)
SSM_GONE = RemovedSSM(nheads=3, headdim=8, norm_segments=(NormSegment(24, 1e-5),))
CONFIGS = {
    "mamba2": ModelConfig("mamba2", 24, 50, (SSD, SSM_GONE, RemovedBlock(), SSD), dt_limit=(0.01, 0.5)),
    "mamba1": ModelConfig("mamba1", 24, 50, (ScanLayout(20, 8, 3), RemovedSSM(13, 1), RemovedBlock(),
                                             ScanLayout(13, 5, 2, 3, tuple(c % 2 for c in range(13)))),
                          tie_embeddings=False),
}
IN_PROJ = "backbone.layers.0.mixer.in_proj.weight"


def build(name="mamba2", dtype=torch.float32):
    torch.manual_seed(0)
    return LanguageModel(CONFIGS[name], dtype=dtype).eval()


@pytest.fixture(name="folder")
def _folder(tmp_path):
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def same(a, b):
    assert a.config == b.config
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def edit(folder, change, honest=True):
    """Rewrite config.json; with honest=True its digest too, so that only its contents can be objected to."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    if honest:
        config["digest"] = checkpoint._config_digest(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change, honest=True):
    """Rewrite the weights; with honest=True their digests too, so that only the layout can object."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    if honest:
        edit(folder, lambda config: config.update(
            tensors={name: checkpoint._digest(tensor) for name, tensor in tensors.items()}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_loaded(name, dtype, tmp_path):
    model = build(name, dtype)
    model.plan, model.provenance = {"layers": {"2": {"block": True}}}, {"from": "a test"}
    model.tokenizer_name = "bytes"
    model.save_pretrained(tmp_path / "model")
    loaded = shedder.load(tmp_path / "model")
    same(loaded, model)
    assert (loaded.plan, loaded.provenance, loaded.tokenizer_name) == (model.plan, model.provenance, "bytes")
    assert not loaded.training


def test_a_tied_head_is_stored_once(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = shedder.load(folder)
    assert loaded.lm_head.weight is loaded.backbone.embedding.weight


SCRIPT = """
import sys, torch, shedder
source, target, logits = sys.argv[1:]
model = shedder.load(source)
with torch.no_grad():
    torch.save(model(torch.arange(12).view(2, 6)), logits)
model.save_pretrained(target)
"""


@pytest.mark.parametrize("name", CONFIGS)
def test_two_round_trips_through_fresh_processes_change_nothing(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "0")
    with torch.no_grad():
        expected = model(torch.arange(12).view(2, 6))
    for i in (0, 1):
        subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / f"{i}"), str(tmp_path / f"{i + 1}"),
                        str(tmp_path / "logits")], check=True, cwd=REPOSITORY)
        assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), expected)
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / f"{i + 1}" / file).read_bytes() == (tmp_path / "0" / file).read_bytes()


def test_after_an_optimiser_step_it_is_still_pruned(folder, tmp_path):
    model = shedder.load(folder).train()
    ids = torch.randint(0, 50, (2, 9))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimiser.step()
    model.save_pretrained(folder)
    loaded = shedder.load(folder)
    same(loaded, model)
    assert loaded.config == CONFIGS["mamba2"]
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in build().parameters())
    assert not torch.equal(loaded.mixers[0].in_proj.weight, build().mixers[0].in_proj.weight)


def test_load_casts_and_keeps_decay(folder):
    loaded = shedder.load(folder, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.mixers[0].A_log, build().mixers[0].A_log)
    with pytest.raises(ValueError, match=r"dtype is torch.int8; accepted"):
        shedder.load(folder, dtype=torch.int8)


# ---- each kind of damage names its file and key ----

DAMAGED_CONFIGS = {
    "newer version": (lambda c: c.update(version=3), r"config.json: version is 3, written by a newer shedder"),
    "older version": (lambda c: c.update(version=1), r"config.json: version is 1; accepted: 2"),
    "odd version": (lambda c: c.update(version="2"), r"config.json: version is '2'; accepted: 2"),
    "true": (lambda c: c.update(version=True), r"config.json: version is True; accepted: 2"),
    "foreign": (lambda c: c.update(format="other"), r"config.json: format is 'other'; accepted"),
    "field gone": (lambda c: c.pop("plan"), r"config.json: plan is missing"),
    "field too many": (lambda c: c.update(extra=1), r"config.json: extra is not known"),
    "dtype": (lambda c: c.update(dtype="int8"), r"config.json: dtype is 'int8'"),
    "model is a list": (lambda c: c.update(model=[]), r"config.json: model is a list"),
    "model field": (lambda c: c["model"].pop("d_model"), r"config.json: model: model config has fields"),
    "d_model": (lambda c: c["model"].update(d_model=0), r"config.json: model: d_model is 0"),
    "layer kind": (lambda c: c["model"]["layers"][3].update(kind="?"), r"model: layers\[3\]: kind is '\?'"),
    "head map": (lambda c: c["model"]["layers"][0].update(head_to_group=[0, 0, 9, 1, 0]),
                 r"config.json: model: layers\[0\]: head_to_group is 9"),
    "segments": (lambda c: c["model"]["layers"][1].update(norm_segments=[{"channels": 23, "eps": 1e-5}]),
                 r"config.json: model: layers\[1\]: sum of norm_segments channels is 23"),
    "row padding": (lambda c: c["model"]["layers"][0].update(row_padding=8),
                    r"model.safetensors: backbone.layers.0.mixer.in_proj.weight is \(136, 24\), "
                    r"the layout in config.json says \(141, 24\)"),
    "dtype of tensors": (lambda c: c.update(dtype="float64"), r"model.safetensors: backbone.embedding.weight is "
                         r"torch.float32, config.json says torch.float64"),
    "a layer more": (lambda c: c["model"]["layers"].append(c["model"]["layers"][0]),
                     r"model.safetensors: backbone.layers.4.\S+ is missing"),
    "a layer less": (lambda c: c["model"]["layers"].pop(),
                     r"model.safetensors: backbone.layers.3.\S+ .*is not in the layout"),
    "layers beyond counting": (lambda c: c["model"].update(layers=[{"kind": "removed_block"}] * 10_001),
                               r"config.json: model has 10001 layers; accepted: up to 10000"),
    "terabytes": (lambda c: c["model"].update(d_model=10**9), r"is \(50, 24\), the layout .* says \(50, 1000000000\)"),
    "beyond 64 bits": (lambda c: c["model"].update(d_model=10**18, vocab_size=10**18),
                       r"config.json: model has sizes that no tensor can have"),
    "beyond any integer": (lambda c: c["model"].update(d_model=10**40), r"config.json: model has sizes that no"),
    "weights elsewhere": (lambda c: c.update(weights=["../model.safetensors"]), r"config.json: weights lists '../"),
    "no weights": (lambda c: c.update(weights=[]), r"backbone.embedding.weight is missing"),
    "weights twice": (lambda c: c.update(weights=["model.safetensors"] * 2), r"is in model.safetensors too"),
    "files elsewhere": (lambda c: c.update(files={"/etc/passwd": ""}), r"config.json: files lists '/etc/passwd'"),
    "file gone": (lambda c: c.update(files={"tokenizer.json": ""}), r"config.json: files lists 'tokenizer.json'"),
    "untied": (lambda c: c["model"].update(tie_embeddings=False), r"model.safetensors: lm_head.weight is missing"),
}


@pytest.mark.parametrize("kind", DAMAGED_CONFIGS)
def test_a_config_that_does_not_fit_is_refused(kind, folder):
    change, message = DAMAGED_CONFIGS[kind]
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        shedder.load(folder)


def test_a_config_changed_by_hand_is_refused(folder):
    edit(folder, lambda c: c["model"].update(norm_eps=1e-6), honest=False)
    with pytest.raises(CheckpointError, match=r"config.json: does not match its own digest"):
        shedder.load(folder)


def test_indentation_and_order_of_the_config_do_not_matter(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    same(shedder.load(folder), build())


DAMAGED_TENSORS = {
    "missing": (lambda t: t.pop(IN_PROJ), rf"model.safetensors: {IN_PROJ} is missing"),
    "extra": (lambda t: t.update(extra=torch.zeros(2)), r"model.safetensors: extra is not in the layout"),
    "shape": (lambda t: t.update({IN_PROJ: t[IN_PROJ][:-1].clone()}),
              rf"model.safetensors: {IN_PROJ} is \(135, 24\), the layout in config.json says \(136, 24\)"),
    "dtype": (lambda t: t.update({IN_PROJ: t[IN_PROJ].half()}), rf"{IN_PROJ} is torch.float16"),
    "rounded decay": (lambda t: t.update({"backbone.layers.0.mixer.A_log":
                                          t["backbone.layers.0.mixer.A_log"].bfloat16()}),
                      r"A_log is torch.bfloat16, config.json says torch.float32"),
}


@pytest.mark.parametrize("kind", DAMAGED_TENSORS)
def test_tensors_that_do_not_fit_are_refused(kind, folder):
    change, message = DAMAGED_TENSORS[kind]
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        shedder.load(folder)


def test_a_changed_value_is_noticed(folder):
    def flip(tensors):
        tensors[IN_PROJ][7, 3] += 1e-3

    edit_tensors(folder, flip, honest=False)
    with pytest.raises(CheckpointError, match=rf"model.safetensors: {IN_PROJ} does not match its digest"):
        shedder.load(folder)


def damaged_files(data):
    yield "empty", b""
    yield "header only", data[:8]
    yield "cut in the header", data[:100]
    yield "cut in the tensors", data[:-100]
    yield "last byte gone", data[:-1]
    yield "longer", data + b"x"
    yield "pickle", pickle.dumps({"a": 1})
    yield "text", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    yield "huge header", struct.pack("<Q", 1 << 60) + data[8:]


def test_a_damaged_weights_file_is_refused(folder):
    path = folder / "model.safetensors"
    for kind, damaged in damaged_files(path.read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model.safetensors: not a complete safetensors file"):
            pytest.fail(f"loaded: {kind}, {shedder.load(folder)}")
    torch.save(build().state_dict(), path)              # a pickle under the name of a safetensors file
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a complete safetensors file"):
        shedder.load(folder)


def test_a_pickle_beside_the_config_is_not_looked_at(folder):
    """Our format never falls back to pytorch_model.bin."""
    (folder / "model.safetensors").unlink()
    torch.save(build().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model.safetensors: missing"):
        shedder.load(folder)


@pytest.mark.parametrize(("text", "message"), [
    (b"", "not JSON"), (b"{\"format\": ", "not JSON"), (b"[]", "holds a list"), (b"\xff\xfe", "not JSON"),
    (b"{}", r"the keys are \[\]; accepted"),
])
def test_a_config_that_is_none_is_refused(text, message, folder):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"config.json: .*{message}"):
        shedder.load(folder)


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: not a folder"):
        shedder.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config.json: missing"):
        shedder.load(tmp_path)


# ---- saving ----

def test_saving_replaces_the_checkpoint_and_leaves_nothing_else(folder):
    (folder / "README.md").write_text("mine")
    other = build("mamba1")
    other.save_pretrained(folder)
    same(shedder.load(folder), other)
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert os.listdir(folder.parent) == ["model"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize(("module", "step"), [(checkpoint, "save_file"), (atomic_folder, "_sync"),
                                              (atomic_folder, "_replace")])
def test_a_failed_save_keeps_the_previous_checkpoint(module, step, exchange, folder, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    if not exchange:
        monkeypatch.setattr(atomic_folder, "_exchange", lambda a, b: False)
    monkeypatch.setattr(module, step, fail)
    with pytest.raises(CheckpointError, match=r"model: not saved \(disk full\); what was there is untouched"):
        build("mamba1").save_pretrained(folder)
    same(shedder.load(folder), build())
    assert os.listdir(folder.parent) == ["model"]


def test_where_folders_cannot_be_exchanged_two_renames_do(folder, monkeypatch):
    monkeypatch.setattr(atomic_folder, "_exchange", lambda a, b: False)
    build("mamba1").save_pretrained(folder)
    same(shedder.load(folder), build("mamba1"))
    assert os.listdir(folder.parent) == ["model"]

    real = os.rename

    def second_fails(source, target):
        if Path(target) == folder and ".new-" in str(source):
            raise OSError("interrupted")
        real(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(CheckpointError, match="interrupted"):
        build().save_pretrained(folder)
    same(shedder.load(folder), build("mamba1"))


def test_an_interrupted_exchange_says_where_the_checkpoint_is(folder):
    os.rename(folder, folder.with_name(".model.old-123"))
    with pytest.raises(CheckpointError, match=r"left the previous checkpoint at .*\.model\.old-123"):
        shedder.load(folder)


def test_other_peoples_folders_are_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"not empty and not a shedder checkpoint; nothing was written"):
        build().save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(CheckpointError, match=r"exists and is not a folder"):
        build().save_pretrained(tmp_path / "thesis.tex")


def test_a_model_that_left_its_layout_is_not_saved(tmp_path):
    model = build()
    model.mixers[0].in_proj.weight = torch.nn.Parameter(torch.zeros(135, 24))
    with pytest.raises(CheckpointError, match=rf"the model: {IN_PROJ} is \(135, 24\)"):
        model.save_pretrained(tmp_path / "model")
    model = build()
    model.provenance = {"when": float("nan")}
    with pytest.raises(CheckpointError, match=r"does not fit into JSON"):
        model.save_pretrained(tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_tokenizer_files_come_along(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    model = shedder.load(folder)
    model.save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "copy")            # also onto itself
    assert sorted(os.listdir(tmp_path / "copy")) == ["config.json", "model.safetensors", "tokenizer.json",
                                                     "tokenizer_config.json"]
    (tmp_path / "copy/tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: does not match its digest in config.json"):
        shedder.load(tmp_path / "copy")


def test_other_peoples_files_stay_themselves(folder):
    (folder / "optimizer.safetensors").write_bytes(b"mine")
    (folder / "logs").mkdir()
    with (folder / "logs/train.log").open("w") as log:
        build().save_pretrained(folder)
        log.write("still the same file")
    assert (folder / "logs/train.log").read_text() == "still the same file"
    assert (folder / "optimizer.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("name", CONFIGS)
def test_shards_are_written_with_their_index_and_read_back(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "model", max_shard_bytes=4096)
    files = sorted(os.listdir(tmp_path / "model"))
    shards = [file for file in files if file.startswith("model-")]
    assert files == ["config.json", *shards, "model.safetensors.index.json"]
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    stored = {key: file for file in shards for key in load_file(tmp_path / "model" / file)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == sum(p.numel() * p.element_size() for p in model.parameters())
    for file in shards:
        keys = [key for key in stored if stored[key] == file]
        size = sum(model.get_parameter(key).nbytes for key in keys)
        assert size <= 4096 or len(keys) == 1
    same(shedder.load(tmp_path / "model"), model)
    model.save_pretrained(tmp_path / "model")           # one file takes the place of all
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match="max_shard_bytes is 0; accepted: an integer >= 1"):
        model.save_pretrained(tmp_path / "model", max_shard_bytes=0)
