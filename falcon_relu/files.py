"""Files and folders: writing them completely or not at all, locks against other writers, and reading regular files."""

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
    """Yields a hidden path beside `target` to write to; flushes it to disk and renames it to `target` at the end.

    When the block raises, what was written is removed and `target` stays as it was. What a killed process left under
    the hidden name is removed by the next call. A device or pipe, such as /dev/stdout, gets the content written to it.

    Args:
      target: the file or folder to make; `lock(target)` is held meanwhile.
      folder: whether the block makes a folder rather than a file.
      replace: whether an existing `target` of the same kind may be replaced.
      marker: see `check_output`.
      nbytes: number of bytes that will be written; if the disk has less room, nothing is begun.

    Raises:
      FalconError: as `check_output` and `lock`, or the disk has less than `nbytes` free.
    """
    target = Path(target)
    check_output(target, folder=folder, replace=replace, marker=marker)
    if not folder and is_special(target):
        with tempfile.TemporaryDirectory() as room:
            yield Path(room) / "content"
            _write_through(Path(room) / "content", target)
        return
    target = real_path(target)  # of a link, what it leads to is replaced, and the link stays
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
            check_output(target, folder=folder, replace=replace, marker=marker)  # another program may have made it
            _exchange(aside, target)
        except BaseException:
            remove(aside)
            raise


def check_output(target: Path, *, folder: bool = False, replace: bool = False, marker: str | None = None) -> None:
    """Refuses an output that cannot or may not be written; called before the work whose results it will hold.

    Args:
      target: a file or folder to be made.
      folder: whether it is to be a folder.
      replace: whether it may exist already, as the same kind: to be replaced or, for a folder without `marker`, to be
        added to.
      marker: a file that shows that a folder was made by such a command; only such a folder, or an empty one, may be
        replaced.

    Raises:
      FalconError: it exists and may not be replaced, is a file where a folder is needed or the reverse, or cannot be
        made there.
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
            os.lstat(_beside(real_path(target), "partial"))  # an error if this longer name is too long
        parent = next(p for p in real_path(target).parents if os.path.lexists(p))
        if not parent.is_dir():
            raise FalconError(f"{target} cannot be made: {parent} is not a folder")
        written = target if kind == "folder" and marker is None else parent
        if not os.access(written, os.W_OK | os.X_OK):
            raise FalconError(f"{target} cannot be made: you may not write to {written}")
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long, a NUL in it
        raise FalconError(f"{target} cannot be made: {getattr(error, 'strerror', None) or error}") from None


@contextlib.contextmanager
def lock(target: Path, *, shared: bool = False) -> Iterator[None]:
    """A context in which no other process, and no other thread of this one, can hold the lock of `target`.

    The lock is a hidden file beside `target`, locked with flock(2), which the system releases when the process ends,
    however it ends. (The library filelock would leave such a file beside every output.) The code in the context may
    take the same lock again, and, where `target` is a folder, those of files in it. On a disk that cannot lock files
    nothing is locked.

    Args:
      target: a file or folder, which need not exist.
      shared: whether others that ask for a shared lock may hold it at the same time.

    Raises:
      FalconError: another process or thread holds it.
    """
    target = real_path(target)
    if not _HELD.get().isdisjoint((target, *target.parents)):
        yield
        return
    path = _beside(target, "lock")
    if target.is_dir() and not os.access(target.parent, os.W_OK):  # a disk mounted into a container, for example
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
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error, suppressed, while others hold it
            path.unlink(missing_ok=True)
        os.close(held)
        with contextlib.suppress(OSError):  # folders that were made for the lock file and are still empty
            for parent in made:
                parent.rmdir()


@contextlib.contextmanager
def lock_part(folder: Path, index: int, count: int) -> Iterator[None]:
    """The lock of one of several jobs that write parts of a folder: others may write other parts meanwhile.

    Args:
      folder: the folder.
      index: number of the job's part, counted from 0.
      count: number of parts; 1 if the job writes the whole folder.

    Raises:
      FalconError: another process writes this part or the whole folder; or as `check_output`.
    """
    check_output(folder, folder=True, replace=True)
    with lock(Path(folder) / f"part {index} of {count}"), lock(folder, shared=count > 1):
        yield


def inherit_lock(target: Path) -> None:
    """For a process whose parent holds `lock(target)`: from now on, `lock` treats it as held by this process, too."""
    _HELD.set(_HELD.get() | {real_path(target)})


def aside_path(target: Path) -> Path:
    """The hidden path that `write_aside(target)` yields."""
    return _beside(real_path(target), "partial")


def write_text(target: Path, text: str, *, replace: bool = True) -> None:
    """Writes UTF-8 text with `write_aside`; an existing file is replaced only if `replace`."""
    with write_aside(target, replace=replace) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any, *, replace: bool = True) -> None:
    """Writes `value` as indented JSON with `write_aside`; an existing file is replaced only if `replace`."""
    write_text(target, json.dumps(value, indent=2) + "\n", replace=replace)


def write_texts(target: Path, texts: Iterable[str]) -> None:
    """Writes a line {"text": ...} for each text, as `falcon-relu prepare` reads it; an existing file is replaced."""
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
    """Returns `path` if it is a regular file that can be read, or a link to one; reading a pipe or device may hang.

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


# ---- details


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.falcon-relu-{what}")


def real_path(path: str | Path) -> Path:
    """The absolute path without links; of links that form a loop, some stay, and opening the path is then an error."""
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
    """Whether a path leads to a device or pipe, or, as /dev/stdout may, to a file that a process has opened."""
    return target.exists() and not target.is_dir() and (not target.is_file() or _open_file(target) is not None)


def _open_file(target: Path) -> Path | None:
    """The path /proc/PROCESS/fd/NUMBER that a path such as /dev/stdout or /dev/fd/3 leads to; None if it does not."""
    path = target.absolute()
    for _ in range(40):  # the kernel, too, follows at most 40 links
        path = real_path(path.parent) / path.name
        if path.parent.name == "fd" and path.is_relative_to("/proc"):
            return path
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None


def _write_through(content: Path, target: Path) -> None:
    """Appends the file `content` to a device, pipe or opened file; opening the latter anew could overwrite its end."""
    opened = _open_file(target)
    ours = opened is not None and opened.parent == Path(f"/proc/{os.getpid()}/fd")
    held = os.dup(int(opened.name)) if opened and ours else os.open(target, os.O_WRONLY | os.O_APPEND)
    with content.open("rb") as source, os.fdopen(held, "wb") as sink:
        shutil.copyfileobj(source, sink)


def _locked(path: Path, shared: bool, target: Path) -> int:
    """Opens and locks the lock file `path` of `target`; returns its descriptor."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # another process has just removed the empty folder
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
        os.close(held)  # the process that held the lock has just removed this file: make a new one


def _flush(path: Path) -> None:
    """Makes sure that a file, or a folder with all that is in it, is on the disk and not only in the system's cache."""
    if path.is_dir():
        for child in path.iterdir():
            _flush(child)
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # disks that cannot do it
            raise
    finally:
        os.close(held)


def _exchange(aside: Path, target: Path) -> None:
    if target.is_dir():
        old = _beside(target, "old")  # a folder cannot be renamed to the name of one that is not empty
        remove(old)
        shutil.move(target, old)  # copies where a rename is impossible, as in a container's image
        aside.rename(target)
        remove(old)
    else:
        try:
            aside.replace(target)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):  # a single file mounted into a container
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
