import pytest
import torch

from openllama.generate import sample

from .models import last_logits, make

PROMPTS = [[1], [5, 6, 7], list(range(40))]


@pytest.fixture(scope="module")
def model():
    return make(kv_heads=2, max_positions=64)


def one_by_one(model, prompt, count):
    """Greedy, with the dense forward and no window."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(last_logits(model, [ids])[0].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_the_dense_forward(model):
    assert sample(model, PROMPTS, 8, temperature=0) == [one_by_one(model, p, 8) for p in PROMPTS]
    assert sample(model, PROMPTS, 8, top_k=1) == sample(model, PROMPTS, 8, temperature=0)
    assert sample(model, PROMPTS, 8, top_p=1e-9) == sample(model, PROMPTS, 8, temperature=0)


def test_reproducible_by_seed(model):
    first = sample(model, PROMPTS, 12, seed=3)
    torch.manual_seed(99)  # the global generator has no part in it
    assert sample(model, PROMPTS, 12, seed=3) == first != sample(model, PROMPTS, 12, seed=4)


def test_prompt_i_draws_with_seed_plus_i_whatever_its_neighbours(model):
    together = sample(model, PROMPTS, 10, seed=5)
    assert together == [sample(model, [p], 10, seed=5 + i)[0] for i, p in enumerate(PROMPTS)]
    assert sample(model, [PROMPTS[0], [9, 9], PROMPTS[2]], 10, seed=5)[2] == together[2]


def test_a_full_context_drops_its_oldest_tokens(model):
    prompt = [i % 101 for i in range(80)]  # over max_positions=64
    assert sample(model, [prompt], 10, seed=2) == sample(model, [prompt[-64:]], 10, seed=2)
    first, *rest = sample(model, [prompt[:64]], 30, temperature=0)[0]  # goes on over the border
    assert rest == one_by_one(model, [*prompt[17:64], first], 16) + rest[16:] and len(rest) == 29


def test_eos_ends_a_prompt_and_is_not_returned(model):
    free = sample(model, PROMPTS, 12, seed=1)
    eos = free[1][4]
    ended = sample(model, PROMPTS, 12, seed=1, eos_id=eos)
    assert ended == [row[: row.index(eos)] if eos in row else row for row in free]


def test_a_prompt_that_ends_does_not_change_the_others(model):
    free = sample(model, PROMPTS, 12, seed=1)
    for ending in range(3):
        got = sample(model, PROMPTS, 12, seed=1, on_token=lambda i, _, ending=ending: i == ending)
        assert got == [row[:1] if i == ending else row for i, row in enumerate(free)]


def test_on_token_ends_a_prompt_with_that_id(model):
    free = sample(model, PROMPTS, 12, seed=1)
    seen = [0, 0, 0]

    def third(i, _):
        seen[i] += 1
        return seen[i] == 3 + i

    assert sample(model, PROMPTS, 12, seed=1, on_token=third) == [row[: 3 + i] for i, row in enumerate(free)]
    assert seen == [3, 4, 5]


def test_on_token_sees_each_new_token(model):
    seen = [[] for _ in PROMPTS]
    assert sample(model, PROMPTS, 5, on_token=lambda i, token: seen[i].append(token)) == seen
    assert sample(model, PROMPTS, 0) == [[], [], []]


def test_top_k_top_p_and_vocab_size_bound_what_is_drawn(model):
    logits = last_logits(model, [[1]])[0]
    likeliest = set(logits.topk(3).indices.tolist())
    drawn = {sample(model, [[1]], 1, top_k=3, seed=s)[0][0] for s in range(60)}
    assert drawn == likeliest
    order = logits.softmax(0).sort(descending=True)
    keep = int((order.values.cumsum(0) < 0.3).sum()) + 1
    drawn = {sample(model, [[1]], 1, top_p=0.3, seed=s)[0][0] for s in range(200)}
    assert drawn <= set(order.indices[:keep].tolist()) and len(drawn) > 1
    assert all(max(sample(model, [[1]], 5, vocab_size=7, seed=s)[0]) < 7 for s in range(20))


def test_temperature_sharpens(model):
    best = int(last_logits(model, [[1]])[0].argmax())
    share = [
        sum(sample(model, [[1]], 1, t, seed=s)[0][0] == best for s in range(100)) for t in (0.05, 1.0, 50.0)
    ]
    assert share[0] >= share[1] >= share[2] and share[0] > 50
    assert sample(model, [[1]], 1, temperature=1e-30)[0] == [best]


def test_draws_follow_the_probabilities():
    model = make(vocab_size=5)
    expected = last_logits(model, [[1]])[0].softmax(0)
    draws = torch.tensor([sample(model, [[1]], 1, seed=s)[0][0] for s in range(1000)])
    got = draws.bincount(minlength=5) / 1000
    assert (got - expected).abs().max() < 4 * 0.5 / 1000**0.5


def test_training_goes_on_after_sampling(model):
    fresh = make()
    sample(fresh, [[1, 2]], 2)
    fresh(
        torch.tensor([[1, 2, 3]]), labels=torch.tensor([[2, 3, 4]])
    ).backward()  # its tables are no inference tensors
    assert fresh.embed.weight.grad is not None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompts": []}, "prompts: got"),
        ({"prompts": "text"}, "prompts: got 'text'"),
        ({"prompts": ["text"]}, r"prompts\[0\]: got 'text', takes a list of ids"),
        ({"prompts": [[1], []]}, r"prompts\[1\]: got no id"),
        ({"prompts": [[1], [101]]}, r"prompts\[1\]: got id 101, takes 0 to 100"),
        ({"prompts": [[-1]]}, r"prompts\[0\]: got id -1"),
        ({"max_new_tokens": -1}, "max_new_tokens: got -1"),
        ({"max_new_tokens": 1.5}, r"max_new_tokens: got 1\.5"),
        ({"temperature": -0.1}, r"temperature: got -0\.1"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_p": 0.0}, r"top_p: got 0\.0, takes a number above 0"),
        ({"top_p": 1.5}, r"top_p: got 1\.5"),
        ({"seed": -1}, r"seed: got -1, takes a whole number from 0"),
        ({"seed": 10**20}, r"seed: got 100000000000000000000"),
        ({"vocab_size": 102}, "vocab_size: got 102, takes 1 to the model's 101"),
    ],
)
def test_argument_errors(model, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sample(model, **({"prompts": [[1]], "max_new_tokens": 1} | arguments))


def test_a_diverged_model_is_named():
    model = make()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are not finite"):
        sample(model, [[1]], 1)
