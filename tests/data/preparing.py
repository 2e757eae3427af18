"""`prepare` without a bar, and what it made."""

from pathlib import Path

from openllama.data.documents import Fields
from openllama.data.prepare import prepare
from openllama.data.shards import read_shards

ROOT = Path(__file__).resolve().parents[2]


def names(folder):
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def quiet(source, out, *args, **options):
    return prepare(source, out, *args, progress=False, **options)


def all_texts(out, split):
    return [d["text"] for d in read_shards(out / split)]


OPTIONS = {"valid_share": 0.2, "fields": Fields(("body",), "kind"), "lines_per_shard": 16}


def content(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
