"""The key-value cache: the same logits as without one, in less work."""

import pytest
import torch

from openllama.decoder import Decoder
from openllama.model import Embedding

from .models import last_logits, make

LENGTHS = (1, 40, 7, 1, 23)


def contexts(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 101, (n,), generator=generator).tolist() for n in lengths]


def near(got, expected, share=1e-5):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    difference = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert difference <= share, f"differs by {difference:.1e} of the largest logit"


@pytest.fixture
def passes(monkeypatch):
    """Tokens of each pass through the model, from here on."""
    counts = []
    forward = Embedding.forward
    monkeypatch.setattr(
        Embedding, "forward", lambda self, ids, *rest: (counts.append(len(ids)), forward(self, ids, *rest))[1]
    )
    return counts


@torch.no_grad()
def grow(model, rows, steps, share=1e-5, seen=lambda row: row):
    """Decodes and compares at each step; a row goes on with ids that have nothing to do with its logits."""
    decoder = Decoder(model, rows, steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        near(decoder.logits(), last_logits(model, [seen(row) for row in rows]), share)
        for i, token in enumerate(torch.randint(0, 101, (len(rows),), generator=generator).tolist()):
            rows[i].append(token)
            decoder.append(i, token)
    return decoder


def test_logits_equal_those_without_a_cache(kind):
    grow(make(**kind), contexts(), 30)


@pytest.mark.parametrize(
    "dtype, share", [(torch.float64, 1e-13), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_other_dtypes(dtype, share):
    decoder = grow(make(dtype, kv_heads=2, stable_embedding=True), contexts(), 10, share)
    assert decoder.cache.dtype == dtype


@pytest.mark.parametrize("going", [[0], [4], [1, 2], [0, 3, 4], [0, 1, 2, 3, 4]], ids=str)
@torch.no_grad()
def test_rows_that_go_leave_the_others_as_they_are(going):
    model, rows = make(kv_heads=2), contexts()
    decoder = Decoder(model, rows, 20)
    for step in range(12):
        near(decoder.logits(), last_logits(model, rows))
        for i, row in enumerate(rows):
            row.append((7 * step + i) % 101)
            decoder.append(i, row[-1])
        if step == 5:
            staying = [i for i in range(len(rows)) if i not in going]
            decoder.keep(staying)
            rows = [rows[i] for i in staying]
        if not rows:
            break


@torch.no_grad()
def test_a_row_goes_as_another_outgrows_the_context():
    model, rows = make(kv_heads=2, max_positions=16), contexts((3, 16, 9))
    decoder = Decoder(model, rows, 5)
    decoder.logits()
    for i, row in enumerate(rows):
        row.append(50 + i)
        decoder.append(i, row[-1])
    decoder.keep([1, 2])
    for token in (5, 6, 7):
        near(decoder.logits(), last_logits(model, [rows[1][5:], rows[2]]))
        for i in (0, 1):
            rows[1 + i].append(token)
            decoder.append(i, token)


@torch.no_grad()
def test_each_step_computes_one_token_of_each_row_left(passes):
    decoder = Decoder(make(), contexts(), 20)
    for step, left in enumerate((5, 5, 3, 3, 1)):
        decoder.keep(range(left))
        decoder.logits()
        assert passes == ([sum(LENGTHS) - 5] if step == 0 else []) + [left]
        passes.clear()
        for row in range(left):
            decoder.append(row, 0)


def window(tokens, limit):
    """What the model sees of a context: by definition, a token at a time."""
    seen = list(tokens[0])
    for token in tokens[1:]:
        seen.append(token)
        if len(seen) > limit:
            seen = seen[-(limit - limit // 4) :]
    return seen


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 64])
def test_a_full_context_drops_its_oldest_quarter(limit):
    model = make(kv_heads=2, max_positions=limit)
    rows = contexts((1, limit, limit + 20, max(1, limit - 1)))
    prompts = [len(row) for row in rows]

    def seen(row):
        prompt = prompts[[row is r for r in rows].index(True)]
        return window([row[:prompt][-limit:], *row[prompt:]], limit)

    decoder = grow(model, rows, 2 * limit + 5, seen=seen)
    assert decoder.cache.shape[3] == limit


@torch.no_grad()
def test_a_full_context_is_read_anew_once_a_quarter(passes):
    model = make(max_positions=64)
    decoder = Decoder(model, contexts((64, 10)), 60)
    for _ in range(52):
        decoder.logits()
        decoder.append(0, 1)
        decoder.append(1, 1)
    # after steps 0, 17 and 34 the first row has 65 tokens; 48 stay, of which the last is the next step's
    assert [n for n in passes if n > 2] == [63 + 9, 47, 47, 47]
    assert len(passes) == 52 + 4


@pytest.mark.parametrize(
    "lengths, new, capacity", [((1, 40), 20, 60), ((1, 40), 200, 128), ((300, 2), 5, 128)]
)
def test_the_cache_has_the_size_that_is_needed(lengths, new, capacity):
    model = make(torch.bfloat16, kv_heads=2)
    cache = Decoder(model, contexts(lengths), new).cache
    assert cache.shape == (2, 2, 2, capacity, 2, 12) and cache.dtype == torch.bfloat16


@torch.no_grad()
def test_hidden_states_with_a_cache_of_ones_own():
    """As in the docstring: a pack into the rows, an empty document leaves its own, then a token a row."""
    model, (a, b) = make(kv_heads=1), contexts((5, 9))
    cache = model.new_cache(2, 16)
    for i, (row, borders) in enumerate([(a, [0, 5, 5]), (b, [0, 0, 9])]):
        before = cache.clone()
        positions = torch.arange(len(row), dtype=torch.int32)
        model.hidden_states(
            torch.tensor(row), positions, torch.tensor(borders, dtype=torch.int32), len(row), cache
        )
        assert torch.equal(cache[:, :, 1 - i], before[:, :, 1 - i]) and cache[:, :, i, : len(row)].all()
    hidden = model.hidden_states(torch.tensor([3, 4]), torch.tensor([5, 9], dtype=torch.int32), cache=cache)
    near(model.head(hidden), last_logits(model, [[*a, 3], [*b, 4]]))


def test_errors_name_the_argument():
    model = make(max_positions=32)
    with pytest.raises(ValueError, match="capacity: got 33, takes at most max_positions=32"):
        model.new_cache(1, 33)
    ids, one = torch.tensor([1, 2]), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="cache: got 3 rows, takes 2"):
        model.hidden_states(ids, one, cache=model.new_cache(3, 8))
    with pytest.raises(ValueError, match="cache: got 3 rows, takes 1"):
        model.hidden_states(ids, one, torch.tensor([0, 2], dtype=torch.int32), 2, model.new_cache(3, 8))
    with pytest.raises(ValueError, match=r"positions .*: got None, takes .* positions with a cache"):
        model.hidden_states(ids, cache=model.new_cache(2, 8))


def test_a_backward_through_a_cache_is_refused():
    model = make()
    hidden = model.hidden_states(
        torch.tensor([1, 2]), torch.zeros(2, dtype=torch.int32), cache=model.new_cache(2, 8)
    )
    with pytest.raises(RuntimeError, match="cache: has no backward; takes a forward under"):
        hidden.sum().backward()
