"""The Triton twins of adamw, grad_norm and the embedding's backward, against their references."""

import math
from itertools import product

import pytest
import torch

from openllama.kernels.adamw import adamw_reference
from openllama.kernels.adamw_forms import join_master, scales_shape, split_master
from openllama.kernels.embedding import embedding_backward_reference

from .contract import BF16, F16, F32
from .rule import near, random
from .twins import DEVICE, kernels, on, only_compiled, run_interpreted, twin

U8, I16, I64 = torch.uint8, torch.int16, torch.int64

# (params', masters' dtype): all are tried with each dtype of moments.
WEIGHTS = ((F32, None), (BF16, F32), (F16, F32), (BF16, I16), (BF16, None))

# Of chunks of 8,192: a short one, several, and one that is cut; with and without 16-byte accesses.
SHAPES = ((41,), (0,), (7, 123), (16, 64), (8192 + 520,))

LAST_NAN = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(F32)  # which rounds up to -0 as a whole number

NUMBERS = (1e-2, 0.9, 0.99, 1e-8, 0.1, 1.0)


def test_in_the_interpreter():
    run_interpreted(__file__)


class State:
    """Tensors of one form, and the other arguments of adamw_."""

    def __init__(self, weight, moment, shapes=SHAPES, grad=None, seed=0, **options):
        dtype, master = weight
        exact = [random(s, F32, "cpu", seed + i) for i, s in enumerate(shapes)]
        self.params = [w.to(dtype) for w in exact]
        self.masters = [] if master is None else exact
        if master == I16:
            self.params, self.masters = (list(t) for t in zip(*(split_master(w) for w in exact)))
        self.grads = [random(s, grad or dtype, "cpu", 50 + i, 0.1) for i, s in enumerate(shapes)]
        fresh = 128 if moment == U8 else 0
        self.exp_avgs = [torch.full(s, fresh, dtype=moment) for s in shapes]
        self.exp_avg_sqs = [torch.zeros(s, dtype=moment) for s in shapes]
        self.scales = [torch.zeros(scales_shape(w.numel())) for w in exact] if moment == U8 else []
        firsts = [sum(w.numel() for w in exact[:i]) for i in range(len(exact))]
        defaults = {"groups": [0] * len(exact), "numbers": [NUMBERS], "lrs": None, "steps": None}
        self.options = {**defaults, "grad_scale": None, "seed": 7, "firsts": firsts, **options}

    def lists(self):
        return [self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.masters, self.scales]

    def step(self):
        """The twin's, on copies on the tests' device."""
        copies = [[t.clone() for t in on(*tensors)] for tensors in self.lists()]
        options = dict(zip(self.options, on(*self.options.values())))
        options["numbers"] = [n for row in options["numbers"] for n in row]
        assert twin("adamw").adamw_(*copies, *options.values()) is None
        return [[t.cpu() for t in tensors] for tensors in copies]

    def reference(self):
        """A step of the reference, in place."""
        adamw_reference(*self.lists(), *self.options.values())


def mostly_equal(ours, theirs):
    """Rounded by the same random bits: equal but where the last bits of fp32 decide, and there neighbours."""
    apart = (ours.int() - theirs.int()).abs()
    assert apart.max() <= 1 and apart.count_nonzero() <= 2 + len(apart) // 200


def compare(ours, state):
    """`ours`, the lists of a step of the twin, with `state` after the reference's."""
    for kind, mine, theirs in zip(("param", "grad", "m", "v", "master", "scales"), ours, state.lists()):
        for i, (o, t) in enumerate(zip(mine, theirs)):
            o, t = o.reshape(-1), t.reshape(-1)
            if kind == "param" and state.masters and state.masters[0].dtype == I16:
                near(join_master(o, ours[4][i].reshape(-1)), join_master(t, state.masters[i].reshape(-1)), 2)
            elif t.dtype in (BF16, F16) and t.numel():
                mostly_equal(o.view(I16), t.view(I16))
            elif t.dtype == U8 and t.numel():
                mostly_equal(o, t)
            elif t.dtype == F32:
                near(o, t, 4, f"{kind} {i}")


@kernels
class TestAdamW:
    @pytest.mark.parametrize("weight", WEIGHTS, ids=str)
    @pytest.mark.parametrize("moment", (F32, BF16, U8), ids=str)
    def test_two_steps(self, weight, moment):
        state = State(weight, moment)
        for step in (1, 2):
            state.options["numbers"] = [(*NUMBERS[:-1], step)]
            ours = state.step()
            state.reference()
            compare(ours, state)

    @pytest.mark.parametrize("moment", (F32, U8), ids=str)
    @pytest.mark.parametrize("grad", (F32, BF16, F16), ids=str)
    def test_gradients_of_any_dtype(self, grad, moment):
        state = State((BF16, I16), moment, grad=grad)
        ours = state.step()
        state.reference()
        compare(ours, state)

    def test_gradients_of_several_dtypes(self):
        state = State((F32, None), F32)
        state.grads = [g.to((F32, BF16, F16)[i % 3]) for i, g in enumerate(state.grads)]
        ours = state.step()
        state.reference()
        compare(ours, state)

    @pytest.mark.parametrize("beta1, beta2", ((0.9, 0.999), (0.0, 0.0), (0.5, 0.99999)))
    @pytest.mark.parametrize("step", (1, 2, 100, 10**7))
    def test_bias_correction(self, beta1, beta2, step):
        numbers = [(1e-2, beta1, beta2, 1e-8, 0.0, step)]
        state = State((F32, None), F32, ((64,),), numbers=numbers)
        state.params[0].zero_()  # so that the step alone is seen
        ours = state.step()
        state.reference()
        near(ours[0][0], state.params[0], 8)

    @pytest.mark.parametrize("moment", (F32, BF16, U8), ids=str)
    def test_groups_and_numbers_on_the_device(self, moment):
        lrs, steps = torch.tensor([1e-2, 3e-3]), torch.tensor([3.0, 70_000.0])
        numbers = [
            (lr, 0.9, 0.99, 1e-8, wd, t) for lr, wd, t in zip(lrs.tolist(), (0.0, 0.2), steps.tolist())
        ]
        options = {"groups": [1, 0, 0, 1, 0], "grad_scale": torch.tensor([0.25])}
        state = State((BF16, None), moment, numbers=numbers, **options)
        ours = state.step()
        state.options |= {"lrs": lrs, "steps": steps, "numbers": [(9.0, *row[1:5], 9.0) for row in numbers]}
        for a, b in zip(ours, state.step()):
            assert all(torch.equal(x, y) for x, y in zip(a, b))
        state.reference()
        compare(ours, state)

    @pytest.mark.parametrize("first", (0, 2**32 - 300, 5 * 2**33))
    def test_results_do_not_depend_on_how_tensors_are_cut(self, first):
        whole = State((BF16, None), U8, ((1024,),), firsts=[first])
        cut = State((BF16, None), U8, ((256,), (768,)), firsts=[first, first + 256])
        for tensors, (one,) in zip(cut.lists()[:4], whole.lists()[:4]):
            tensors[:] = [one[:256].clone(), one[256:].clone()]
        ours, theirs = whole.step(), cut.step()
        for (one,), parts in zip(ours[:4], theirs[:4]):
            assert torch.equal(one, torch.cat(parts))
        whole.reference()
        compare(ours, whole)

    def test_tensors_at_any_address(self):
        state = State((BF16, F32), F32)
        for tensors in state.lists():
            for i, t in enumerate(tensors):
                tensors[i] = t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)
        before = [[t.clone() for t in tensors] for tensors in state.lists()]
        on_device = [on(*tensors) for tensors in state.lists()]
        moved = [
            [t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t) for t in tensors] for tensors in on_device
        ]
        options = {**state.options, "numbers": list(NUMBERS)}
        twin("adamw").adamw_(*moved, *options.values())
        assert all(torch.equal(a, b) for x, y in zip(before, state.lists()) for a, b in zip(x, y))
        state.reference()
        compare([[t.cpu() for t in tensors] for tensors in moved], state)

    @pytest.mark.parametrize("weight, moment", list(product(WEIGHTS, (F32, BF16, U8))), ids=str)
    @pytest.mark.parametrize("value", (LAST_NAN, math.inf))
    def test_a_gradient_that_is_no_number_spoils_its_weight(self, weight, moment, value):
        state = State(weight, moment, ((600,),), grad=F32)
        clean = state.step()[0][0]
        state.grads[0][300] = value
        spoilt = state.step()[0][0]
        assert spoilt[300].isnan()
        rest = torch.arange(600) != 300
        assert torch.equal(spoilt[rest], clean[rest])

    def test_no_tensors(self):
        twin("adamw").adamw_([], [], [], [], [], [], [], list(NUMBERS), None, None, None, 0, [])
        state = State((F32, None), F32, ((0,),))
        state.step()

    @pytest.mark.parametrize(
        "change",
        (
            lambda s: s.grads.pop(),
            lambda s: s.masters.pop(),
            lambda s: s.scales.pop(),
            lambda s: s.options.update(groups=[0, 0, 0, 0, 1]),
            lambda s: s.grads.__setitem__(0, s.grads[0].double()),
            lambda s: s.grads.__setitem__(2, s.grads[2].t()),
            lambda s: s.exp_avgs.__setitem__(2, s.exp_avgs[2][:, ::2]),
            lambda s: s.exp_avg_sqs.__setitem__(0, s.exp_avg_sqs[0].float()),
            lambda s: s.scales.__setitem__(0, s.scales[0][:, :0]),
            lambda s: s.options.update(lrs=torch.zeros(2)),
            lambda s: s.options.update(grad_scale=torch.zeros((), dtype=torch.float64)),
        ),
    )
    def test_lists_that_do_not_match_raise(self, change):
        state = State((BF16, I16), U8)
        change(state)
        with pytest.raises(RuntimeError, match="openllama: adamw takes"):
            state.step()

    @only_compiled
    def test_a_cuda_graph(self):
        """Its replays take the numbers that are on the device by then."""
        lrs, steps = torch.full((1,), 1e-2, device=DEVICE), torch.ones(1, device=DEVICE)
        eager, captured = ([on(*t) for t in State((BF16, I16), U8).lists()] for _ in range(2))
        arguments = ([0] * 5, list(NUMBERS), lrs, steps, None, 7, [0] * 5)
        run = twin("adamw").adamw_
        run(*[[t.clone() for t in tensors] for tensors in captured], *arguments)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(*captured, *arguments)
        for step in (1, 2, 3):
            steps.fill_(step)
            lrs.fill_(0.01 / step)
            graph.replay()
            run(*eager, *arguments)
            [torch.empty(2**16, device=DEVICE).normal_() for _ in range(8)]  # would overwrite what is freed
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for x, y in zip(eager, captured) for a, b in zip(x, y))


class TestTables:
    """The kernels' tables in CUDA graphs, without a GPU: `to` leaves them in their pinned memory."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        self.capturing, self.rooms = False, 0

        def pinning(function):
            def allocate(*arguments, pin_memory=False, **options):
                assert not (pin_memory and self.capturing), "memory is pinned in a capture"
                self.rooms += pin_memory and function is empty
                return function(*arguments, **options)

            return allocate

        empty = torch.empty
        monkeypatch.setattr(twin("lists"), "_room", empty(0, dtype=I64))
        monkeypatch.setattr(twin("lists"), "_captured", [])
        monkeypatch.setattr(torch, "empty", pinning(torch.empty))
        monkeypatch.setattr(torch, "tensor", pinning(torch.tensor))
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def launch(self, *lengths, capturing=False):
        self.capturing = capturing
        rows = [list(range(i, i + length)) for i, length in enumerate(lengths)]
        tables = [twin("lists").to_device(row, torch.device("cuda")) for row in rows]
        assert [table.tolist() for table in tables] == rows
        return [table.data_ptr() for table in tables]

    @pytest.mark.parametrize("length", (29, 30_000))
    def test_a_graph_holds_several_launches_of_one_length(self, length):
        self.launch(7, length, length)
        self.launch(7, *[length] * 16, capturing=True)

    @pytest.mark.parametrize("length", (29, 30_000))
    def test_a_call_outside_makes_room_for_the_next_graph(self, length):
        """The graphs before keep their tables, as they may be replayed."""
        addresses = []
        for _ in range(20):
            self.launch(length)
            addresses += self.launch(*[length] * 12, capturing=True)
        assert len(set(addresses)) == len(addresses)

    def test_a_graph_without_a_call_before_raises(self):
        with pytest.raises(RuntimeError, match="made once outside of the graph"):
            self.launch(29, capturing=True)
        self.launch(29)
        with pytest.raises(RuntimeError, match="made once outside of the graph"):
            self.launch(*[29] * 10_000, capturing=True)
        self.launch(29)
        self.launch(*[29] * 16, capturing=True)

    def test_steps_leave_no_more_than_one_does(self):
        for _ in range(100):
            self.launch(3000, 29, 3000)
        assert self.rooms == 1


@kernels
class TestGradNorm:
    @pytest.mark.parametrize("dtypes", ((F32,), (BF16,), (F16,), (F32, BF16, F16)), ids=str)
    @pytest.mark.parametrize("max_norm", (math.inf, 1e6, 1.0))
    def test_norm_and_scale(self, dtypes, max_norm):
        shapes = ((1,), (7,), (0,), (123, 41), (64, 32), (70_001,))
        grads = [random(s, dtypes[i % len(dtypes)], "cpu", i) for i, s in enumerate(shapes)]
        exact = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        ours = twin("grad_norm").grad_norm(on(*grads), max_norm)
        assert ours.shape == (2,) and ours.dtype == F32
        assert ours.tolist() == pytest.approx([exact, min(1.0, max_norm / exact)], rel=1e-6)
        assert torch.equal(ours, twin("grad_norm").grad_norm(on(*grads), max_norm))

    def test_what_is_no_number(self):
        norm = twin("grad_norm").grad_norm
        assert norm(on(torch.zeros(0)), 1.0).tolist() == [0, 1]
        assert norm(on(torch.tensor([1.0, math.nan])), 1.0).isnan().all()
        assert norm(on(torch.tensor([1.0, -math.inf])), 1.0).tolist() == [math.inf, 0]
        assert norm(on(torch.tensor([math.inf])), math.inf)[1].isnan()

    @pytest.mark.parametrize("grads", ([], [torch.zeros(3).double()], [torch.zeros(3, 4).t()]))
    def test_bad_input_raises(self, grads):
        with pytest.raises(RuntimeError, match="openllama: grad_norm takes"):
            twin("grad_norm").grad_norm(on(*grads), 1.0)


@kernels
class TestEmbedding:
    def check(self, ids, hidden, dtype=F32, grad=F32, vocab=20, more=0):
        dy = random((len(ids), hidden + more), dtype, "cpu", 1)[:, more // 2 : hidden + more // 2]
        before = random((vocab, hidden), grad, "cpu", 2)
        inside = (ids >= 0) & (ids < vocab)
        sums = embedding_backward_reference(dy[inside].contiguous(), ids[inside], vocab)
        ours, dy, ids, order = on(before.clone(), dy, *torch.sort(ids, stable=True))
        assert twin("embedding").embedding_bwd_(ours, dy, ids, order) is None
        near(ours.cpu(), (before.float() + sums).to(grad), 4)
        return ours

    @pytest.mark.parametrize("hidden", (1, 7, 41, 128, 1500))
    @pytest.mark.parametrize("dtype, grad", ((F32, F32), (BF16, BF16), (BF16, F32)), ids=str)
    def test_sizes(self, hidden, dtype, grad):
        self.check(torch.arange(12) * 5 % 7, hidden, dtype, grad)
        self.check(torch.arange(5) % 2, hidden, dtype, grad, more=8)

    @pytest.mark.parametrize("run", (1, 7, 8, 9, 30))
    def test_runs_of_one_id(self, run):
        ids = torch.cat([torch.full((run,), 3), torch.full((run,), 0), torch.tensor([19])])
        assert torch.equal(self.check(ids, 41), self.check(ids, 41))

    def test_ids_outside_are_left_out(self):
        self.check(torch.tensor([-1, 3, 20, 3, -7, 2**40, 19, -1]), 41)

    def test_no_tokens(self):
        self.check(torch.zeros(0, dtype=I64), 8)
