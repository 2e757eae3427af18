import dataclasses
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from openllama import hf
from openllama.config import ModelConfig
from openllama.hf import export_hf, exported_parameter_count, import_hf
from openllama.model import parameter_count
from openllama.presets import preset

from .models import LLAMA3, YARN, make


def theirs(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def error(ours, other):
    """The largest difference, as a share of the largest logit."""
    return float((ours - other).abs().max() / other.abs().max())


def logits(model, ids):
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


# ---------------------------------------------------------------- logits


def test_export_has_transformers_logits(kind, ids, tmp_path):
    model = make(**kind)
    other = theirs(export_hf(model, tmp_path / "hf"))
    assert error(logits(model, ids), logits(other, ids)) <= 1e-5
    assert sum(p.numel() for p in other.parameters()) == exported_parameter_count(model.config)
    if not model.config.stable_embedding:
        assert other.num_parameters() == parameter_count(model.config)


def test_packed_documents_have_transformers_logits(kind, tmp_path):
    model = make(**kind)
    other = theirs(export_hf(model, tmp_path / "hf"))
    documents = [
        torch.randint(0, 101, (n,), generator=torch.Generator().manual_seed(n)) for n in (1, 17, 60, 5)
    ]
    borders = torch.tensor([0, 1, 18, 78, 83], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(d), dtype=torch.int32) for d in documents])
    with torch.no_grad():
        packed = model(torch.cat(documents), positions, borders, 60).split([len(d) for d in documents])
    for got, document in zip(packed, documents):
        assert error(got, logits(other, document[None])[0]) <= 1e-5


def test_round_trip_is_exact_to_the_bit(kind, ids, tmp_path):
    model = make(**kind)
    back = import_hf(export_hf(model, tmp_path / "hf"))
    if model.config.stable_embedding:  # the fold stays
        assert not back.config.tied and not back.config.stable_embedding and back.embed_norm is None
        assert torch.equal(back.head.weight, model.head.weight)
        assert error(logits(back, ids), logits(model, ids)) <= 1e-6
        return
    assert back.config == model.config
    assert (back.head.weight is back.embed.weight) == model.config.tied
    for name, value in model.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
    export_hf(back, tmp_path / "again")
    first, again = (load_file(tmp_path / f / "model.safetensors") for f in ("hf", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)


HF_KINDS = {
    "mha": {},
    "gqa-tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "head-dim": {"head_dim": 20, "num_key_value_heads": 1},
    "llama3-rope": {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}},
    "yarn-rope": {
        "rope_parameters": {
            **YARN,
            "rope_theta": 500.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        }
    },
}


@pytest.mark.parametrize("name", HF_KINDS)
@pytest.mark.parametrize("shard", ["5GB", "50KB"], ids=["one-file", "sharded"])
def test_import_of_a_random_hf_model(name, shard, ids, tmp_path):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=101, hidden_size=48, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.1, **HF_KINDS[name],
    )  # fmt: skip
    other = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    other.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > (shard == "50KB")
    ours = import_hf(tmp_path)
    assert error(logits(ours, ids), logits(other, ids)) <= 1e-5
    assert parameter_count(ours.config) == other.num_parameters()


def test_bfloat16_and_dtypes(ids, tmp_path):
    model = make(torch.bfloat16, kv_heads=2)
    export_hf(model, tmp_path / "bf16")
    assert json.loads((tmp_path / "bf16/config.json").read_text())["dtype"] == "bfloat16"
    assert import_hf(tmp_path / "bf16").embed.weight.dtype == torch.bfloat16
    wide = import_hf(tmp_path / "bf16", torch.float32)
    assert error(logits(wide, ids), logits(theirs(tmp_path / "bf16"), ids)) <= 1e-5
    export_hf(model, tmp_path / "fp32", dtype=torch.float32)
    assert import_hf(tmp_path / "fp32").embed.weight.dtype == torch.float32


def test_fold_of_a_bfloat16_model_is_its_own_forward(tmp_path):
    model = make(torch.bfloat16, stable_embedding=True, tied=True)
    export_hf(model, tmp_path / "hf")
    table = load_file(tmp_path / "hf/model.safetensors")["model.embed_tokens.weight"]
    with torch.no_grad():
        assert torch.equal(table, model.embed_norm(model.embed(torch.arange(101))))


def test_export_in_shards(ids, tmp_path):
    model = make(stable_embedding=True, tied=True)
    export_hf(model, tmp_path / "hf", shard_bytes=60_000)
    index = json.loads((tmp_path / "hf" / hf.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert error(logits(model, ids), logits(theirs(tmp_path / "hf"), ids)) <= 1e-5
    assert torch.equal(logits(import_hf(tmp_path / "hf"), ids), logits(make_untied(model), ids))
    export_hf(model, tmp_path / "hf")  # over it: no shard and no index stays
    assert (
        not (tmp_path / "hf" / hf.INDEX).exists() and len(list((tmp_path / "hf").glob("*.safetensors"))) == 1
    )


def make_untied(model):
    """The folded twin of a model with a stable embedding, made by hand."""
    options = dataclasses.asdict(model.config) | {"stable_embedding": False, "tied": False}
    twin = make(**options)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("embed_norm")}
    with torch.no_grad():
        state["embed.weight"] = model.embed_norm(model.embed.weight)
    twin.load_state_dict(state)
    return twin


# ---------------------------------------------------------------- counts


def test_published_parameter_counts():
    counts = {"7b": 6_885_879_808, "llama3-8b": 8_030_261_248, "1b": 1_235_814_400}
    assert {name: parameter_count(preset(name)) for name in counts} == counts
    assert exported_parameter_count(preset("7b")) == 7_295_471_616
    assert exported_parameter_count(preset("llama3-8b")) == counts["llama3-8b"]
    assert exported_parameter_count(preset("1b")) == counts["1b"]


def test_random_configs_have_transformers_counts():
    rng = random.Random(0)
    for _ in range(20):
        kv_heads = rng.randint(1, 4)
        heads = kv_heads * rng.randint(1, 4)
        ours = ModelConfig(
            vocab_size=rng.randint(1, 999), hidden=heads * 2 * rng.randint(1, 9), intermediate=rng.randint(1, 99),
            layers=rng.randint(1, 4), heads=heads, kv_heads=kv_heads, head_dim=rng.choice([0, 2, 10]),
            tied=rng.random() < 0.5, stable_embedding=rng.random() < 0.3,
        )  # fmt: skip
        with torch.device("meta"):
            other = LlamaForCausalLM(LlamaConfig(**hf.config_to_hf(ours, torch.float32)))
        assert exported_parameter_count(ours) == other.num_parameters(), ours
        if not ours.stable_embedding:
            assert parameter_count(ours) == other.num_parameters(), ours


# ---------------------------------------------------------------- damaged and foreign folders


@pytest.fixture
def exported(tmp_path):
    export_hf(make(kv_heads=2), tmp_path / "hf")
    return tmp_path / "hf"


def change(folder, **tensors):
    """Replaces weights of an export by name (`__` for a dot); None takes one out."""
    state = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        state.pop(name.replace("__", "."), None)
        if value is not None:
            state[name.replace("__", ".")] = value
    save_file(state, folder / "model.safetensors")


def test_weights_that_do_not_fit_are_named(exported):
    change(exported, model__norm__weight=None)
    with pytest.raises(ValueError, match=r"missing model\.norm\.weight"):
        import_hf(exported)
    change(exported, model__norm__weight=torch.ones(47), model__norm__bias=torch.ones(48))
    with pytest.raises(
        ValueError, match=r"unexpected model\.norm\.bias; model\.norm\.weight has shape \(47,\), takes"
    ):
        import_hf(exported)
    change(exported, model__norm__weight=torch.ones(48, dtype=torch.int8), model__norm__bias=None)
    with pytest.raises(ValueError, match="got I8"):
        import_hf(exported)


def test_missing_and_pickled_files(exported, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        import_hf(tmp_path / "nowhere")
    (exported / "model.safetensors").rename(exported / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"got pytorch_model.bin, takes model.safetensors: pickle can run code"
    ):
        import_hf(exported)
    (exported / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        import_hf(exported)
    (exported / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not valid JSON"):
        import_hf(exported)
    (exported / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        import_hf(exported)


def test_truncated_and_missing_shards(tmp_path):
    folder = export_hf(make(), tmp_path / "hf", shard_bytes=60_000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{shard.name}: not a whole safetensors file"):
        import_hf(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}: no such file"):
        import_hf(folder)
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../../x.safetensors"}}))
    with pytest.raises(
        ValueError, match=r"got file '../../x.safetensors', takes a \.safetensors file of this folder"
    ):
        import_hf(folder)


def test_a_tied_head_that_is_stored_too(tmp_path):
    model = make(tied=True)
    folder = export_hf(model, tmp_path / "hf")
    change(folder, lm_head__weight=model.embed.weight.detach().clone())
    assert import_hf(folder).config.tied
    change(folder, lm_head__weight=model.embed.weight.detach() + 1)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        import_hf(folder)


def test_old_rotary_tables_are_ignored(exported):
    change(exported, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(6))
    import_hf(exported)


# ---------------------------------------------------------------- targets and full disks


def test_only_an_export_of_ours_is_replaced(exported, tmp_path):
    model = make()
    export_hf(model, exported)
    assert import_hf(exported).config == model.config
    (exported / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="hf: is there already and holds something else"):
        export_hf(model, exported)
    assert (exported / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="file: is there already"):
        export_hf(model, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    export_hf(model, tmp_path / "empty")
    foreign = tmp_path / "foreign"
    shutil.copytree(tmp_path / "empty", foreign)
    config = json.loads((foreign / "config.json").read_text())
    del config[hf.MARK]
    (foreign / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileExistsError):
        export_hf(model, foreign)


@pytest.mark.parametrize(
    "message", [OSError(28, "No space left on device"), RuntimeError("I/O: No space left")]
)
def test_a_full_disk_leaves_what_was_there(exported, tmp_path, monkeypatch, message):
    def full(tensors, path, **_):
        path.write_bytes(b"half")
        raise message

    before = (exported / "model.safetensors").read_bytes()
    monkeypatch.setattr(hf, "save_file", full)
    for target in (exported, tmp_path / "new"):
        with pytest.raises(OSError, match="the disk is full, nothing of this is kept"):
            export_hf(make(), target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
    assert (exported / "model.safetensors").read_bytes() == before


def test_too_little_room_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(OSError, match=r"takes 0\.02 GB and 0\.00 GB are free"):
        export_hf(make(), tmp_path / "hf")
    assert not any(tmp_path.iterdir())
