"""A patched model of transformers computes what it did, the way that it should."""

import copy

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from openllama import block
from openllama.hf import patch

from .hf_models import ARCHITECTURES, KINDS, check_same, error, loss_and_gradients, make, pair


@pytest.fixture
def ids():
    return torch.randint(3, 101, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels(ids):
    labels = ids.clone()
    labels[0, :7] = labels[1, 20:] = -100
    return labels


@pytest.fixture
def halves(monkeypatch):
    """The middles of the halves that ran as a block."""
    ran, half = [], block.half

    def counting(middle, *args):
        ran.append(type(middle).__name__)
        return half(middle, *args)

    monkeypatch.setattr(block, "half", counting)
    return ran


# ---------------------------------------------------------------- loss and gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [True, False])
def test_same_loss_and_gradients(kind, blocks, ids, labels, halves):
    theirs, ours = pair(kind, options={"block": blocks})
    check_same(theirs, ours, input_ids=ids, labels=labels)
    expected = KINDS[kind][2]
    if expected is not None:  # of 2 layers
        assert len(halves) == (2 * expected if blocks else 0)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("blocks", [True, False])
def test_bf16_is_as_near_to_fp32_as_theirs(kind, blocks, ids, labels):
    exact = make(kind)
    theirs, ours = pair(kind, torch.bfloat16, {"block": blocks})
    for model in (exact, theirs, ours):
        model.load_state_dict(make(kind, torch.bfloat16).state_dict())
    results = [loss_and_gradients(m, input_ids=ids, labels=labels) for m in (exact, theirs, ours)]
    (loss, wanted), (their_loss, their_gradients), (our_loss, our_gradients) = results
    assert abs(our_loss - loss) <= 2 * abs(their_loss - loss) + 2e-3 * loss
    for name, gradient in wanted.items():
        assert our_gradients[name].dtype == torch.bfloat16
        assert error(our_gradients[name], gradient) <= 1.5 * error(their_gradients[name], gradient) + 2e-3, (
            name
        )


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_frozen_weights(kind, ids, halves):
    theirs, ours = pair(kind)
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("1.mlp.up" in name or "0.self_attn.k_proj" in name)
    check_same(theirs, ours, input_ids=ids, labels=ids)
    for model in (theirs, ours):  # and all of it, but the norms and biases
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() == 1)
    check_same(theirs, ours, input_ids=ids, labels=ids)
    assert halves


@pytest.mark.parametrize("blocks", [True, False])
def test_gradients_add_up_over_micro_batches(blocks, ids):
    theirs, ours = pair(options={"block": blocks})
    for model in (theirs, ours):
        for part in ids:
            model(input_ids=part[None], labels=part[None], num_items_in_batch=58).loss.backward()
    for ours_, theirs_ in zip(ours.parameters(), theirs.parameters()):
        assert error(ours_.grad, theirs_.grad) <= 1e-5


# ---------------------------------------------------------------- masks and positions


def left_padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("kind", ["llama", "llama-eager", "mistral-window", "qwen2", "qwen3"])
def test_left_padding(kind, ids, halves):
    theirs, ours = pair(kind)
    ids, mask = left_padded(ids)
    labels = ids.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    check_same(theirs, ours, input_ids=ids, attention_mask=mask, labels=labels, position_ids=positions)
    assert "Attention" not in halves


def test_a_mask_of_ones_is_none(ids, halves):
    theirs, ours = pair()
    check_same(theirs, ours, input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    assert len(halves) == 4


@pytest.mark.parametrize("kind", ["llama", "llama-eager", "qwen2", "qwen3"])
def test_position_ids(kind, ids, halves):
    theirs, ours = pair(kind)
    plain = torch.arange(5, 35).repeat(2, 1)
    check_same(theirs, ours, input_ids=ids, position_ids=plain, labels=ids, use_cache=False)
    assert ("Attention" in halves) == (kind in ("llama", "qwen2"))
    halves.clear()
    restarting = torch.cat((torch.arange(11), torch.arange(19)))[None]
    packed = {"input_ids": ids[:1], "position_ids": restarting, "labels": ids[:1]}
    check_same(theirs, ours, **packed, use_cache=False)
    check_same(theirs, ours, **packed)  # with their default, a cache, they see one document
    assert "Attention" not in halves


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("blocks", [True, False])
def test_packed_documents_by_their_borders(kind, blocks, ids):
    """What TRL's padding-free batches give; HuggingFace's SDPA would need a mask of (tokens, tokens)."""
    theirs, ours = pair(kind, options={"block": blocks})
    borders = torch.tensor([0, 11, 12, 30], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (11, 1, 18)])[None]
    packing = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 18, "max_length_k": 18}
    row = {"input_ids": ids[:1], "position_ids": positions, "labels": ids[:1], "use_cache": False}
    wanted, gradients = loss_and_gradients(theirs, **row)
    loss, got = loss_and_gradients(ours, **row, **packing)
    assert abs(loss - wanted) <= 1e-5 * wanted
    assert all(error(got[name], gradients[name]) <= 1e-5 for name in gradients)


# ---------------------------------------------------------------- which way


def test_blocks_run_without_gradients_too(ids, halves):
    theirs, ours = pair()
    for model in (theirs, ours):
        model.eval()
    with torch.no_grad():
        logits = [m(input_ids=ids, labels=ids, use_cache=False).logits for m in (theirs, ours)]
    assert error(logits[1], logits[0]) <= 1e-5 and len(halves) == 4


def hook(model):
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, args, out: out * 2)
    model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda module, args, out: out * 2)


def test_hooks_within_a_layer_run(ids, halves):
    theirs, ours = pair()
    for model in (theirs, ours):
        hook(model)
    check_same(theirs, ours, input_ids=ids, labels=ids)
    assert sorted(halves) == ["Attention", "Swiglu"]


def test_hooks_on_layers_run(ids, halves):
    theirs, ours = pair()
    seen = []
    for model in (theirs, ours):
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, out: seen.append(out) or out * 0.5)
    check_same(theirs, ours, input_ids=ids, labels=ids)
    assert len(halves) == 4 and len(seen) == 4
    assert error(seen[3], seen[1]) <= 1e-5


def test_dropout_and_autocast_go_op_by_op(ids, halves):
    theirs, ours = pair(attention_dropout=0.5)
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        losses.append(model(input_ids=ids, labels=ids).loss)
    assert "Attention" not in halves and abs(losses[0] - losses[1]) < 0.5
    halves.clear()
    for kind in ("llama", "qwen3"):
        theirs, ours = pair(kind)
        with torch.autocast("cpu", torch.bfloat16):
            check_same(theirs, ours, 3e-2, input_ids=ids, labels=ids)
    assert not halves


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_gradient_checkpointing(kind, reentrant, ids, halves):
    theirs, ours = pair(kind)
    for model in (theirs, ours):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    check_same(theirs, ours, input_ids=ids, labels=ids)
    # reentrant, all run without gradients, and again, last to first, with them
    assert len(halves) == (4 * KINDS[kind][2] if reentrant else 0)


@pytest.mark.parametrize("blocks", [True, False])
def test_a_checkpoint_and_an_offload_from_outside(blocks, ids, halves):
    theirs, ours = pair(options={"block": blocks})
    with torch.autograd.graph.save_on_cpu():
        ours(input_ids=ids, labels=ids)
    apply_activation_checkpointing(ours, check_fn=lambda module: "DecoderLayer" in type(module).__name__)
    loss, gradients = loss_and_gradients(theirs, input_ids=ids, labels=ids)
    ours_loss, got = loss_and_gradients(ours, input_ids=ids, labels=ids)
    assert abs(ours_loss - loss) <= 1e-5 * loss and not halves
    assert len(got) == len(gradients)
    for name, gradient in got.items():
        assert error(gradient, gradients[name.replace("_checkpoint_wrapped_module.", "")]) <= 1e-5


class Lora(torch.nn.Module):
    """What PEFT puts in a linear layer's place."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a = torch.nn.Linear(base.in_features, 4, bias=False)
        self.b = torch.nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 2 * self.b(self.a(x))


@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("down_proj",), ("gate_proj", "o_proj"), ("lm_head",)]
)
def test_lora(targets, ids, halves):
    theirs = make("qwen2")
    theirs.requires_grad_(False)
    for module in list(theirs.modules()):
        for name, child in list(module.named_children()):
            if name in targets:
                setattr(module, name, Lora(child))
    ours = patch(copy.deepcopy(theirs))
    check_same(theirs, ours, input_ids=ids, labels=ids)
    attention = not {"q_proj", "o_proj"} & set(targets)
    mlp = not {"gate_proj", "down_proj"} & set(targets)
    assert halves == (["Attention"] * attention + ["Swiglu"] * mlp) * 2


# ---------------------------------------------------------------- the model's other outputs


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_hidden_states_are_recorded_and_blocks_stay(kind, ids, halves):
    theirs, ours = pair(kind)
    outputs = [m(input_ids=ids, labels=ids, output_hidden_states=True) for m in (theirs, ours)]
    states = [o.hidden_states for o in outputs]
    assert len(states[0]) == len(states[1]) == 3
    assert all(error(a, b) <= 1e-5 for a, b in zip(states[1], states[0]))
    halves.clear()
    ours(input_ids=ids, labels=ids)
    assert len(halves) == 2 * KINDS[kind][2]


def test_attentions_are_recorded(ids):
    theirs, ours = pair("llama-eager")
    a, b = (m(input_ids=ids, output_attentions=True).attentions for m in (theirs, ours))
    assert len(a) == len(b) == 2 and all(error(y, x) <= 1e-5 for x, y in zip(a, b))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_gives_the_same_ids(architecture, ids):
    theirs, ours = pair(architecture.lower())
    padded, mask = left_padded(ids)
    for inputs in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        a, b = (m.eval().generate(**inputs, max_new_tokens=12, do_sample=False) for m in (theirs, ours))
        assert torch.equal(a, b) and a.shape[1] > ids.shape[1]
