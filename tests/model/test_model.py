import dataclasses
import math

import pytest
import torch

from openllama.config import ModelConfig
from openllama.model import Llama, flops_per_token, parameter_count
from openllama.presets import PRESETS, preset

from .models import BASE, KINDS, make

LENGTHS = (7, 1, 30, 12)


def pack(documents):
    """ids, positions, cu_seqlens and max_seqlen of documents side by side."""
    lengths = torch.tensor([len(d) for d in documents])
    borders = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    positions = torch.cat([torch.arange(len(d), dtype=torch.int32) for d in documents])
    return torch.cat(documents), positions, borders, int(lengths.max())


def documents(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 101, (n,), generator=generator) for n in lengths]


# ---------------------------------------------------------------- documents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_a_changed_document_leaves_the_others_bit_equal(kind, dtype, changed):
    model = make(dtype, **kind)
    before = documents()
    after = [d if i != changed else (d + 1) % 101 for i, d in enumerate(before)]
    with torch.no_grad():
        first, second = (model(*pack(d)).split(LENGTHS) for d in (before, after))
    for i, (a, b) in enumerate(zip(first, second)):
        assert torch.equal(a, b) == (i != changed)


def test_the_others_gradients_stay_bit_equal_too():
    """The embedding rows that only document 2 uses get the same gradient whatever document 0 says."""
    gradients = []
    for first in (1, 2):
        model = make(kv_heads=2)
        pieces = [torch.full((7,), first), torch.arange(50, 80)]
        ids, *rest = pack(pieces)
        model(ids, *rest, labels=ids).backward()
        gradients.append(model.embed.weight.grad[50:80])
    assert torch.equal(*gradients)


def test_packed_equals_dense(kind):
    model = make(**kind)
    pieces = documents()
    with torch.no_grad():
        packed = model(*pack(pieces)).split(LENGTHS)
        for got, piece in zip(packed, pieces):
            torch.testing.assert_close(got, model(piece[None])[0], rtol=1e-5, atol=1e-5)
        rows = torch.stack(documents(lengths=(9, 9, 9)))
        torch.testing.assert_close(model(rows).flatten(0, 1), model(*pack([*rows])), rtol=1e-5, atol=1e-5)


def test_no_token_sees_the_future(kind):
    model = make(**kind)
    ids = documents(lengths=(20,))[0][None]
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 101
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0, :12], model(changed)[0, :12], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- loss and gradients


def test_loss_is_the_sum_over_labels_that_count(kind):
    model = make(**kind)
    ids = torch.stack(documents(lengths=(15, 15)))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(ids).flatten(0, 1), labels.flatten(), reduction="sum"
        )
        torch.testing.assert_close(model(ids, labels=labels), expected)
        assert float(model(ids, labels=torch.full_like(ids, -100))) == 0.0


def test_every_parameter_learns(kind):
    model = make(**kind)
    ids, *rest = pack(documents())
    model(ids, *rest, labels=ids.roll(-1)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_gradients_match_numbers(kind):
    """Directional derivatives in float64, where every op runs on its reference."""
    model = make(torch.float64, **kind)
    ids, *rest = pack(documents())
    labels = ids.roll(-1)
    model(ids, *rest, labels=labels).backward()
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        with torch.no_grad():
            start, step, sides = p.clone(), 1e-6, []
            for sign in (1, -1):
                p.copy_(start + sign * step * direction)
                sides.append(float(model(ids, *rest, labels=labels)))
            p.copy_(start)
        number = (sides[0] - sides[1]) / (2 * step)
        assert math.isclose(float((p.grad * direction).sum()), number, rel_tol=1e-4, abs_tol=1e-4), name


def test_fp32_kernels_match_the_float64_references(kind):
    grads = []
    for dtype in (torch.float32, torch.float64):
        model = make(**kind).to(dtype)
        ids, *rest = pack(documents())
        model(ids, *rest, labels=ids.roll(-1)).backward()
        grads.append({n: p.grad.double() for n, p in model.named_parameters()})
    for name, wide in grads[1].items():
        assert (grads[0][name] - wide).norm() <= 1e-5 * wide.norm(), name


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("tied", [True, False])
def test_tied_stays_tied_after_a_state_dict_round_trip(tied):
    model, other = make(tied=tied), make(tied=tied, seed=9)
    other.load_state_dict(model.state_dict())
    assert (other.head.weight is other.embed.weight) == tied
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    other.to(torch.bfloat16)
    assert (other.head.weight is other.embed.weight) == tied
    assert sum(p.numel() for p in other.parameters()) == parameter_count(other.config)


def test_initialise_statistics():
    config = ModelConfig(2000, 256, 512, 2, 4, kv_heads=2, stable_embedding=True, init_std=0.03)
    model = Llama(config).initialise(1)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            n = p.numel()
            assert abs(float(p.detach().mean())) < 5 * 0.03 / n**0.5, name
            assert abs(float(p.detach().std()) / 0.03 - 1) < 5 / (2 * n) ** 0.5, name
        else:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)), name
    assert PRESETS["7b"].init_std == 0.01


def test_initialise_is_deterministic_and_alike_in_every_dtype():
    config = ModelConfig(**BASE)
    one, same, other = Llama(config).initialise(3), Llama(config).initialise(3), Llama(config).initialise(4)
    half = Llama(config).to(torch.bfloat16).initialise(3)
    for a, b, c, d in zip(one.parameters(), same.parameters(), other.parameters(), half.parameters()):
        assert torch.equal(a, b) and torch.equal(a.to(torch.bfloat16), d)
        assert a.dim() == 1 or not torch.equal(a, c)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    Llama(config).initialise(0)
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    Llama(config)
    assert torch.equal(
        torch.get_rng_state(), expected
    )  # initialise itself draws nothing from the global generator


def test_flops_per_token():
    c = ModelConfig(vocab_size=100, hidden=64, intermediate=96, layers=3, heads=4, kv_heads=2, head_dim=8)
    attention = 64 * (4 + 2 + 2) * 8 + 4 * 8 * 64
    layer = attention + 3 * 64 * 96 + 2 * 64
    multiplying = 3 * layer + 64 + 100 * 64  # the head multiplies, the embedding table is only read
    assert flops_per_token(c, 10) == 6 * multiplying + 6 * 3 * 4 * 8 * 10
    tied = dataclasses.replace(c, tied=True)
    assert flops_per_token(tied, 10) == flops_per_token(c, 10)
    assert 6.5e9 * 6 < flops_per_token(preset("7b"), 1) < 6.9e9 * 6


def test_parameter_count_is_that_of_the_model():
    kinds = [ModelConfig(**BASE | kind) for kind in KINDS.values()]
    for config in (*PRESETS.values(), *kinds):
        with torch.device("meta"):
            model = Llama(config)
        assert parameter_count(config) == sum(p.numel() for p in model.parameters()), config


def test_flops_per_token_builds_no_model(monkeypatch):
    """It is asked for at every logged step: building a model took 8.5 ms for 7b."""
    monkeypatch.setattr("openllama.model.Llama", None)
    assert flops_per_token(preset("7b"), 2048) > 0


def test_preset_counts():
    counts = {name: parameter_count(config) for name, config in PRESETS.items()}
    assert counts["7b"] == 6_885_879_808
    for name, billions in {"125m": 0.124, "13b": 13.2, "33b": 32.9, "65b": 65.6}.items():
        assert math.isclose(counts[name] / 1e9, billions, rel_tol=0.01), name
    with pytest.raises(ValueError, match="preset: got 'lama3-8b'; did you mean 'llama3-8b'"):
        preset("lama3-8b")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        (lambda: {"ids": torch.tensor([[0, 101]])}, ValueError, "ids: got 101, takes 0 to 100"),
        (lambda: {"ids": torch.tensor([[-1, 5]])}, ValueError, "ids: got -1, takes 0 to 100"),
        (lambda: {"ids": torch.tensor([[0.5]])}, TypeError, r"ids: got torch\.float32, takes int32 or int64"),
        (lambda: {"ids": torch.tensor([1, 2])}, ValueError, r"ids: got shape \(2,\), takes \(batch, seq\)"),
        (lambda: {"ids": torch.zeros(1, 129, dtype=torch.int64)}, ValueError, "of 129 tokens, takes at most max_positions=128"),
        (lambda: {"ids": pack(documents())[0], "cu_seqlens": pack(documents())[2]}, ValueError, "positions and max_seqlen"),
        (lambda: {"ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, 101]])}, RuntimeError, "101"),
        (lambda: {"ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1]])}, ValueError, r"labels: got shape \(1,\)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        make()(**arguments())


def test_a_document_longer_than_the_tables_is_named_in_a_pack():
    ids, positions, borders, longest = pack(documents(lengths=(3, 129)))
    with pytest.raises(ValueError, match="of 129 tokens, takes at most max_positions=128"):
        make()(ids, positions, borders, longest)


def test_empty_batches():
    model = make()
    assert model(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 5, 101)
    ids, positions, borders, _ = pack(documents())
    empty_between = torch.cat([borders[:2], borders[1:]])  # an empty document in the pack
    with torch.no_grad():
        assert torch.equal(model(ids, positions, empty_between, 30), model(ids, positions, borders, 30))


# ---------------------------------------------------------------- compile


@pytest.mark.timeout(120)
def test_compile_equals_eager():
    """Blocks stay as they are: the graph breaks around them."""
    model = make(kv_heads=2, tied=True, stable_embedding=True)
    compiled = torch.compile(model, backend="aot_eager")
    ids = torch.stack(documents(lengths=(16, 16)))
    model(ids, labels=ids).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    torch.testing.assert_close(compiled(ids), model(ids))
    compiled(ids, labels=ids).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)
