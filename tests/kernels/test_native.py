"""The native library: what it holds, what it asks of torch, what nvcc says, and its CPU instruction sets."""

import importlib.util
import json
import platform
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openllama.kernels import library
from openllama.ops import cross_entropy, rotary, rotary_tables

from .test_backend import python

ROOT = Path(__file__).resolve().parents[2]
INFO = library.build_info()

needs_cuda_build = pytest.mark.skipif(
    not library.has_cuda, reason="the library was built without CUDA (no nvcc)"
)


def toolkit() -> Path | None:
    """nvcc's bin folder, found as setup.py finds it."""
    nvcc = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
    if not nvcc:
        return None
    dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dry, re.M)
    return Path(top[1] if top else Path(nvcc).parent.parent) / "bin"


def cuda_commands() -> list[tuple[str, list[str]]]:
    """(source, nvcc command) of each .cu, out of the build file that setup.py writes."""
    lines = (ROOT / "build" / "native" / "_C" / "build.ninja").read_text().splitlines()
    commands = [line.split("command = ")[1].replace("'", "") for line in lines if "command = " in line]
    sources = [(re.search(r"-c \S*/csrc/(\S+\.cu) ", command), command) for command in commands]
    return [(source[1], command.split()) for source, command in sources if source]


def test_build_info():
    assert INFO["torch_target"] == "2.11" and INFO["cpu"] in library.CPU_LEVELS
    assert bool(INFO["cuda"]) == bool(INFO["arches"])
    assert isinstance(library.driver_version(), int)


FORK = """
import os, torch, openllama.ops
if os.fork() == 0:
    torch.zeros(1, device="cuda")
    os._exit(0)
print(os.wait()[1])
"""


@pytest.mark.gpu
def test_a_process_forked_after_import_can_use_the_gpu():
    result = python(FORK)
    assert result.stdout.strip() == "0", result.stderr


def test_library_does_not_hold_the_folder_it_was_built_in():
    assert str(ROOT).encode() not in library.PATH.read_bytes()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cross_entropy(torch.zeros(2, 4), torch.tensor([0, 4])), r"^cross_entropy: labels\[1\] is 4, takes"),
        (lambda: rotary(X[:, None], *rotary_tables(8, 4), torch.tensor([0, 4])), r"^rotary: positions\[1\] is 4, outside"),
    ],
)  # fmt: skip
def test_errors_of_values_begin_with_the_message(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


X, W, R = torch.zeros(2, 8), torch.zeros(8), torch.zeros(2)
LABELS, LSE, POSITIONS, TABLE = R.long(), torch.zeros(2, 2), R.int(), torch.zeros(4, 4)
LOSS = {"ignore_index": -100, "softcap": 0.0, "z_loss": 0.0}
ROTARY = {"x": X[:, None], "cos": TABLE, "sin": TABLE, "positions": POSITIONS, "offset": 0, "rotated": 1,
          "interleaved": False, "inverse": False}  # fmt: skip

# Raw ops and arguments that they take. Each tensor that is not the main one is moved to another device in turn.
CALLS = {
    "rms_norm_fwd": ("x", {"x": X, "residual": X, "weight": W, "eps": 0.1}),
    "rms_norm_bwd": ("h", {"dy": X, "dh": X, "h": X, "weight": W, "rstd": R, "need_dx": True, "need_dweight": True}),
    "rotary": ("x", ROTARY),
    "rotary_": ("x", ROTARY),
    "swiglu_bwd_": ("gate_up", {"dact": X[:, :4], "gate_up": X}),
    "swiglu_bwd": ("gate_up", {"dact": X[:, :4], "gate_up": X}),
    "cross_entropy_fwd": ("logits", {"logits": X, "labels": LABELS, **LOSS}),
    "cross_entropy_bwd": ("logits", {"dloss": R, "logits": X, "labels": LABELS, "lse": LSE, **LOSS}),
    "cross_entropy_bwd_": ("logits", {"dloss": R, "logits": X, "labels": LABELS, "lse": LSE, **LOSS}),
    "cross_entropy_fwd_bwd_": ("logits", {"logits": X, "labels": LABELS, "dloss": R, **LOSS}),
    "adamw_": ("params", {"params": [W.bfloat16()], "grads": [W], "exp_avgs": [W], "exp_avg_sqs": [W], "masters": [W],
                          "scales": [], "groups": [0], "numbers": [0.1, 0.9, 0.9, 0.1, 0.1, 1.0], "lrs": None,
                          "steps": None, "grad_scale": W[:1], "seed": 0, "firsts": [0]}),
}  # fmt: skip

#: In a process of its own: a kernel that reads a tensor of another device kills it.
ELSEWHERE = """
import torch
from tests.kernels.test_native import CALLS
is_tensors = lambda value: isinstance(value, list) and value and isinstance(value[0], torch.Tensor)
cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
for name, (main, arguments) in CALLS.items():
    op = getattr(torch.ops.openllama, name).default
    fresh = {k: [t.clone() for t in v] if is_tensors(v) else v for k, v in arguments.items()}
    op.redispatch(cpu, *fresh.values())
    for key, value in arguments.items():
        if key == main or not (isinstance(value, torch.Tensor) or is_tensors(value)):
            continue
        moved = [t.to("meta") for t in value] if is_tensors(value) else value.to("meta")
        print(name, key, flush=True)
        try:
            op.redispatch(cpu, *{**arguments, key: moved}.values())
        except RuntimeError as error:
            assert "must be on its partner's device" in str(error), error
        else:
            raise AssertionError("no error")
print("done")
"""


def test_a_raw_op_takes_tensors_of_one_device():
    result = python(ELSEWHERE, cwd=ROOT)
    assert result.stdout.endswith("done\n"), result.stdout + result.stderr


@needs_cuda_build
def test_nvcc_uses_the_builds_compiler():
    if not (ROOT / "build" / "native" / "_C" / "build.ninja").exists():
        pytest.skip("the build folder is not here")
    for source, command in cuda_commands():
        assert any(word.startswith("-ccbin=/") for word in command), source


def cuobjdump() -> str | None:
    """The toolkit's, or the one that triton brings."""
    triton = importlib.util.find_spec("triton")
    brought = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else None
    return shutil.which("cuobjdump", path=toolkit()) or shutil.which("cuobjdump", path=brought)


@needs_cuda_build
def test_no_kernel_spills_registers():
    """Nor asks for more static shared memory than every card has; more is dynamic, and asked of the card."""
    tool = cuobjdump()
    assert tool, "cuobjdump is missing: pip install triton, which brings it"
    usage = subprocess.run(
        [tool, "-res-usage", str(library.PATH)], capture_output=True, text=True, check=True
    ).stdout
    kernels = re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) SHARED:(\d+)", usage)
    assert len(kernels) > 100
    for name, stack, shared in kernels:
        assert int(stack) == 0 and int(shared) <= 48 * 1024, name


@needs_cuda_build
def test_no_product_is_waited_for_at_once(tmp_path):
    """Where ptxas can't follow which registers a wgmma still writes, it says so (C75..), which is no warning, and makes
    the warpgroup wait for each: as many waits as products."""
    tool = cuobjdump()
    assert tool, "cuobjdump is missing: pip install triton, which brings it"
    subprocess.run(
        [tool, "-xelf", "sm_90a", str(library.PATH)], cwd=tmp_path, check=True, capture_output=True
    )
    kernels = 0
    for path in tmp_path.iterdir():
        code = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
        for kernel in code.split("Function : ")[1:]:
            products, waits = kernel.count(" HGMMA."), kernel.count(" WARPGROUP.")
            kernels += products > 0
            assert products == 0 or waits < products, kernel.split("\n")[0]
    assert kernels >= 16  # attention has 8: two passes, widths and dtypes


def fat_binary_entries() -> list[tuple[str, str]]:
    """(kind, architecture) of every piece of GPU code in the library, as `cuobjdump --list-elf --list-ptx` shows them.

    nvcc's container: a header (magic, version, header size, total size), then entries (kind, version, header size,
    payload size, ..., architecture at byte 28, ..., flags at byte 40, whose bit 20 is the `a` of sm_90a).
    """
    data, start, found = library.PATH.read_bytes(), 0, []
    while (start := data.find(struct.pack("<I", 0xBA55ED50), start)) >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, start)
        entry, end = start + header, start + header + size
        while entry < end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, entry)
            arch, flags = (
                struct.unpack_from("<I", data, entry + 28)[0],
                struct.unpack_from("<I", data, entry + 40)[0],
            )
            found.append(({1: "ptx", 2: "elf"}[kind], f"{arch}{'a' if flags >> 20 & 1 else ''}"))
            entry += entry_header + payload
        start = end
    return found


@needs_cuda_build
def test_binary_holds_code_for_every_architecture():
    sources, hopper = len(list(ROOT.glob("csrc/*.cu"))), len(list(ROOT.glob("csrc/hopper/*.cu")))
    plain = [("elf", "80"), ("elf", "90"), ("ptx", "90")]
    assert sorted(fat_binary_entries()) == sorted(plain * sources + [("elf", "90a")] * hopper)
    assert set(INFO["arches"].split(",")) == {"sm_80", "sm_90", "sm_90a", "compute_90"}


def newer_than(version: tuple[int, int]) -> set[str]:
    """Functions of torch's stable ABI that came after `version`, by the guards in its header."""
    header = Path(torch.__file__).parent / "include/torch/csrc/stable/c/shim.h"
    sections = re.split(
        r"^#if TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)_\d+", header.read_text(), flags=re.M
    )
    names = {"torch_stream_native_handle"}  # of 2.13
    for major, minor, section in zip(sections[1::3], sections[2::3], sections[3::3]):
        if (int(major), int(minor)) > version:
            names |= set(re.findall(r"\b(torch_\w+)\(", section))
    return names


@pytest.mark.skipif(not shutil.which("nm"), reason="nm (binutils) is not here")
def test_library_asks_for_nothing_newer_than_torch_2_11():
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library.PATH)], capture_output=True, text=True
    ).stdout
    names = {line.split()[-1].split("@")[0] for line in listing.splitlines()}
    assert "torch_call_dispatcher" in names and not names & newer_than((2, 11))
    # mangled names of torch's C++ ABI change with each version, and Python's and the driver's are not the library's
    assert not [
        n
        for n in names
        if n.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch", "Py", "_Py", "cublas", "cuTensor"))
    ]
    if library.has_cuda:  # weak: a CPU build of torch has no such symbol
        assert re.search(r"^\s+w aoti_torch_get_current_cuda_stream$", listing, re.M)


@pytest.mark.skipif(not shutil.which("readelf"), reason="readelf (binutils) is not here")
def test_library_links_no_cuda_and_no_python():
    dynamic = subprocess.run(["readelf", "-d", str(library.PATH)], capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*?)\]", dynamic)
    assert "libtorch.so" in needed and not [n for n in needed if "cuda" in n or "python" in n or "c10" in n]


LEVELS = """
import torch
from openllama.kernels import library
from openllama.ops import adamw, cross_entropy, rms_norm, rotary, rotary_tables, swiglu
torch.manual_seed(0)
results = []
for dtype in (torch.float32, torch.bfloat16):
    for columns in (1, 7, 64, 123, 1000):
        x = torch.randn(40, 2 * columns).mul(3).to(dtype).requires_grad_()
        w = torch.ones(2 * columns, dtype=dtype).requires_grad_()
        y, h = rms_norm(x, w, 1e-6, x)
        turned = rotary(x.view(40, 1, -1), *rotary_tables(2 * columns, 40), torch.arange(40))
        losses = cross_entropy(x, torch.arange(40) % columns, reduction="none")
        outputs = [y, h, turned, swiglu(x), losses]
        grads = torch.autograd.grad(sum(o.float().square().sum() for o in outputs), [x, w])
        p, m, v = ([t] for t in (w.detach().clone(), torch.zeros(2 * columns), torch.zeros(2 * columns)))
        adamw(p, [grads[1]], m, v, [w.detach().float()] if dtype != torch.float32 else [],
              lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=1)
        results += [t.detach() for t in (*outputs, *grads, *p, *m, *v)]
torch.save([library.build_info()["cpu"], results], PATH)
"""


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="other machines have the base level only"
)
def test_cpu_levels_agree(tmp_path):
    """Each instruction set's kernels, forced by OPENLLAMA_CPU, against the best one's."""
    results = {}
    for level in library.CPU_LEVELS[: library.CPU_LEVELS.index(INFO["cpu"]) + 1]:
        path = tmp_path / f"{level}.pt"
        run = python(f"PATH = {str(path)!r}\n{LEVELS}", OPENLLAMA_CPU=level)
        assert run.returncode == 0, run.stderr
        used, results[level] = torch.load(path)
        assert used == level
    best = results.pop(INFO["cpu"])
    for level, tensors in results.items():
        for i, (ours, theirs) in enumerate(zip(tensors, best)):
            slack = 4 * torch.finfo(theirs.dtype).eps * max(theirs.abs().max().item(), 1e-3)
            assert (ours.double() - theirs.double()).abs().max() <= slack, f"{level}, result {i}"


def test_library_loads_beside_transformers():
    """Both load native code; neither may take the other's symbols or names."""
    result = python("import transformers, openllama.ops, json; from openllama.kernels import library\n"
                    "print(json.dumps(library.missing))")  # fmt: skip
    assert json.loads(result.stdout.splitlines()[-1]) == "", result.stderr


def test_builds_in_a_folder_of_any_name(tmp_path):
    """Shells and ninja would take some of these characters for themselves. (A $ in the path is too much for nvcc.)

    A source of each kind that says nothing, as ours take minutes.
    """
    folder = tmp_path / "it's a (new)"
    for kind in ("one.cu", "hopper/two.cu", "cpu/three.cpp", "binding/four.cpp", "host/five.cpp"):
        source = folder / "csrc" / kind
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text('#include "common.h"\n')
        (source.parent / "common.h").touch()
    shutil.copy(ROOT / "setup.py", folder)
    for package in ("kernels", "data"):
        (folder / "openllama" / package).mkdir(parents=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(folder.rglob("_C.abi3.so")) and list(folder.rglob("_host.*.so"))
