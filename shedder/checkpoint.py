"""Reading and writing checkpoints: our own folders strictly, foreign ones through the families' adapters.

Our format: config.json {"format": "shedder", "version": 1, "dtype", "model", "tokenizer", "plan",
"provenance", "checksums"} and model.safetensors. The layouts in config.json say which tensors there
are and of which shape; nothing is encoded by a missing key, and nothing is ever unpickled.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import pickle
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shedder.layout import LayoutError
from shedder.models import find_source
from shedder.models.family import CheckpointError
from shedder.nn import LanguageModel, ModelConfig
from shedder.text import TOKENIZER_FILES

__all__ = ["CheckpointError", "expected_tensors", "load", "save_pretrained"]

FORMAT, VERSION = "shedder", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FIELDS = ("format", "version", "dtype", "model", "tokenizer", "plan", "provenance", "checksums")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TIED, EMBEDDING = "lm_head.weight", "backbone.embedding.weight"


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
        raise CheckpointError(f"{folder}: not a folder{_left_behind(folder)}")
    config = _read_json(folder / CONFIG)
    model = _load_own(folder, config) if config.get("format") == FORMAT else _load_foreign(folder, config)
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        model.tokenizer_folder = folder
    if device is not None or dtype is not None:
        model.to(device=device, dtype=dtype)
    return model.eval()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; a checkpoint folder holds {CONFIG} and the weights")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}; accepted: an object")
    return data


def expected_tensors(config: ModelConfig, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor that a model of this config stores; a tied head is stored once."""
    skeleton = LanguageModel(config, device="meta", dtype=dtype, initialise=False)
    return {name: (tuple(parameter.shape), parameter.dtype) for name, parameter in skeleton.named_parameters()}


def _load_own(folder: Path, data: dict[str, Any]) -> LanguageModel:
    path = folder / CONFIG
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{path}: version is {version!r}; accepted: {VERSION}")
    if version > VERSION:
        raise CheckpointError(f"{path}: version is {version}, written by a newer shedder; accepted: {VERSION}")
    if set(data) != set(FIELDS):
        wrong = sorted(set(data) ^ set(FIELDS))
        raise CheckpointError(f"{path}: {wrong[0]} is {'missing' if wrong[0] in FIELDS else 'not known'}; "
                              f"accepted: exactly {sorted(FIELDS)}")
    if data["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: dtype is {data['dtype']!r}; accepted: one of {sorted(DTYPES)}")
    for field, kinds in (("tokenizer", (str, type(None))), ("plan", (dict, type(None))), ("provenance", (dict,)),
                         ("model", (dict,)), ("checksums", (dict,))):
        if not isinstance(data[field], kinds):
            raise CheckpointError(f"{path}: {field} is a {type(data[field]).__name__}; "
                                  f"accepted: {' or '.join(kind.__name__ for kind in kinds)}")
    try:
        config = ModelConfig.from_json(data["model"])
    except (LayoutError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: model: {error}") from error
    dtype = DTYPES[data["dtype"]]
    expected = expected_tensors(config, dtype)
    model = LanguageModel(config, dtype=dtype, device="cpu", initialise=False)
    with _safetensors(folder / WEIGHTS) as file:
        _check_names(WEIGHTS, set(file.keys()), set(expected))
        for name, (shape, tensor_dtype) in expected.items():
            _check_shape(WEIGHTS, name, tuple(file.get_slice(name).get_shape()), shape)
            tensor = _tensor(file, WEIGHTS, name)
            if tensor.dtype != tensor_dtype:
                raise CheckpointError(f"{WEIGHTS}: {name} is {tensor.dtype}, config.json says {tensor_dtype}")
            if data["checksums"].get(name) != _checksum(tensor):
                raise CheckpointError(f"{WEIGHTS}: {name} does not match its checksum in config.json; "
                                      "the file is damaged")
            with torch.no_grad():
                model.get_parameter(name).copy_(tensor)
    model.tokenizer_name, model.plan, model.provenance = data["tokenizer"], data["plan"], data["provenance"]
    return model


def _load_foreign(folder: Path, data: dict[str, Any]) -> LanguageModel:
    _, source = find_source(data)
    try:
        config = source.read_config(data)
    except CheckpointError:
        raise
    except (LayoutError, ArithmeticError) as error:     # sizes that no model has
        raise CheckpointError(f"config.json: {error}") from error
    tensors: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    for file, name, tensor in _foreign_tensors(folder):
        ours = source.rename(name)
        if ours in tensors:
            raise CheckpointError(f"{file}: {name} occurs twice")
        tensors[ours], files[ours] = tensor, file
    weights = files.get(EMBEDDING, next(iter(files.values()), WEIGHTS))
    if config.tie_embeddings and TIED in tensors:
        if EMBEDDING in tensors and not torch.equal(tensors[TIED], tensors[EMBEDDING]):
            raise CheckpointError(f"{files[TIED]}: {TIED} differs from {EMBEDDING}, config.json says they are tied")
        del tensors[TIED]
    dtype = tensors[EMBEDDING].dtype if EMBEDDING in tensors else torch.float32
    if dtype not in DTYPES.values():
        raise CheckpointError(f"{weights}: {EMBEDDING} is {dtype}; accepted: one of {tuple(DTYPES.values())}")
    expected = expected_tensors(config, dtype)
    _check_names(weights, set(tensors), set(expected))
    model = LanguageModel(config, dtype=dtype, device="cpu", initialise=False)
    for name, (shape, _) in expected.items():
        tensor = tensors.pop(name)                      # freed as soon as it is copied
        _check_shape(files[name], name, tuple(tensor.shape), shape)
        if not tensor.is_floating_point():
            raise CheckpointError(f"{files[name]}: {name} is {tensor.dtype}; accepted: a floating type")
        with torch.no_grad():
            model.get_parameter(name).copy_(tensor)
    model.provenance = {"source": source.name, "source_folder": folder.name}
    return model


def _check_names(file: str, found: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{file}: {missing[0]} is missing{more}; the layout in config.json asks for it")
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise CheckpointError(f"{file}: {extra[0]}{more} is not in the layout in config.json")


def _check_shape(file: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise CheckpointError(f"{file}: {name} is {found}, the layout in config.json says {expected}")


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error
    with file:
        yield file


def _tensor(file: Any, file_name: str, name: str) -> Tensor:
    try:
        return file.get_tensor(name)
    except (SafetensorError, KeyError, AttributeError) as error:     # e.g. a type that torch does not have
        raise CheckpointError(f"{file_name}: {name} cannot be read ({error})") from error


def _foreign_tensors(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """(file, name, tensor) of a mamba_ssm or transformers folder, whichever of the usual files it has."""
    for single, is_pickle in ((WEIGHTS, False), ("pytorch_model.bin", True)):
        if (folder / single).is_file():
            yield from _file_tensors(folder / single, is_pickle)
            return
        index = folder / f"{single}.index.json"
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, Mapping) or not all(isinstance(v, str) for v in weight_map.values()):
                raise CheckpointError(f"{index}: weight_map is not an object of tensor name to file name")
            for shard in sorted(set(weight_map.values())):
                if Path(shard).name != shard or not (folder / shard).is_file():
                    raise CheckpointError(f"{index}: weight_map names {shard!r}, which is not a file in the folder")
                for file, name, tensor in _file_tensors(folder / shard, is_pickle):
                    if weight_map.get(name) == shard:
                        yield file, name, tensor
            return
    raise CheckpointError(f"{folder}: no weights; accepted: {WEIGHTS}, pytorch_model.bin, or either with .index.json")


def _file_tensors(path: Path, is_pickle: bool) -> Iterator[tuple[str, str, Tensor]]:
    if not is_pickle:
        with _safetensors(path) as file:
            for name in file.keys():                    # noqa: SIM118  (not a dict)
                yield path.name, name, _tensor(file, path.name, name)
        return
    try:                                                # weights_only: tensors and plain containers, no code
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not a file of tensors ({reason})") from error
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{path}: holds a {type(tensors).__name__}; accepted: a dict of tensors")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path.name}: {name} is a {type(tensor).__name__}; accepted: a tensor")
        yield path.name, name, tensor


def _checksum(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1)
    return f"{zlib.crc32(flat.view(torch.uint8).numpy().data):08x}" if flat.numel() else "00000000"


# ---- saving ----

def save_pretrained(model: LanguageModel, folder: str | Path) -> None:
    """Write the model as a shedder checkpoint, all of it or nothing.

    The files are written to a temporary folder beside `folder` and moved there in one step; an
    existing checkpoint is replaced and, if anything fails, kept. Tokenizer files of the folder
    that the model was loaded from come along.
    """
    folder = Path(folder).absolute()
    _check_target(folder)
    dtype_name = next((name for name, dtype in DTYPES.items() if dtype == model.dtype), None)
    if dtype_name is None:
        raise CheckpointError(f"the model's dtype is {model.dtype}; accepted: one of {sorted(DTYPES)}")
    expected = expected_tensors(model.config, model.dtype)
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    _check_names("the model", set(tensors), set(expected))
    for name, (shape, dtype) in expected.items():
        _check_shape("the model", name, tuple(tensors[name].shape), shape)
        if tensors[name].dtype != dtype:
            raise CheckpointError(f"the model: {name} is {tensors[name].dtype}, a model of {model.dtype} has it as "
                                  f"{dtype}")
    config = {"format": FORMAT, "version": VERSION, "dtype": dtype_name, "model": model.config.to_json(),
              "tokenizer": model.tokenizer_name, "plan": model.plan, "provenance": model.provenance,
              "checksums": {name: _checksum(tensor) for name, tensor in tensors.items()}}
    try:
        text = json.dumps(config, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"plan or provenance does not fit into JSON ({error})") from error

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        temporary.chmod(0o777 & ~_umask())              # mkdtemp makes private folders
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")
        if model.tokenizer_folder is not None:
            for name in TOKENIZER_FILES:
                if (model.tokenizer_folder / name).is_file():
                    shutil.copyfile(model.tokenizer_folder / name, temporary / name)
        if folder.is_dir():
            _carry_over(folder, temporary)
        for path in temporary.rglob("*"):
            if path.is_file() and not path.is_symlink():
                _sync(path)
        _sync(temporary)
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)    # the new files after a failure, the old ones after success
    if model.tokenizer_folder is not None:
        model.tokenizer_folder = folder


def _check_target(folder: Path) -> None:
    """Only an empty folder or an older checkpoint may be replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder}: exists and is not a folder; nothing was written")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            is_ours = _read_json(folder / CONFIG).get("format") == FORMAT
        except CheckpointError:
            is_ours = False
        if not is_ours:
            raise CheckpointError(f"{folder}: not empty and not a shedder checkpoint; nothing was written. "
                                  "Accepted: a new folder, an empty one, or a shedder checkpoint to replace")


def _carry_over(old: Path, new: Path) -> None:
    """Files that others put beside the checkpoint (a README, a plot) stay."""
    for path in old.iterdir():
        if path.name in (CONFIG, WEIGHTS, *TOKENIZER_FILES):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _replace(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; what was there ends up under the name of `new`."""
    if not folder.exists():
        os.rename(new, folder)
    elif not _exchange(new, folder):
        # No atomic exchange on this system: between the two renames the old checkpoint has another name.
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            os.rename(old, folder)
            raise
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
        return
    _sync(folder.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders atomically; False where the system cannot."""
    AT_FDCWD, RENAME_EXCHANGE = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):                   # not Linux, or an old libc
        return False
    if renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), ctypes.c_uint(RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _left_behind(folder: Path) -> str:
    """Where an interrupted save may have left the previous checkpoint."""
    old = sorted(folder.parent.glob(f".{folder.name}.old-*")) if folder.parent.is_dir() else []
    return f"; an interrupted save left the previous checkpoint at {old[0]}" if old else ""
