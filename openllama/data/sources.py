"""What a corpus is read from: data files, code folders, this machine's Python source, HuggingFace datasets.

A source is a stream of records in a fixed order, each with its place (file, number), from which a later run can go on.
"""

from __future__ import annotations

import copy
import hashlib
import os
import sysconfig
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from .documents import Fields
from .formats import SUFFIXES, TEXT, Data, records, whole_text
from .lines import Advance, Unreadable, has_ending

ENDS = 1 << 16  # bytes of each end of a file that its fingerprint takes
# Bytes of the files that make a unit, at least and at most; between them a corpus has 64. So all cores have work, while the
# shorter shards at the end of units, which are written twice, are a small part of the whole.
UNIT_BYTES = (64 << 20, 256 << 20)
HUB, CODE, PYTHON = "hf:", "code:", "python"
Place = tuple[int, int]  # file, number of the record in it; both grow
START: Place = (-1, 0)

# Suffix -> language, the category of a code folder's documents. Prose and configuration count: they come with code.
LANGUAGES = {
    ".py": "python", ".pyi": "python", ".c": "c", ".h": "c", ".cc": "c++", ".cpp": "c++", ".cxx": "c++", ".hpp": "c++",
    ".cu": "cuda", ".cuh": "cuda", ".rs": "rust", ".go": "go", ".java": "java", ".kt": "kotlin", ".scala": "scala",
    ".swift": "swift", ".cs": "c#", ".js": "javascript", ".mjs": "javascript", ".jsx": "javascript", ".ts": "typescript",
    ".tsx": "typescript", ".rb": "ruby", ".php": "php", ".pl": "perl", ".lua": "lua", ".r": "r", ".jl": "julia",
    ".hs": "haskell", ".ml": "ocaml", ".ex": "elixir", ".erl": "erlang", ".clj": "clojure", ".sh": "shell", ".sql": "sql",
    ".html": "html", ".css": "css", ".md": "markdown", ".rst": "rst", ".tex": "tex", ".yaml": "yaml", ".yml": "yaml",
    ".toml": "toml", ".cmake": "cmake", ".proto": "proto",
}  # fmt: skip
# Folders that hold copies and products rather than sources; hidden ones are passed over too.
NOT_SOURCES = ("node_modules", "__pycache__", "site-packages", "dist-packages", "build", "dist", "target")


class Record(NamedTuple):
    """One record, and what its document is to be called."""

    place: Place
    data: Data
    category: str  # where the record names none itself
    file: str


class Source(ABC):
    """A stream of records that a later run can take up anywhere."""

    name: str
    size: int | None = None  # bytes on the disk, where that is known
    fingerprint: str | None = None  # changes with the content; None: a change goes unnoticed
    passed_over: Mapping[str, int] = MappingProxyType({})  # files that are none of it, by ending or kind

    def listing(self) -> str | None:
        """Changes with what the source consists of: a run that was interrupted can only go on in the same files."""
        return self.fingerprint

    def units(self) -> list[Source]:
        """Parts of it in order, for processes to read side by side; the same however many there are."""
        return [self]

    @abstractmethod
    def records(self, after: Place, advance: Advance) -> Iterator[Record]:
        """In order, from the first beyond `after`; `advance` is told the bytes read from the disk."""


def open_source(source: str | Path, fields: Fields) -> Source:
    """The source that `source` names.

    `python` (the Python source on this machine: standard library, then installed packages); `code:FOLDER`;
    `hf:NAME[,CONFIG][:SPLIT]` (a HuggingFace dataset, or a local folder of one); a file of `formats.SUFFIXES`, or a
    folder of those. Raises FileNotFoundError or ValueError for any other.
    """
    name = str(source)
    if name == PYTHON:
        return python_source()
    if name.startswith(HUB):
        return HubSource(name)
    if name.startswith(CODE):
        root = Path(name.removeprefix(CODE))
        if not root.is_dir():
            raise FileNotFoundError(f"source: {root} is no folder; takes code:FOLDER")
        return CodeSource(f"{CODE}{root.resolve().name}", [("", root)])
    return FileSource(Path(source), fields)


class FileSource(Source):
    """A data file, or the data files of a folder (recursive, in sorted order)."""

    def __init__(self, path: Path, fields: Fields) -> None:
        takes = (
            f"takes a file ending in {', '.join(SUFFIXES)}, a folder of those, python, code:FOLDER or hf:NAME"
        )
        if path.is_dir():
            self.passed_over = Counter[str]()
            self._paths = list(_walk(path, SUFFIXES, passed_over=self.passed_over))
            self._root = path
            if not self._paths:
                found = (
                    ", ".join(f"{n} x {kind}" for kind, n in sorted(self.passed_over.items())) or "nothing"
                )
                raise ValueError(
                    f"source: folder {path} holds no file ending in {', '.join(SUFFIXES)}, but {found}; name another, "
                    "or convert the files"
                )
        elif not path.exists():
            raise FileNotFoundError(f"source: {path} does not exist; {takes}")
        elif not has_ending(path, SUFFIXES):
            raise ValueError(f"source: got {path}, {takes}")
        else:
            self._paths, self._root = [path], path.parent
        self.name, self._fields = _printable(path.resolve().name), fields
        self._sizes = [p.stat().st_size for p in self._paths]
        self.size, self.fingerprint = sum(self._sizes), self._fingerprint()

    def _fingerprint(self) -> str:
        """Stands for the files' names, sizes, and first and last bytes: cheap for a corpus of any size."""
        digest = hashlib.sha256()
        for path, size in zip(self._paths, self._sizes):
            digest.update(os.fsencode(path.relative_to(self._root)) + f"\0{size}\0".encode())
            with suppress(PermissionError), path.open("rb") as file:  # reading it will name it
                digest.update(file.read(ENDS))
                file.seek(max(ENDS, size - ENDS))
                digest.update(file.read(ENDS))
        return digest.hexdigest()[:16]

    def listing(self) -> str:
        """The files' times too: a file may have changed amid the bytes that its fingerprint takes."""
        times = [path.stat().st_mtime_ns for path in self._paths]
        return hashlib.sha256(f"{self.fingerprint}{times}".encode()).hexdigest()[:16]

    def units(self) -> list[Source]:
        """Files in a row, of some UNIT_BYTES."""
        least, most = UNIT_BYTES
        enough = min(max(sum(self._sizes) // 64, least), most)
        units: list[Source] = []
        first = size = 0
        for end, more in enumerate(self._sizes, 1):
            size += more
            if size >= enough or end == len(self._sizes):
                unit = copy.copy(self)
                unit._paths, unit._sizes, unit.size = self._paths[first:end], self._sizes[first:end], size
                units.append(unit)
                first, size = end, 0
        return units

    def records(self, after: Place, advance: Advance) -> Iterator[Record]:
        for index, path in enumerate(self._paths):
            if index < after[0]:
                advance(self._sizes[index])
                continue
            category = _printable(_category(path.name))
            file = _printable(str(path.relative_to(self._root)))
            number = after[1] if index == after[0] else 0
            left = self._sizes[index]

            def told(count: int) -> None:
                nonlocal left
                left -= count
                advance(count)

            for n, data in records(path, number, self._fields.columns, told):
                if (index, n) > after:
                    yield Record((index, n), data, category, file)
            advance(left)  # of a damaged file, the rest


class CodeSource(Source):
    """Source files below some roots, each a document. Files with equal contents come once.

    `roots`: (category, folder); the category "" means each file's language.
    """

    def __init__(self, name: str, roots: list[tuple[str, Path]], skip: tuple[str, ...] = NOT_SOURCES) -> None:
        self.name = name
        suffixes = (".py",) if name == PYTHON else tuple(LANGUAGES)
        self._paths = [
            (category, root, path)
            for category, root in roots
            for path in _walk(root, suffixes, skip if category != "packages" else ())
        ]
        if not self._paths:
            raise ValueError(f"source: {name} holds no source file ({', '.join(suffixes)})")
        if name != PYTHON:  # there, a package that is installed must not invalidate what was made
            self.fingerprint = self.listing()

    def listing(self) -> str:
        listed = "".join(
            f"{root.resolve()}\0{p.relative_to(root)}\0{p.stat().st_size}\n" for _, root, p in self._paths
        )
        return hashlib.sha256(os.fsencode(listed)).hexdigest()[:16]

    def records(self, after: Place, advance: Advance) -> Iterator[Record]:
        seen: set[bytes] = set()
        for index, (category, root, path) in enumerate(self._paths):
            file = _printable(path.relative_to(root).as_posix())
            for _, data in whole_text(path, advance):
                # what is passed over counts as seen too, so a run that goes on finds the same files new
                digest = hashlib.sha256(data.encode()).digest() if isinstance(data, str) else b""
                if digest in seen:
                    continue
                if digest:
                    seen.add(digest)
                if (index, 0) > after:
                    yield Record((index, 0), data, category or LANGUAGES[path.suffix.lower()], file)


def python_source() -> CodeSource:
    """The Python source of the running interpreter: its standard library, then its installed packages."""
    paths = sysconfig.get_paths()
    packages = dict.fromkeys([paths["purelib"], paths["platlib"]])  # the same folder on most systems
    roots = [
        ("stdlib", Path(paths["stdlib"])),
        *(("packages", Path(p)) for p in packages if Path(p).is_dir()),
    ]
    return CodeSource(PYTHON, roots, ("site-packages", "dist-packages"))


class HubSource(Source):
    """A dataset that the `datasets` library can open, read as a stream."""

    def __init__(self, name: str) -> None:
        self.name = name
        spec, _, split = name.removeprefix(HUB).partition(":")
        self._path, _, config = spec.partition(",")
        self._config, self._split = config or None, split or "train"

    def listing(self) -> str:
        """Of a folder, its files and their times; of the hub, the commit."""
        return self._opened(lambda builder: str(builder.hash))

    def _opened(self, use: Callable[[Any], Any]) -> Any:
        from datasets import load_dataset_builder

        try:
            return use(load_dataset_builder(self._path, self._config))
        except Exception as e:  # of the hub, of the network, of the builder: each has its own
            raise ValueError(
                f"source: {self.name} cannot be opened ({type(e).__name__}: {e}); takes hf:NAME[,CONFIG][:SPLIT] of "
                "a HuggingFace dataset, or of a local folder of data files"
            ) from None

    def records(self, after: Place, advance: Advance) -> Iterator[Record]:
        from datasets.exceptions import DatasetsError

        rows = self._opened(lambda builder: builder.as_streaming_dataset(self._split))
        done = after[1] if after[0] == 0 else 0
        number, category = done, Path(self._path).name
        stream = iter(rows.skip(done))
        while True:
            number += 1
            try:
                row = next(stream, None)
            except (ValueError, DatasetsError) as e:  # of the data; the stream cannot go on after it
                yield Record(
                    (0, number), Unreadable("cannot be read", f"{type(e).__name__}: {e}"), category, self.name
                )
                return
            except Exception as e:  # of the network, of a disk: each library has its own
                raise OSError(
                    f"source: {self.name} broke off before row {number} ({type(e).__name__}: {e}); run again, it goes on "
                    "where it was"
                ) from None
            if row is None:
                return
            yield Record((0, number), row, category, self.name)


def _category(name: str) -> str:
    """Of a file's documents: its name without the ending; one for all texts, each of which is a file."""
    return "txt" if has_ending(name, TEXT) else name[: -len(next(s for s in SUFFIXES if has_ending(name, s)))]


def _printable(name: str) -> str:
    """A file's name as text: bytes in it that are not UTF-8 become U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")


def _walk(
    root: Path, endings: tuple[str, ...], skip: tuple[str, ...] = (), passed_over: Counter[str] | None = None
) -> Iterator[Path]:
    """The files below `root` with one of `endings`, in sorted order; the others are counted, hidden folders are not.

    A link to a folder is followed unless it leads to one that was there before. Raises OSError naming a folder that
    cannot be read: without it, part of the source would be missing unseen.
    """
    seen, passed_over = set(), Counter() if passed_over is None else passed_over
    for folder, subfolders, names in os.walk(root, onerror=_refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(d for d in subfolders if d not in skip and not d.startswith("."))
        for path in (Path(folder, name) for name in sorted(names)):
            if why := _why_not(path, endings):
                passed_over[why] += 1
            else:
                yield path


def _refuse(error: OSError) -> NoReturn:
    raise OSError(
        error.errno,
        f"source: folder {error.filename} cannot be read ({error.strerror}); make it readable, or move it out of the source",
    )


def _why_not(path: Path, endings: tuple[str, ...]) -> str | None:
    """What a file is called among those passed over; None if it is to be read."""
    if path.name.startswith("."):
        return "hidden file"  # such as what rsync has copied in part
    if not path.exists():
        return "broken link"
    if not path.is_file():
        return "not a regular file"  # a named pipe would be waited for without end
    return None if has_ending(path, endings) else path.suffix.lower() or "no ending"
