"""The documents of a source, read in one process: what `prepare` writes, without the writing; and files to read."""

import gzip
import json

import zstandard

from openllama.data.documents import Damage, Fields, document
from openllama.data.lines import Unreadable
from openllama.data.sources import START, open_source


def read(source, fields=None, damage=None, after=START):
    fields, damage = fields or Fields(), damage or Damage("raise")
    for record in open_source(source, fields).records(after, lambda _: None):
        number, file = record.place[1], record.file
        try:
            yield document(record.data, fields, record.category, f"{file}:{number}" if number else file)
        except Unreadable as why:
            damage.note(file, number, why)


def texts(source, *args, **options):
    return [d["text"] for d in read(source, *args, **options)]


def line(text):
    return json.dumps({"text": text}).encode() + b"\n"


def write(path, data):
    pack = {".zst": zstandard.ZstdCompressor().compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


def array(values):
    return json.dumps(values, ensure_ascii=False, indent=1).encode()
