"""The texts in languages: what the installed catalogues give, and small catalogues whose texts are known."""

import json
from collections import Counter

import pytest

from openllama.tokenizer import language
from train import language_texts
from train.language_texts import Catalogues, write_language_texts

NAMES = {"english": "Latin script", "chinese": "Chinese", "japanese": "Japanese"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "new/texts.jsonl"
    write_language_texts(path)
    return path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose two catalogues are all there is."""
    polib = pytest.importorskip("polib")
    folder = tmp_path / "package_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").touch()
    messages = {
        "a": {"Open": "开", "SQL": "SQL", "Close": "关"},
        "b": {"Open": "打开", "Close": "关", "Twenty": "廿"},
    }
    for name, pairs in messages.items():
        catalogue = polib.POFile()
        catalogue.extend(polib.POEntry(msgid=e, msgstr=t) for e, t in pairs.items())
        catalogue.append(
            polib.POEntry(msgid="%d cell", msgid_plural="%d cells", msgstr_plural={0: f"%d 格 {name}"})
        )
        catalogue.save_as_mofile(str(folder / f"{name}.mo"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(language_texts, "CATALOGUES", (Catalogues("chinese", "package_of_a_test", "*.mo"),))
    return folder


def test_each_document_is_in_its_language(written):
    documents = [json.loads(line) for line in written.read_text().splitlines()]
    found = Counter((d["language"], language(d["text"])) for d in documents)
    for name, letters in NAMES.items():
        of_it = sum(count for (meant, _), count in found.items() if meant == name)
        assert of_it > 100 and found[name, letters] > 0.98 * of_it
    assert {d["language"] for d in documents} == NAMES.keys()


def test_no_document_comes_twice_and_the_file_is_the_same_again(written, tmp_path):
    lines = written.read_text().splitlines()
    assert len(set(lines)) == len(lines)
    write_language_texts(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == written.read_bytes()


def test_a_message_comes_once_and_what_is_not_translated_never(package, tmp_path):
    write_language_texts(tmp_path / "texts.jsonl")
    documents = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [(d["language"], d["text"].split("\n")) for d in documents] == [
        ("english", ["%d cell", "Close", "Open"]),
        ("chinese", ["%d 格 a", "关", "开"]),
        ("english", ["Twenty"]),
        ("chinese", ["%d 格 b", "打开", "廿"]),
    ]


def test_documents_hold_so_many_messages(package, tmp_path, monkeypatch):
    monkeypatch.setattr(language_texts, "MESSAGES", 2)
    assert [d["text"] for d in language_texts.language_texts()][:2] == ["%d cell\nClose", "Open"]


@pytest.mark.parametrize("missing", ("polib", "django", "jupyterlab_language_pack_ja_JP"))
def test_a_package_that_is_not_installed(tmp_path, monkeypatch, missing):
    find = language_texts.find_spec
    monkeypatch.setattr(language_texts, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(
        FileNotFoundError, match=rf'{missing} is not installed.*pip install "openllama\[langs\]"'
    ):
        write_language_texts(tmp_path / "texts.jsonl")
    assert list(tmp_path.iterdir()) == []  # though English and Chinese were there


def test_a_release_without_catalogues(package, tmp_path):
    for path in package.glob("*.mo"):
        path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"holds no \*\.mo; install another release of package_of_a_test"
    ):
        write_language_texts(tmp_path / "texts.jsonl")
