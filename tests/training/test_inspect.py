"""train/inspect_data.py shows what training sees."""

import re

import pytest
import yaml

from openllama.data.loader import PackedLoader
from openllama.data.shards import ShardWriter
from openllama.training.loop import Trainer


@pytest.fixture
def inspect(script, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(config, *arguments):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(vars(config)))
        return script("inspect_data", "--config", path, *arguments)

    return run


def test_packs_are_shown_as_the_run_takes_them(inspect, settings, corpus, tmp_path):
    shards = {"web": str(corpus / "train"), "books": str(corpus / "valid")}
    config = settings(shards=shards, mix={"books": 2.0}, steps=1)
    done = inspect(config, "--packs", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"tokenising into {tmp_path}/run/tokens what is not there yet")
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


def test_names_and_texts_are_shown_as_they_are(inspect, settings, tmp_path):
    """To rich, these are markup and emoji."""
    text = "[x] a[bold] :smile: [/x]\tb" + " and so on" * 30 + "\n\n  end"
    with ShardWriter(tmp_path / "shards", {}) as writer:
        writer.write({"text": text, "meta": {"category": "[/x] :smile:"}})
    config = settings(shards=str(tmp_path / "shards"), context=1000, model={"vocab_size": 320})
    done = inspect(config, "--characters", "1000")
    assert done.returncode == 0, done.stderr
    assert "── document 0 of [/x] :smile:, whole of its " in done.stdout
    assert f"\n{text}\n" in done.stdout


@pytest.mark.parametrize("name, got, least", [("packs", -1, 1), ("epoch", -1, 0), ("characters", 0, 1)])
def test_arguments_are_checked_before_any_work(inspect, settings, name, got, least):
    done = inspect(settings(), f"--{name}", str(got))
    message = f"error: --{name}: got {got}, takes a whole number of at least {least}\n"
    assert (done.returncode, done.stderr, done.stdout) == (1, message, "")
