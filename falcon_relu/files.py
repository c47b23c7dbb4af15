"""Files and folders: what is written appears whole or not at all, what is read is a regular file."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from falcon_relu.errors import FalconError

_TEXT_LIMIT = 256 << 20  # bytes of a text or JSON file that is read as a whole


# ---- writing

_HELD: contextvars.ContextVar[frozenset[Path]] = contextvars.ContextVar("locks held", default=frozenset())


@contextlib.contextmanager
def write_aside(
    target: Path, *, folder: bool = False, replace: bool = False, marker: str | None = None, nbytes: int = 0
) -> Iterator[Path]:
    """Yields a hidden sibling path to write to; flushes it to disk and renames it to `target` once the block succeeds.

    When the block raises, what was written is removed and `target` stays as it was. What a killed process left under
    the hidden name is removed by the next call. What is no regular file, such as /dev/stdout, is written through.

    Args:
      target: the finished file or folder; `lock(target)` is held meanwhile.
      folder: whether the block makes a folder rather than a file.
      replace: whether an existing `target` of the same kind may be replaced.
      marker: as of `check_output`.
      nbytes: that the caller is about to write; large things fail before they begin.

    Raises:
      FalconError: as `check_output` and `lock`, or the disk is too full.
    """
    target = Path(target)
    check_output(target, folder=folder, replace=replace, marker=marker)
    if not folder and is_special(target):
        with tempfile.TemporaryDirectory() as room:
            yield Path(room) / "content"
            _write_through(Path(room) / "content", target)
        return
    target = real_path(target)  # a link stays a link, to what is written now
    with lock(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = aside_path(target)
        remove(aside)
        if not target.exists() and (old := _beside(target, "old")).exists():
            old.rename(target)  # a process was killed between the two renames below
        free = shutil.disk_usage(target.parent).free
        if nbytes > free:
            raise FalconError(
                f"{target} takes {nbytes / 1e9:.3g} GB and {free / 1e9:.3g} GB are free there: "
                "make room, or choose another disk"
            )
        try:
            yield aside
            _flush(aside)
            check_output(target, folder=folder, replace=replace, marker=marker)  # it may have appeared meanwhile
            _exchange(aside, target)
        except BaseException:
            remove(aside)
            raise


def check_output(target: Path, *, folder: bool = False, replace: bool = False, marker: str | None = None) -> None:
    """Refuses a path that could not be written, before any work is done for it.

    Args:
      target: a file or folder to be made.
      folder: whether it is to be a folder.
      replace: whether an existing one of the same kind may be replaced, or gone on with.
      marker: the file by which a folder that may be replaced is known; an empty folder may be replaced, too.

    Raises:
      FalconError: it exists and may not be replaced, is of the other kind, or lies where nothing can be written.
    """
    target = Path(target)
    try:
        kind = _existing_kind(target)
        if kind == "nothing" and os.path.lexists(target):
            raise FalconError(f"{target} is a link to nothing; remove it, or choose another path")
        if kind == "special" and not folder:
            return
        if kind == "folder" and not folder:
            raise FalconError(f"{target} is a folder; choose the name of a file, in it or elsewhere")
        if kind in ("file", "special") and folder:
            raise FalconError(f"{target} is a file; choose the name of a folder that is to be made")
        if kind != "nothing" and not replace:
            raise FalconError(f"{target} exists already; choose another path, remove it first, or give --overwrite")
        if kind == "folder" and marker is not None and any(target.iterdir()) and not (target / marker).is_file():
            raise FalconError(
                f"{target} is a folder without {marker}, so no such command made it and it is not replaced: choose "
                "another path, or remove it yourself"
            )
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(_beside(real_path(target), "partial"))  # the longer name must be possible, too
        parent = next(p for p in real_path(target).parents if os.path.lexists(p))
        if not parent.is_dir():
            raise FalconError(f"{target} cannot be made: {parent} is not a folder")
        going_on = kind == "folder" and marker is None
        if not os.access(target if going_on else parent, os.W_OK | os.X_OK):
            raise FalconError(f"{target} cannot be made: you may not write to {target if going_on else parent}")
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long, a NUL in it
        raise FalconError(f"{target} cannot be made: {getattr(error, 'strerror', None) or error}") from None


@contextlib.contextmanager
def lock(target: Path, *, shared: bool = False) -> Iterator[None]:
    """Keeps other processes, and other threads of this one, from writing `target` while the block does.

    The block may take the same lock, and that of anything in a folder, again. It is a hidden file beside `target`, held
    with flock(2), which ends with the process, however that ends. (The library filelock leaves its file behind, beside
    every output of the user's.) Disks without locks go without.

    Args:
      target: a file or folder, there or not.
      shared: whether others may hold it at the same time, if they say the same.

    Raises:
      FalconError: another one holds it.
    """
    target = real_path(target)
    if not _HELD.get().isdisjoint((target, *target.parents)):
        yield
        return
    path = _beside(target, "lock")
    if target.is_dir() and not os.access(target.parent, os.W_OK):  # as a disk that is mounted into a container
        path = target / ".falcon-relu-lock"
    made = [parent for parent in path.parents if not parent.exists()]
    held = _locked(path, shared, target)
    before = _HELD.set(_HELD.get() | {target})
    try:
        yield
    finally:
        _HELD.reset(before)
        with contextlib.suppress(OSError):
            if shared:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the last one removes it
            path.unlink(missing_ok=True)
        os.close(held)
        with contextlib.suppress(OSError):  # where nothing came of it, no empty folders stay
            for parent in made:
                parent.rmdir()


@contextlib.contextmanager
def lock_part(folder: Path, index: int, count: int) -> Iterator[None]:
    """`lock` for one of several jobs that fill a folder together: others may do other parts, none the same.

    Args:
      folder: what they fill.
      index: which part, from 0.
      count: of how many.

    Raises:
      FalconError: another process does this part, or the folder whole; or as `check_output`.
    """
    check_output(folder, folder=True, replace=True)
    with lock(Path(folder) / f"part {index} of {count}"), lock(folder, shared=count > 1):
        yield


def inherit_lock(target: Path) -> None:
    """Says that the process that started this one holds `lock(target)` for both, as long as this one lives."""
    _HELD.set(_HELD.get() | {real_path(target)})


def aside_path(target: Path) -> Path:
    """Where `write_aside(target)` lets its caller write."""
    return _beside(real_path(target), "partial")


def write_text(target: Path, text: str, *, replace: bool = True) -> None:
    """Writes UTF-8 text, replacing an existing file in one step unless told not to."""
    with write_aside(target, replace=replace) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any, *, replace: bool = True) -> None:
    """Writes `value` as indented JSON, replacing an existing file in one step unless told not to."""
    write_text(target, json.dumps(value, indent=2) + "\n", replace=replace)


def write_texts(target: Path, texts: Iterable[str]) -> None:
    """Writes one JSON object a line, {"text": ...}, as `falcon-relu prepare` reads it; `target` changes in one step."""
    with write_aside(target, replace=True) as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def remove(path: Path) -> None:
    """Removes a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


# ---- reading


def regular_file(path: Path) -> Path:
    """`path`, made sure to be a regular file that may be read, or a link to one: a pipe or device would hang a reader.

    Raises:
      FalconError: it is missing, a folder, a device or pipe, a broken link, or may not be read.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FalconError(f"{path} {'is a link to nothing' if path.is_symlink() else 'does not exist'}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise FalconError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(mode):
        raise FalconError(f"{path} is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise FalconError(f"{path} is not a regular file but a device or pipe")
    if not os.access(path, os.R_OK):
        raise FalconError(f"{path} cannot be read: you lack the permission")
    return path


def read_text(path: Path, *, limit: int = _TEXT_LIMIT) -> str:
    """The text of a UTF-8 file, without the byte order mark that it may begin with.

    Raises:
      FalconError: as `regular_file`, or it is larger than `limit` bytes, or not UTF-8.
    """
    size = regular_file(path).stat().st_size
    if size > limit:
        raise FalconError(f"{path} has {size:,} bytes; a file of this kind has {limit:,} at most")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")  # line ends as they are
    except UnicodeDecodeError as error:
        raise FalconError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start:,}") from None


def read_json(path: Path, *, limit: int = _TEXT_LIMIT) -> Any:
    """The value in a JSON file.

    Raises:
      FalconError: as `read_text`, or it is not JSON.
    """
    text = read_text(path, limit=limit)
    try:
        return json.loads(text)
    except RecursionError:
        raise FalconError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise FalconError(f"{path} is not valid JSON: {error}") from None


# ---- how


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.falcon-relu-{what}")


def real_path(path: str | Path) -> Path:
    """The absolute path without links; a loop of links stays, for whoever opens it to refuse."""
    return Path(os.path.realpath(path))


def _existing_kind(target: Path) -> str:
    try:
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):  # the latter: a parent is a file
        return "nothing"
    if stat.S_ISDIR(mode):
        return "folder"
    return "special" if is_special(target) else "file"


def is_special(target: Path) -> bool:
    """Whether a path leads to a device or pipe, or to a file that a process holds open, as /dev/stdout may."""
    return target.exists() and not target.is_dir() and (not target.is_file() or _open_file(target) is not None)


def _open_file(target: Path) -> Path | None:
    """/proc/PROCESS/fd/NUMBER that a path such as /dev/stdout or /dev/fd/3 leads to, if any."""
    path = target.absolute()
    for _ in range(40):  # links in a row, at most, as in the kernel
        path = real_path(path.parent) / path.name
        if path.parent.name == "fd" and path.is_relative_to("/proc"):
            return path
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None


def _write_through(content: Path, target: Path) -> None:
    """Adds to what is open already: a second opening would empty a log, or write over its end."""
    opened = _open_file(target)
    ours = opened is not None and opened.parent == Path(f"/proc/{os.getpid()}/fd")
    held = os.dup(int(opened.name)) if opened and ours else os.open(target, os.O_WRONLY | os.O_APPEND)
    with content.open("rb") as source, os.fdopen(held, "wb") as sink:
        shutil.copyfileobj(source, sink)


def _locked(path: Path, shared: bool, target: Path) -> int:
    """A descriptor of the file, flock held."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # another one removed the empty folder just now
            continue
        except (NotADirectoryError, FileExistsError, PermissionError) as error:
            raise FalconError(f"{target} cannot be made: {error.filename}: {error.strerror}") from None
        try:
            fcntl.flock(held, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(held)
                raise FalconError(
                    f"{target} is being written by another process; wait for it, or choose another path"
                ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held), path.stat()):
                return held
        os.close(held)  # its last holder removed the file just now


def _flush(path: Path) -> None:
    """Has the disk hold a file, or a folder and all in it, before anything says that it is there."""
    if path.is_dir():
        for child in path.iterdir():
            _flush(child)
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # disks that cannot flush, or no folders
            raise
    finally:
        os.close(held)


def _exchange(aside: Path, target: Path) -> None:
    if target.is_dir():
        old = _beside(target, "old")  # a folder cannot be renamed over one that holds something
        remove(old)
        shutil.move(target, old)  # a rename, or a copy where the folder is of a lower layer of an overlay
        aside.rename(target)
        remove(old)
    else:
        try:
            aside.replace(target)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):  # a file that is mounted by itself into a container
                raise
            shutil.copyfile(aside, target)
            remove(aside)
    _flush_entry(target.parent)


def _flush_entry(folder: Path) -> None:
    held = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks cannot flush a folder
            os.fsync(held)
    finally:
        os.close(held)
