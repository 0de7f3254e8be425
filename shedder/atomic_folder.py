"""Replacing a folder in one step: whatever fails or is killed, the old one or the new one is there, whole."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacement(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends, and is gone when the block raises.

    It is locked while it is written, so that what a killed process left behind can be told from what
    another one is writing, and swept away by the next replacement.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, lock = _locked_folder(folder)
    try:
        new.chmod(0o777 & ~_umask())                    # mkdtemp makes private folders
        yield new
        for path in new.rglob("*"):
            if path.is_file() and not path.is_symlink():
                _sync(path)
        _sync(new)
        _replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)          # the new files after a failure, the old ones after success
        os.close(lock)
    for pattern in (".new-", ".old-"):
        for left in folder.parent.glob(f".{_escaped(folder.name)}{pattern}*"):
            _remove_unlocked(left)


def left_behind(folder: Path) -> Path | None:
    """Where a replacement that was killed between two renames left what `folder` held."""
    pattern = f".{_escaped(folder.name)}.old-*"
    return next(iter(sorted(folder.parent.glob(pattern))), None) if folder.parent.is_dir() else None


def link_or_copy(source: str, target: str) -> str:
    """A file keeps its identity where it can: who has it open goes on writing into the one that stays."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
    return target


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _replace(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; what was there ends up under the name of `new`."""
    if not folder.exists():
        os.rename(new, folder)
    elif not _exchange(new, folder):
        # No atomic exchange on this system: between the two renames the old folder has another name.
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            os.rename(old, folder)
            raise
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


def _locked_folder(folder: Path) -> tuple[Path, int]:
    """A new folder beside `folder`, and its lock. One that another process swept before it was locked is made again."""
    while True:
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
        try:
            lock = os.open(new, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:                         # it is being swept
            os.close(lock)
            continue
        except OSError:                                 # a file system without locks, where nobody sweeps
            pass
        if os.fstat(lock).st_nlink:
            return new, lock
        os.close(lock)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:                                     # someone else's, or a file system without locks
        return False
    return True


def _remove_unlocked(left: Path) -> None:
    try:
        descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if _try_lock(descriptor):
            shutil.rmtree(left, ignore_errors=True)
    finally:
        os.close(descriptor)


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
