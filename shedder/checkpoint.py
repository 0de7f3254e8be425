"""Reading and writing checkpoints: our own folders strictly, foreign ones through the families' adapters.

Our format: safetensors files, and config.json with the fields of FIELDS. The layouts in it say which
tensors there are and of which shape; nothing is encoded by a missing key. Digests (SHA-256) of every
tensor, of every other file that belongs to the checkpoint and of config.json itself make sure that
what is loaded is what was saved. Our folders are never read from a pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from shedder.atomic_folder import left_behind, link_or_copy, replacement
from shedder.layout import LayoutError
from shedder.models import find_source
from shedder.models.family import CheckpointError
from shedder.nn import LanguageModel, ModelConfig
from shedder.text import TOKENIZER_FILES
from shedder.weight_files import INDEX_SUFFIX, WEIGHTS, Declared, WeightFiles, is_plain_name, open_weights, read_json

__all__ = ["CheckpointError", "check_target", "expected_tensors", "load", "save_pretrained"]

FORMAT, VERSION = "shedder", 2
CONFIG = "config.json"
FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": str, "version": int, "dtype": str, "model": dict,
    "tokenizer": (str, type(None)),                     # "bytes", or null for the tokenizer files of the folder
    "plan": (dict, type(None)), "provenance": dict,
    "weights": list,                                    # the safetensors files
    "tensors": dict, "files": dict,                     # digest by name: of tensors, of the other files
    "digest": str,                                      # of all of the above
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TIED, EMBEDDING = "lm_head.weight", "backbone.embedding.weight"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
MAX_LAYERS = 10_000
MAX_SHARD_BYTES = 5_000_000_000


# ---- loading ----

def load(folder: str | Path, device: torch.device | str | None = None,
         dtype: torch.dtype | None = None) -> LanguageModel:
    """A language model from a folder that shedder, mamba_ssm or transformers wrote.

    Args:
        folder: with config.json and the weights.
        device: where the model goes; default CPU.
        dtype: cast the weights (A_log, D and dt_bias stay fp32); default as stored.
    Raises:
        CheckpointError: naming the file and key that is wrong, what it is and what was expected.
    """
    folder = Path(folder)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}; accepted: one of {tuple(DTYPES.values())}")
    if not folder.is_dir():
        old = left_behind(folder)
        raise CheckpointError(f"{folder}: not a folder"
                              + (f"; an interrupted save left the previous checkpoint at {old}" if old else ""))
    config = read_json(folder / CONFIG)
    try:
        model = _load_own(folder, config) if config.get("format") == FORMAT else _load_foreign(folder, config)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        model.tokenizer_folder = folder
    if device is not None or dtype is not None:
        model.to(device=device, dtype=dtype)
    return model.eval()


def expected_tensors(config: ModelConfig, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor that a model of this config stores; a tied head is stored once."""
    skeleton = LanguageModel(config, device="meta", dtype=dtype, initialise=False)
    return {name: (tuple(parameter.shape), parameter.dtype) for name, parameter in skeleton.named_parameters()}


def _expected(config: ModelConfig, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    if len(config.layers) > MAX_LAYERS:
        raise CheckpointError(f"{CONFIG}: model has {len(config.layers)} layers; accepted: up to {MAX_LAYERS}")
    try:
        return expected_tensors(config, dtype)
    except (RuntimeError, TypeError, OverflowError) as error:       # sizes beyond 64 bits
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{CONFIG}: model has sizes that no tensor can have ({reason})") from error


def _allocated(config: ModelConfig, dtype: torch.dtype) -> LanguageModel:
    try:
        return LanguageModel(config, dtype=dtype, device="cpu", initialise=False)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        raise CheckpointError(f"{CONFIG}: the model does not fit into this machine's memory ({reason})") from error


def _load_own(folder: Path, data: dict[str, Any]) -> LanguageModel:
    path = folder / CONFIG
    _check_fields(path, data)
    try:
        config = ModelConfig.from_json(data["model"])
    except (LayoutError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: model: {error}") from error
    for name, digest in data["files"].items():
        if not is_plain_name(name) or not (folder / name).is_file():
            raise CheckpointError(f"{path}: files lists {name!r}, which is not a file in the folder")
        if _file_digest(folder / name) != digest:
            raise CheckpointError(f"{folder / name}: does not match its digest in {CONFIG}; it was damaged or changed")
    for name in data["weights"]:
        if not isinstance(name, str) or not is_plain_name(name) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: weights lists {name!r}; accepted: names of safetensors files in the folder")
    dtype = DTYPES[data["dtype"]]
    expected = _expected(config, dtype)
    with WeightFiles([folder / name for name in data["weights"]]) as weights:
        # Everything is compared before anything is allocated.
        _check_names(", ".join(data["weights"]), set(weights.declared), set(expected))
        for name, (shape, tensor_dtype) in expected.items():
            _check_shape(name, weights.declared[name], shape)
            if weights.declared[name].dtype != tensor_dtype:
                raise CheckpointError(f"{weights.declared[name].file}: {name} is {weights.declared[name].dtype}, "
                                      f"{CONFIG} says {tensor_dtype}")
        model = _allocated(config, dtype)
        for name in expected:
            tensor = weights.read(name)
            if data["tensors"].get(name) != _digest(tensor):
                raise CheckpointError(f"{weights.declared[name].file}: {name} does not match its digest in {CONFIG}; "
                                      "the file is damaged or belongs to another checkpoint")
            with torch.no_grad():
                model.get_parameter(name).copy_(tensor)
    model.tokenizer_name, model.plan, model.provenance = data["tokenizer"], data["plan"], data["provenance"]
    return model


def _check_fields(path: Path, data: dict[str, Any]) -> None:
    version = data.get("version")
    if version != VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > VERSION
        raise CheckpointError(f"{path}: version is {version!r}{', written by a newer shedder' if newer else ''}; "
                              f"accepted: {VERSION}")
    wrong = sorted(set(data) ^ set(FIELDS))
    if wrong:
        raise CheckpointError(f"{path}: {wrong[0]} is {'missing' if wrong[0] in FIELDS else 'not known'}; "
                              f"accepted: exactly {sorted(FIELDS)}")
    for field, kinds in FIELDS.items():
        if not isinstance(data[field], kinds):
            names = [kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,))]
            raise CheckpointError(f"{path}: {field} is a {type(data[field]).__name__}; accepted: {' or '.join(names)}")
    if data["digest"] != _config_digest(data):
        raise CheckpointError(f"{path}: does not match its own digest; it was damaged or changed by hand")
    if data["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: dtype is {data['dtype']!r}; accepted: one of {sorted(DTYPES)}")


def _load_foreign(folder: Path, data: dict[str, Any]) -> LanguageModel:
    _, source = find_source(data)
    with open_weights(folder) as weights:
        declared: dict[str, Declared] = {}
        theirs: dict[str, str] = {}                     # their name of each of our tensors
        for name, one in weights.declared.items():
            ours = source.rename(name)
            if ours in declared:
                raise CheckpointError(f"{one.file}: {name} is {theirs[ours]} once more")
            declared[ours], theirs[ours] = one, name
        for key in ("n_layer", "num_hidden_layers"):
            if isinstance(data.get(key), int) and data[key] > len(declared):
                raise CheckpointError(f"{CONFIG}: {key} is {data[key]}; the weights hold {len(declared)} tensors")
        try:
            config = source.read_config(data)
        except CheckpointError:
            raise
        except (LayoutError, ArithmeticError) as error: # sizes that no model has
            raise CheckpointError(f"{CONFIG}: {error}") from error
        embedding = declared.get(EMBEDDING)
        dtype = torch.float32 if embedding is None else embedding.dtype
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{declared[EMBEDDING].file}: {EMBEDDING} is {dtype}; "
                                  f"accepted: one of {tuple(DTYPES.values())}")
        expected = _expected(config, dtype)
        is_stored_twice = config.tie_embeddings and TIED in declared
        _check_names(embedding.file if embedding else WEIGHTS, set(declared) - ({TIED} if is_stored_twice else set()),
                     set(expected))
        for name, (shape, _) in expected.items():
            _check_shape(name, declared[name], shape)
            if not isinstance(declared[name].dtype, torch.dtype):
                raise CheckpointError(f"{declared[name].file}: {name} is {declared[name].dtype}; "
                                      "accepted: a floating type")
        model = _allocated(config, dtype)
        with torch.no_grad():
            for name in expected:
                tensor = weights.read(theirs[name])
                if name == EMBEDDING and is_stored_twice and not torch.equal(tensor, weights.read(theirs[TIED])):
                    raise CheckpointError(f"{declared[TIED].file}: {TIED} differs from {EMBEDDING}, "
                                          f"{CONFIG} says they are tied")
                model.get_parameter(name).copy_(tensor)
    model.provenance = {"source": source.name, "source_folder": folder.name}
    return model


def _check_names(file: str, found: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{file}: {missing[0]} is missing{more}; the layout in {CONFIG} asks for it")
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise CheckpointError(f"{file}: {extra[0]}{more} is not in the layout in {CONFIG}")


def _check_shape(name: str, declared: Declared, expected: tuple[int, ...]) -> None:
    if declared.shape != expected:
        raise CheckpointError(f"{declared.file}: {name} is {declared.shape}, the layout in {CONFIG} says {expected}")


# ---- digests ----

def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"").hexdigest()


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _config_digest(data: Mapping[str, Any]) -> str:
    """Of the contents, not of the text: indentation and the order of keys do not matter."""
    rest = {name: value for name, value in data.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# ---- saving ----

def save_pretrained(model: LanguageModel, folder: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the model as a shedder checkpoint, all of it or nothing.

    The files are written to a temporary folder beside `folder` and moved there in one step; an
    existing checkpoint is replaced and, if anything fails, kept. Tokenizer files of the folder
    that the model was loaded from come along, and so do files that others put beside the checkpoint.

    Args:
        folder: a new folder, an empty one, or a shedder checkpoint to replace.
        max_shard_bytes: weights beyond this go into several files, with the index that transformers writes.
    Raises:
        CheckpointError: it could not be written, and why.
    """
    folder = Path(folder).absolute()
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes!r}; accepted: an integer >= 1")
    tensors, dtype_name = _checked_tensors(model)
    shards = _shards(tensors, max_shard_bytes)
    config = {"format": FORMAT, "version": VERSION, "dtype": dtype_name, "model": model.config.to_json(),
              "tokenizer": model.tokenizer_name, "plan": model.plan, "provenance": model.provenance,
              "weights": list(shards), "tensors": {name: _digest(tensor) for name, tensor in tensors.items()},
              "files": {}}
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"plan or provenance does not fit into JSON ({error})") from error
    before = _identity(folder)
    try:
        check_target(folder)
        with replacement(folder) as new:
            _write(model, new, tensors, shards, config)
            if folder.is_dir():
                _carry_over(folder, new)
    except (OSError, SafetensorError, shutil.Error) as error:
        kept = before is not None and _identity(folder) == before
        raise CheckpointError(f"{folder}: not saved ({error})"
                              + ("; what was there is untouched" if kept else "")) from error
    if model.tokenizer_folder is not None:
        model.tokenizer_folder = folder


def _checked_tensors(model: LanguageModel) -> tuple[dict[str, Tensor], str]:
    """The tensors on the CPU and the name of the model's dtype, if they are what the model's config says."""
    dtype_name = next((name for name, dtype in DTYPES.items() if dtype == model.dtype), None)
    if dtype_name is None:
        raise CheckpointError(f"the model's dtype is {model.dtype}; accepted: one of {sorted(DTYPES)}")
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    expected = expected_tensors(model.config, model.dtype)
    _check_names("the model", set(tensors), set(expected))
    for name, (shape, dtype) in expected.items():
        _check_shape(name, Declared("the model", tuple(tensors[name].shape), tensors[name].dtype), shape)
        if tensors[name].dtype != dtype:
            raise CheckpointError(f"the model: {name} is {tensors[name].dtype}, a model of {model.dtype} has it as "
                                  f"{dtype}")
    return tensors, dtype_name


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> dict[str, list[str]]:
    """The names of the tensors in each file, in order; a larger tensor gets a file of its own."""
    runs: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if runs[-1] and size + tensor.nbytes > max_bytes:
            runs.append([])
            size = 0
        runs[-1].append(name)
        size += tensor.nbytes
    if len(runs) == 1:
        return {WEIGHTS: runs[0]}
    stem = WEIGHTS.removesuffix(".safetensors")
    return {f"{stem}-{number:05d}-of-{len(runs):05d}.safetensors": run for number, run in enumerate(runs, 1)}


def _write(model: LanguageModel, new: Path, tensors: Mapping[str, Tensor], shards: Mapping[str, Sequence[str]],
           config: dict[str, Any]) -> None:
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, new / file, metadata={"format": "pt"})
        (new / file).chmod(0o666 & new.stat().st_mode)  # safetensors makes private files
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
                 "weight_map": {name: file for file, names in shards.items() for name in names}}
        _write_text(new / f"{WEIGHTS}{INDEX_SUFFIX}", json.dumps(index, indent=1))
    if model.tokenizer_folder is not None:
        for name in TOKENIZER_FILES:
            if (model.tokenizer_folder / name).is_file():
                shutil.copyfile(model.tokenizer_folder / name, new / name)
    config["files"] = {path.name: _file_digest(path) for path in sorted(new.iterdir()) if path.name not in shards}
    _write_text(new / CONFIG, json.dumps({**config, "digest": _config_digest(config)}, indent=1))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def check_target(folder: Path) -> None:
    """Raises CheckpointError unless the folder is new, empty, or a shedder checkpoint that may be replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder}: exists and is not a folder; nothing was written")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            is_ours = read_json(folder / CONFIG).get("format") == FORMAT
        except CheckpointError:
            is_ours = False
        if not is_ours:
            raise CheckpointError(f"{folder}: not empty and not a shedder checkpoint; nothing was written. "
                                  "Accepted: a new folder, an empty one, or a shedder checkpoint to replace")


def _carry_over(old: Path, new: Path) -> None:
    """Files that others put beside the checkpoint (a README, a plot) stay."""
    for path in old.iterdir():
        if SHARD.fullmatch(path.name) or path.name in (CONFIG, WEIGHTS, f"{WEIGHTS}{INDEX_SUFFIX}", *TOKENIZER_FILES):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=link_or_copy)
        else:
            link_or_copy(str(path), str(new / path.name))


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        facts = folder.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino
