"""backend.py: which backend an op uses, how one is forced, and what happens without the native library."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from openllama import info
from openllama.kernels import backend, library
from openllama.kernels.attention import _choose as choose_attention
from openllama.ops import attention, cross_entropy, rms_norm, rotary, swiglu

CPU, F32, F16 = torch.device("cpu"), torch.float32, torch.float16
KERNELS = Path(library.PATH).parent


def python(code, cwd=None, **environment):
    """Runs `code` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_op_has_a_reference_last():
    assert all(names[-1] == "reference" for names in backend.TABLE.values())


def test_every_name_is_the_backend_of_an_op():
    """A name without an op could be asked for, and would be ignored."""
    assert set(backend.NAMES) == {name for names in backend.TABLE.values() for name in names}


def test_explain_says_what_is_used_and_why_not_better():
    choice = backend.explain("rms_norm", CPU, F32)
    elsewhere = "the tensors are on cpu"
    assert choice == ("cpu", (("cuda", elsewhere), ("triton", elsewhere)))
    choice = backend.explain("swiglu", CPU, F16)
    assert (choice.backend, choice.passed_over[-1]) == ("reference", ("cpu", "no torch.float16 kernel"))
    assert backend.explain("attention", CPU, F32).backend == "torch"
    cuda = backend.explain("rms_norm", torch.device("cuda"), F32, hidden=20_000)
    reason = dict(cuda.passed_over)["cuda"]
    assert cuda.backend == "reference" and ("hidden=20000 is over 16384" in reason or "no nvcc" in reason)


@pytest.fixture
def card(monkeypatch):
    """card(capability, driver) puts such a GPU here, and a library of CUDA 13.0."""

    def put(capability, driver):
        monkeypatch.setattr(library, "missing", "")
        monkeypatch.setattr(library, "has_cuda", True)
        monkeypatch.setattr(library, "build_info", lambda: {"cuda": 13000})
        monkeypatch.setattr(library, "driver_version", lambda: driver)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        backend._ask_card.cache_clear()

    yield put
    backend._ask_card.cache_clear()


@pytest.mark.parametrize(
    "capability, driver, reason",
    [
        ((7, 5), 13000, "compute capability 7.5 is below 8.0"),
        ((8, 0), 12080, "the driver is for CUDA 12.8, the library was built with 13.0"),
        ((8, 0), 13000, ""),
        ((12, 0), 14020, ""),
    ],
)
def test_a_card_or_driver_that_cannot_run_the_kernels(card, monkeypatch, capability, driver, reason):
    card(capability, driver)
    assert backend.why_not("rms_norm", "cuda", torch.device("cuda", 0), F32, 64) == reason
    monkeypatch.setattr(backend, "_HAS_TRITON", capability < (8, 0) or not reason)
    used = backend.explain("rms_norm", torch.device("cuda"), F32, 64).backend
    assert used == ("reference" if reason else "cuda")


@pytest.mark.parametrize(
    "capability, dtype, reason",
    [
        ((8, 0), torch.bfloat16, "compute capability 8.0 is not 9.0 (Hopper)"),
        ((10, 0), torch.bfloat16, "compute capability 10.0 is not 9.0 (Hopper)"),
        ((9, 0), F32, "no torch.float32 kernel"),
        ((9, 0), F16, ""),
    ],
)
@pytest.mark.parametrize("op", ("linear_swiglu", "attention"))
def test_a_kernel_of_hopper_runs_there_alone(card, op, capability, dtype, reason):
    card(capability, 13000)
    assert backend.why_not(op, "cuda", torch.device("cuda", 0), dtype) == reason
    assert backend.why_not("swiglu", "cuda", torch.device("cuda", 0), dtype) == ""


def on_hopper(*shape, dtype=torch.bfloat16):
    """What `attention` asks of q, of which there is none here."""
    return types.SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=shape)


BORDERS = torch.tensor([0, 2, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    "q, cu_seqlens, reason",
    [
        (on_hopper(2, 64, 4, 128), None, ""),
        (on_hopper(2, 64, 4, 128, dtype=F16), None, ""),
        (on_hopper(1, 1, 1, 128), None, ""),
        (on_hopper(128, 4, 128), BORDERS, "got cu_seqlens, takes dense batches"),
        (on_hopper(2, 64, 4, 64), None, ""),
        (on_hopper(2, 64, 4, 96), None, "got head_dim 96, takes 64 or 128"),
        (on_hopper(2, 64, 4, 256), None, "got head_dim 256, takes 64 or 128"),
        (on_hopper(2, 64, 4, 128, dtype=F32), None, "no torch.float32 kernel"),
        (on_hopper(2, 64, 4, 128, dtype=torch.float64), None, "no torch.float64 kernel"),
        (on_hopper(1 << 14, 1 << 12, 1 << 5, 128), None, "takes up to 1073741824 rows of all heads"),
    ],
)
def test_which_attention_our_kernel_takes(card, q, cu_seqlens, reason):
    card((9, 0), 13000)
    assert choose_attention(q, cu_seqlens, None) == ("torch" if reason else "cuda")
    assert choose_attention(q, cu_seqlens, "torch") == "torch"
    if reason:
        with pytest.raises(ValueError, match=f"attention can't run on 'cuda' here: .*{reason}"):
            choose_attention(q, cu_seqlens, "cuda")
    else:
        assert choose_attention(q, cu_seqlens, "cuda") == "cuda"


def test_attention_that_must_be_deterministic_or_is_traced_is_torchs(card, monkeypatch):
    card((9, 0), 13000)
    q = on_hopper(2, 64, 4, 128)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert choose_attention(q, None, None) == "torch"
        with pytest.raises(ValueError, match="torch is to be deterministic"):
            choose_attention(q, None, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    assert choose_attention(q, None, None) == "cuda"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose_attention(q, None, None) == "torch"
    with pytest.raises(ValueError, match=r"torch\.compile is tracing"):
        choose_attention(q, None, "cuda")


def test_who_can_not_see_shapes_says_for_which(card):
    card((9, 0), 13000)
    cuda, bf16 = torch.device("cuda", 0), torch.bfloat16
    assert backend.describe("attention", cuda, bf16) == "cuda (dense batches of head_dim 64 or 128)"
    assert backend.describe("attention", cuda, F32) == "torch"
    assert info._choice(backend, "attention", cuda, bf16) == (
        "cuda",
        "cuda: all but dense batches of head_dim 64 or 128",
    )
    assert info._choice(backend, "attention", cuda, F32) == ("torch", "cuda: no torch.float32 kernel")
    assert info._choice(backend, "swiglu", cuda, bf16) == ("cuda", "")
    assert set(backend.SHAPES) <= set(backend.TABLE)


def test_cuda_for_all_ops_spares_those_of_another_card(card, monkeypatch):
    card((8, 0), 13000)
    monkeypatch.setattr(backend, "FORCED", "cuda")
    x = torch.empty(0, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(
        backend, "why_not", lambda op, name, *_: "not here" if (op, name) == ("attention", "cuda") else ""
    )
    assert backend.choose("attention", x, None) == "torch" and backend.choose("swiglu", x, None) == "cuda"
    with pytest.raises(ValueError, match="attention can't run on 'cuda' here: not here"):
        backend.choose("attention", x, "cuda")


def test_triton_serves_where_the_library_has_no_cuda(card, monkeypatch):
    card((8, 0), 13000)
    monkeypatch.setattr(library, "has_cuda", False)
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    choice = backend.explain("swiglu", torch.device("cuda"), F32)
    assert choice == ("triton", (("cuda", "the library was built without CUDA (no nvcc)"),))
    assert (
        backend.why_not("swiglu", "triton", torch.device("cuda"), torch.float64) == "no torch.float64 kernel"
    )
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    assert backend.explain("swiglu", torch.device("cuda"), F32).backend == "reference"


def test_asking_a_card_does_not_break_a_graph(monkeypatch):
    def ask_card(index, backend):
        torch._dynamo.graph_break()  # as torch.cuda's own questions may
        return f"card {index}"

    def ask(x, device=torch.device("cuda", 1)):  # noqa: B008
        return x + len(backend.why_not("rms_norm", "cuda", device, x.dtype, 64))

    monkeypatch.setattr(library, "missing", "")
    monkeypatch.setattr(library, "has_cuda", True)
    monkeypatch.setattr(backend, "_ask_card", ask_card)
    torch._dynamo.reset()
    assert int(torch.compile(ask, fullgraph=True, backend="eager")(torch.zeros(1))) == len("card 1")


def test_a_card_is_asked_once(card, monkeypatch):
    card((8, 0), 13000)
    for _ in range(2):
        assert backend.why_not("rms_norm", "cuda", torch.device("cuda", 0), F32, 64) == ""
        monkeypatch.setattr(torch.cuda, "get_device_capability", None)


@pytest.mark.skipif(
    torch.cuda.is_available() or not library.has_cuda, reason="a GPU is here, or no CUDA kernels"
)
def test_without_a_gpu_cuda_says_so():
    assert backend.why_not("rms_norm", "cuda", torch.device("cuda"), F32, 64) == "torch finds no GPU"


@pytest.mark.parametrize("name", backend.TABLE)
def test_choice_is_what_explain_says(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert (
            backend.choose(name, torch.empty(0, dtype=dtype), None)
            == backend.explain(name, CPU, dtype).backend
        )


def test_the_table_prefers_what_was_measured_to_be_faster():
    """The chosen one of ours takes at most a tenth more than the other, over the shapes of each stored benchmark of a GPU."""
    times = defaultdict(dict)
    for path in (KERNELS.parent / "benchmarks" / "results").glob("ops-nvidia*.json"):
        run = json.loads(path.read_text())
        for row in run["rows"]:
            if row["impl"].startswith("ours:") and row["ms"]:
                times[run["device"], row["bench"], str(row["shape"])][row["impl"][5:]] = row["ms"]
    ratios = defaultdict(list)
    for (device, bench, _), both in times.items():
        if {"cuda", "triton"} <= both.keys():
            op = max((op for op in backend.TABLE if bench.startswith(op)), key=len)
            first, second, *_ = backend.TABLE[op]
            ratios[device, bench].append(both[first] / both[second])
    assert ratios
    for key, values in ratios.items():
        assert statistics.geometric_mean(values) <= 1.1, (key, values)


X, W = torch.ones(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rms_norm(X, W, backend="cuda"), "rms_norm can't run on 'cuda' here: the tensors are on cpu; takes None"),
        (lambda: rms_norm(X.half(), W, backend="cpu"), "rms_norm can't run on 'cpu' here: no torch.float16 kernel"),
        (lambda: swiglu(X, backend="cuda"), "swiglu can't run on 'cuda' here: the tensors are on cpu"),
        (lambda: attention(*[X[None, :, None]] * 3, backend="cuda"), "attention can't run on 'cuda' here: the tensors are on cpu"),
        (lambda: attention(*[X[None, :, None]] * 3, backend="cpu"), "attention has no cpu kernel"),
        (lambda: cross_entropy(X, torch.tensor([0, 1]), backend="gpu"), "backend: got 'gpu', takes one of cuda, cublaslt, triton, cpu, torch, reference or None"),
    ],
)  # fmt: skip
def test_forced_backend_that_cannot_run_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_forced_reference_runs():
    x = torch.randn(3, 8)
    assert torch.allclose(swiglu(x, backend="reference"), swiglu(x, backend="cpu"), atol=1e-6)
    cos = sin = torch.ones(4, 1)
    turned = rotary(x.view(3, 4, 2), cos, sin, torch.arange(3), backend="reference")
    assert turned.shape == (3, 4, 2)


SPY = """
import torch, openllama.kernels.swiglu as m
calls = []
class Spy(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        calls.append(func.namespace)
        return func(*args, **(kwargs or {}))
with Spy():
    m.swiglu(torch.ones(2, 4))
print("openllama" in calls)
"""


@pytest.mark.parametrize("name, ours", (("reference", "False"), ("torch", "True")))
def test_environment_forces_a_backend_where_an_op_has_it(name, ours):
    result = python(SPY, OPENLLAMA_BACKEND=name)
    assert result.stdout.strip() == ours, result.stderr


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("OPENLLAMA_BACKEND", "gpu", "OPENLLAMA_BACKEND: got 'gpu', takes one of cuda, cublaslt, triton, cpu, torch, reference"),
        ("OPENLLAMA_CPU", "sse", "OPENLLAMA_CPU: got 'sse', takes one of base, avx2, avx512"),
    ],
)  # fmt: skip
def test_unknown_environment_value_is_named(variable, value, message):
    result = python("import openllama.ops", **{variable: value})
    assert result.returncode and message in result.stderr


def test_environment_forces_what_cannot_run():
    result = python("import torch, openllama.ops as o; o.rms_norm(torch.ones(2, 4), torch.ones(4))",
                    OPENLLAMA_BACKEND="cuda")  # fmt: skip
    assert result.returncode and "rms_norm can't run on 'cuda' here: the tensors are on cpu" in result.stderr


# Every op forward and backward, by the folder's modules alone.
ALL_OPS = """
import json, sys, torch
from {package} import adamw, attention, backend, cross_entropy, library, rms_norm, rotary, rotary_tables, swiglu
x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
tables = rotary_tables.rotary_tables(8, 16)
h = rotary.rotary(x, *tables, torch.arange(4), 2)
q, k, v = h.split([2, 2, 2], dim=1)
h = attention.attention(q, k, v, torch.tensor([0, 1, 4], dtype=torch.int32), 3).reshape(4, 16)
h, r = rms_norm.rms_norm(h, torch.ones(16), 1e-6, h)
loss = cross_entropy.cross_entropy(swiglu.swiglu(h), torch.tensor([0, 1, 7, -100]))
loss.backward()
p, m, s = [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)]
adamw.adamw(p, [torch.ones(3)], m, s, [], lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=1)
choice = backend.explain("swiglu", x.device, x.dtype)
print(json.dumps([loss.item(), x.grad.norm().item(), p[0].sum().item(), library.missing, choice.backend]))
"""


@pytest.fixture(scope="module")
def with_the_library():
    return json.loads(python(ALL_OPS.format(package="openllama.kernels")).stdout)


@pytest.mark.parametrize("broken", (False, True))
def test_without_the_library_every_op_runs_on_its_reference(tmp_path, broken, with_the_library):
    """The folder alone, copied without its library (or with a damaged one): one warning, the same results."""
    folder = tmp_path / "loose_kernels"
    shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if broken:
        (folder / library.PATH.name).write_bytes(b"not a library")
    loose = python(ALL_OPS.format(package="loose_kernels"), cwd=tmp_path)
    assert loose.returncode == 0, loose.stderr
    *values, missing, choice = json.loads(loose.stdout)
    assert ("does not load" if broken else "is not built (pip install") in missing
    assert choice == "reference"
    assert loose.stderr.count("every op runs on its PyTorch reference") == 1, loose.stderr
    *ours, nothing, choice = with_the_library
    assert values == pytest.approx(ours, rel=1e-5) and (nothing, choice) == ("", "cpu")


@pytest.mark.skipif(
    torch.backends.cuda.is_built(), reason="the varlen attention of a torch for GPUs brings it"
)
def test_the_import_leaves_dynamo_out():
    """It would take as long again as import torch."""
    code = "import sys, openllama.ops, openllama.model; print('torch._dynamo' in sys.modules)"
    assert python(code).stdout == "False\n"
