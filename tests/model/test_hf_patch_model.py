"""The loss's options; what patch leaves alone and unpatch gives back; copies, errors, and sharded models."""

import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from openllama import hf_patch
from openllama.hf import patch, unpatch
from openllama.hf_layers import is_ours

from .hf_models import ARCHITECTURES, SIZES, check_same, error, loss_and_gradients, make, pair


@pytest.fixture
def ids():
    return torch.randint(3, 101, (2, 30), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("count", [7, torch.tensor(7), torch.tensor([7.0])])
def test_num_items_in_batch(count, ids):
    theirs, ours = pair()
    check_same(theirs, ours, input_ids=ids, labels=ids, num_items_in_batch=count)


def test_shifted_labels_ignored_ones_and_embeddings_as_inputs(ids):
    theirs, ours = pair()
    labels = ids.masked_fill(ids % 3 == 0, -1)
    check_same(theirs, ours, input_ids=ids, labels=labels, ignore_index=-1)
    shifted = ids.roll(-1, 1).masked_fill(ids % 5 == 0, -100)
    check_same(theirs, ours, input_ids=ids, labels=labels, shift_labels=shifted)
    embeds = theirs.model.embed_tokens(ids).detach()
    check_same(theirs, ours, inputs_embeds=embeds, labels=ids)
    loss, gradients = loss_and_gradients(ours, input_ids=ids, labels=torch.full_like(ids, -100))
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


def test_logits_are_made_where_someone_reads_them(ids):
    theirs, ours = pair()
    assert ours(input_ids=ids, labels=ids).logits is None
    assert ours(ids, None, labels=ids).logits is None
    assert len(ours(input_ids=ids, labels=ids, return_dict=False)) == 1
    for inputs in ({}, {"labels": ids, "logits_to_keep": 30}):
        a, b = (m(input_ids=ids, **inputs) for m in (theirs, ours))
        assert error(b.logits, a.logits) <= 1e-5
    a, b = (m.eval()(input_ids=ids, labels=ids) for m in (theirs, ours))
    assert error(b.logits, a.logits) <= 1e-5 and error(b.loss, a.loss) <= 1e-5
    patch(ours, logits=True)
    a, b = (m.train()(input_ids=ids, labels=ids) for m in (theirs, ours))
    assert error(b.logits, a.logits) <= 1e-5 and error(b.loss, a.loss) <= 1e-5


def test_another_loss_function_is_called(ids):
    model = patch(make())
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 5
    assert model(input_ids=ids, labels=ids).loss == 5


def test_a_cache_is_there_where_it_is_asked_for(ids):
    theirs, ours = pair()
    name = "cache" if "cache" in theirs(input_ids=ids) else "past_key_values"
    assert ours(input_ids=ids, labels=ids, use_cache=True)[name].get_seq_length() == 30
    assert ours.eval()(input_ids=ids)[name].get_seq_length() == 30
    empty = transformers.DynamicCache()
    ours(input_ids=ids, **{name: empty})
    assert empty.get_seq_length() == 30
    assert getattr(ours.train()(input_ids=ids, labels=ids), name) is None


# ---------------------------------------------------------------- models and wrappers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_without_a_head_and_with_another(architecture, ids):
    config = getattr(transformers, f"{architecture}Config")(**SIZES, num_labels=3)
    for name in ("Model", "ForSequenceClassification", "ForTokenClassification"):
        theirs = getattr(transformers, architecture + name)(config).eval()
        ours = patch(copy.deepcopy(theirs))
        a, b = (m(input_ids=ids, use_cache=False)[0] for m in (theirs, ours))
        assert error(b, a) <= 1e-5


def test_a_wrapper_is_walked_through(ids):
    wrapper = nn.Sequential(nn.ModuleDict({"base": make()}))
    assert patch(wrapper) is wrapper and is_ours(wrapper[0]["base"].model.layers[1])
    assert unpatch(wrapper) is wrapper and not any(map(is_ours, wrapper.modules()))


def test_a_forward_of_the_users_own_stays(ids):
    class Own(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return "mine"

    model = Own(make().config)
    patch(model)
    assert model(input_ids=ids) == "mine" and not is_ours(model) and is_ours(model.model)


# ---------------------------------------------------------------- the way back


def test_weights_stay_where_they_are_and_unpatch_restores(ids):
    model = make("qwen2")
    classes = [type(m) for m in model.modules()]
    parameters = dict(model.named_parameters())
    state, attributes = set(model.state_dict()), [set(vars(m)) for m in model.modules()]
    loss, gradients = loss_and_gradients(model, input_ids=ids, labels=ids)
    patch(model)
    assert all(
        isinstance(m, cls) and type(m).__name__ == cls.__name__ for m, cls in zip(model.modules(), classes)
    )
    assert set(model.state_dict()) == state
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    loss_and_gradients(model, input_ids=ids, labels=ids)
    unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    again, got = loss_and_gradients(model, input_ids=ids, labels=ids)
    assert again == loss and all(torch.equal(got[name], gradients[name]) for name in gradients)


def test_twice_is_once_and_unpatched_stays(ids):
    model = make()
    assert unpatch(model) is model
    patch(patch(model), block=False)
    assert type(model).__mro__[1] is transformers.LlamaForCausalLM
    unpatch(model)
    assert type(model) is transformers.LlamaForCausalLM


def test_copies_and_pickles_are_patched_models_of_their_own(ids):
    model = patch(make("qwen3"), logits=True)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loss = model(input_ids=ids, labels=ids).loss
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert type(other) is type(model) and vars(other)[hf_patch.OPTIONS].logits
        assert torch.equal(other(input_ids=ids, labels=ids).loss, loss)
        with torch.no_grad():
            other.lm_head.weight.zero_()
        unpatch(other)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, loss) and is_ours(model)


def test_saving_and_signatures_are_theirs(tmp_path):
    import inspect

    theirs, ours = pair()
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    for a, b in zip(theirs.modules(), ours.modules()):
        assert inspect.signature(a.forward) == inspect.signature(b.forward)


# ---------------------------------------------------------------- errors


def test_other_architectures_and_versions(monkeypatch):
    with pytest.raises(
        TypeError, match="model: got Linear, takes one of transformers' LlamaModel, MistralModel"
    ):
        patch(nn.Linear(2, 2))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=9))
    with pytest.raises(TypeError, match="got GPT2LMHeadModel"):
        patch(gpt2)
    monkeypatch.setattr(hf_patch, "TRIED", ("5.1.0", "5.2.0"))
    model, wanted = (
        make(),
        r"transformers: got version 5\.\d+\.0, takes 5\.1\.0 or 5\.2\.0.*untried_version=True",
    )
    with pytest.raises(ValueError, match=wanted):
        patch(model)
    assert not is_ours(model)
    assert is_ours(patch(model, untried_version=True))


def test_a_forward_replaced_on_the_instance():
    model = make()
    layer = model.model.layers[1]
    layer.forward = layer.forward
    with pytest.raises(ValueError, match=r"model: got model\.layers\.1 whose forward is replaced"):
        patch(model)
    assert not is_ours(model)
    del layer.forward
    patch(model)
    model.forward = model.forward
    with pytest.raises(ValueError, match="takes it without"):
        unpatch(model)


# ---------------------------------------------------------------- two processes

SCRIPT = """
import copy, os, sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tests.model.hf_models import error, loss_and_gradients, make
from openllama import block
from openllama.hf import patch, unpatch

torch.set_num_threads(1)
device, rank = sys.argv[1], int(os.environ["RANK"])
if device == "cuda":
    torch.cuda.set_device(rank)
dist.init_process_group("nccl" if device == "cuda" else "gloo")
ids = torch.randint(3, 101, (2, 30), generator=torch.Generator().manual_seed(0)).to(device)
one = ids[rank : rank + 1]
ran, half = [], block.half
block.half = lambda middle, *args: ran.append(middle) or half(middle, *args)

def new():
    return make("qwen2").to(device)

def shard(model, **policy):
    mesh = init_device_mesh(device, (2,))  # by itself it takes GPUs, where there are some
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)

def full(gradients):
    return {k.removeprefix("module."): g.full_tensor() if isinstance(g, DTensor) else g for k, g in gradients.items()}

wanted = full(loss_and_gradients(new(), input_ids=ids, labels=ids)[1])
for name, model in {
    "ddp": DistributedDataParallel(patch(new())),
    "patched inside ddp": patch(DistributedDataParallel(new())),
    "fsdp2": shard(patch(new())),
    "patched after fsdp2": patch(shard(new())),
}.items():
    ran.clear()
    got = full(loss_and_gradients(model, input_ids=one, labels=one)[1])
    assert len(ran) == 4, (name, len(ran))
    assert got.keys() == wanted.keys(), name
    worst = max((error(got[k], wanted[k]), k) for k in wanted)
    assert worst[0] <= 1e-5, (name, worst)
    if "fsdp2" in name:  # and the sharded model without ours is one of theirs
        unpatch(model)
        assert type(model.model.layers[0]).__name__ == "FSDPQwen2DecoderLayer"
        got = full(loss_and_gradients(model, input_ids=one, labels=one)[1])
        assert len(ran) == 4 and max(error(got[k], wanted[k]) for k in wanted) <= 1e-5, name

half_precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
ran.clear()
theirs, ours = (loss_and_gradients(shard(m, mp_policy=half_precision), input_ids=one, labels=one)
                for m in (new(), patch(new())))
assert len(ran) == 4
theirs, ours = full(theirs[1]), full(ours[1])
for k in wanted:
    assert error(ours[k], wanted[k]) <= 1.5 * error(theirs[k], wanted[k]) + 2e-3, k
dist.destroy_process_group()
print("all the same")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="gloo by torchrun")
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
            ],
        ),
    ],
)
def test_ddp_and_fsdp2(device, tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "run.py",
        device,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("all the same") == 2, done.stdout + done.stderr


# ---------------------------------------------------------------- what layers are given, and asked


def test_gradients_of_a_layers_output_and_inputs_of_any_strides():
    """A sum's gradient has no strides, and inputs_embeds may be transposed."""
    theirs, ours = pair()
    ids = torch.randint(3, 101, (2, 12), generator=torch.Generator().manual_seed(0))
    embeds = torch.randn(48, 2, 12, generator=torch.Generator().manual_seed(1)).permute(1, 2, 0)
    for given in ({"input_ids": ids, "output_hidden_states": True}, {"inputs_embeds": embeds}):
        grads = []
        for model in (theirs, ours):
            model.zero_grad()
            out = model.model(use_cache=False, **given)
            (out.hidden_states[1] if out.hidden_states else out.last_hidden_state).sum().backward()
            grads.append(model.model.layers[0].mlp.down_proj.weight.grad)
        assert error(*grads) < 1e-5


@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
def test_a_layer_with_dropout_of_its_own_stays_causal(implementation):
    theirs, ours = pair(attn_implementation=implementation)
    for model in (theirs, ours):
        model.model.layers[0].self_attn.attention_dropout = 1e-12
    ids = torch.randint(3, 101, (2, 12), generator=torch.Generator().manual_seed(0))
    check_same(theirs, ours, input_ids=ids, labels=ids)


def test_a_new_model_of_a_patched_ones_class_trains():
    _, ours = pair()
    ids = torch.randint(3, 101, (2, 12), generator=torch.Generator().manual_seed(0))
    new = type(ours)(ours.config).train()
    loss = new(input_ids=ids, labels=ids).loss
    assert loss.isfinite() and loss.requires_grad
