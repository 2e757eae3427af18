"""train/inspect_data.py shows what training sees."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

from openllama.data.loader import PackedLoader
from openllama.training.loop import Trainer

ROOT = Path(__file__).resolve().parents[2]


def test_packs_are_shown_as_the_run_takes_them(settings, corpus, tmp_path):
    shards = {"web": str(corpus / "train"), "books": str(corpus / "valid")}
    config = settings(shards=shards, mix={"books": 2.0}, steps=1)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(vars(config)))
    command = [sys.executable, ROOT / "train/inspect_data.py", "--config", path, "--packs", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    trainer = Trainer(config)  # opens the same token cache
    loader = PackedLoader(trainer.sources, config.context, 1, config.seed, mix=config.mix)
    assert f"{loader.packs:,} packs of 64 an epoch" in done.stdout
    assert f"{loader.padding_share:.2%} padding" in done.stdout
    shown = re.split(r"─+ pack (\d+): (\d+) pieces, (\d+) of 64 tokens are padding ─+\n", done.stdout)[1:]
    assert [int(p) for p in shown[::4]] == loader.order(0)[:4].tolist()
    for pack, count, padding, text in zip(shown[::4], shown[1::4], shown[2::4], shown[3::4]):
        pieces = loader.pieces(int(pack))
        heads = re.findall(r"── document (\d+) of (web|books)/test", text)
        assert heads == [(str(p.document), p.source) for p in pieces] and len(pieces) == int(count)
        assert 64 - sum(p.length for p in pieces) == int(padding)
        first = trainer.sources[pieces[0].source][pieces[0].document]
        ids = first[pieces[0].start : pieces[0].start + pieces[0].length].tolist()
        assert trainer.tokenizer.decode(ids).strip()[:40] in " ".join(text.split())
