"""The Triton twins compiled ahead of time, without a GPU, as they are launched for large inputs: that they
compile for each architecture, fit its shared memory, keep their registers, and read and write 16 bytes at a
time.

As a program (with compute capabilities as arguments) it compiles and prints what came out, in JSON; the tests
run it so, because triton must be imported without the interpreter there.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Shared memory that a block may have, in bytes: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability". Cards of 8.6 and 8.9 have less than those of 8.0, and get the same kernels.
SHARED = {80: 99 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize("capability", SHARED)
def test_kernels_compile(capability, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    result = subprocess.run(
        [sys.executable, __file__, str(capability)],
        env={**environment, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    kernels = json.loads(result.stdout)
    assert len(kernels) >= 30
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[capability], kernel
        assert kernel["stack"] <= 64, f"spills registers: {kernel}"
        # the ends of cross-entropy's rows (bf16), the label's logit and its gradient are moved one by one
        assert kernel["narrow"] <= 5, f"reads or writes single elements: {kernel}"
        assert kernel["wide"] > 0, kernel


# ---------------------------------------------------------------- the program


def launches():
    """Calls each twin with typical large inputs, on `meta`: they hold nothing, and their address is 0."""
    import torch

    import openllama.ops  # noqa: F401 (registers the raw ops)
    from openllama.kernels.triton import adamw, cross_entropy, embedding, grad_norm, rms_norm, rotary, swiglu

    bf16, fp32, uint8, int16, int64 = torch.bfloat16, torch.float32, torch.uint8, torch.int16, torch.int64

    def empty(*shape, dtype=bf16):
        return torch.empty(shape, dtype=dtype, device="meta")

    rstd = empty(8192, dtype=fp32)
    for hidden, dtype in (
        (128, bf16), (768, bf16), (4096, bf16), (5120, bf16), (5120, fp32), (8192, fp32), (12_288, fp32),
        (16_384, bf16), (32_768, bf16),
    ):  # fmt: skip
        x, weight = empty(8192, hidden, dtype=dtype), empty(hidden, dtype=fp32)
        rms_norm.rms_norm_fwd(x, x, weight, 1e-6)
        rms_norm.rms_norm_bwd(x, x, x, weight, rstd, True, True)
    rms_norm.rms_norm_bwd(empty(8192, 5120), None, empty(8192, 5120), empty(5120), rstd, True, False)

    qkv, tables = empty(8192, 48, 128), [empty(4096, 64, dtype=fp32)] * 2
    positions = empty(8192, dtype=torch.int32)
    rotary.rotary(qkv, *tables, positions, 0, 40, False, False)
    rotary.rotary_(qkv, *tables, positions, 0, 40, False, True)
    rotary.rotary_(qkv, *tables, None, 0, 40, True, False)
    rotary.rotary(empty(8192, 3, 128), *[empty(4096, 32, dtype=fp32)] * 2, None, 0, 2, False, False)

    for dtype in (bf16, fp32):
        gate_up, act = empty(8192, 2 * 11_008, dtype=dtype), empty(8192, 11_008, dtype=dtype)
        swiglu.swiglu_fwd(gate_up)
        swiglu.swiglu_bwd(act, gate_up)
        swiglu.swiglu_bwd_(act, gate_up)

    labels = empty(8192, dtype=int64)
    for vocab, dtype, softcap in ((128_256, bf16, 0.0), (50_257, bf16, 30.0), (100_000, fp32, 0.0)):
        logits, options = empty(8192, vocab, dtype=dtype), (-100, softcap, 1e-4)
        cross_entropy.cross_entropy_fwd(logits, labels, *options)
        cross_entropy.cross_entropy_bwd(rstd, logits, labels, empty(8192, 2, dtype=fp32), *options)
        cross_entropy.cross_entropy_fwd_bwd_(logits, labels, None, *options)

    shapes = ((4096, 4096), (4096,))
    for weight, grad, moment, master in (
        (fp32, fp32, fp32, None),
        (bf16, bf16, fp32, fp32),
        (bf16, fp32, bf16, int16),
        (bf16, bf16, uint8, int16),
        (bf16, bf16, uint8, None),
    ):
        lists = [[empty(*shape, dtype=dtype) for shape in shapes] for dtype in (weight, grad, moment, moment)]
        lists.append([empty(*shape, dtype=master) for shape in shapes] if master else [])
        lists.append([empty(2, t.numel() // 256, dtype=fp32) for t in lists[0]] if moment == uint8 else [])
        one = empty(1, dtype=fp32)
        adamw.adamw_(*lists, [0, 0], [1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0], one, one, one, 0, [0, 0])
    grad_norm.grad_norm([empty(4096, 4096), empty(4096, 4096, dtype=fp32)], 1.0)
    embedding.embedding_bwd_(empty(100_000, 4096, dtype=fp32), empty(8192, 4096), labels, labels)


def compile_instead_of_launching(capability):
    """What `launches` would launch on a card of this compute capability, compiled; one dictionary a
    kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    triton.runtime.driver.set_active(Driver())
    run, kernels = JITFunction.run, []

    def compile_only(function, *arguments, grid, warmup, **options):
        kernel = run(function, *arguments, grid=grid, warmup=True, **options)
        kernels.append((f"{function.__module__.rpartition('.')[2]}.{function.__name__}", kernel))

    JITFunction.run = compile_only
    launches()
    return [{"name": name, **facts(kernel)} for name, kernel in kernels]


def facts(kernel):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    accesses = re.findall(r"\b(?:ld|st)\.global\.\S+", kernel.asm["ptx"])
    return {
        "warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "narrow": sum(bool(re.search(r"(?<!v[248])\.b(8|16)$", a)) for a in accesses),
        "wide": sum(a.endswith(("v4.b32", "v2.b64")) for a in accesses)
        + kernel.asm["ptx"].count("cp.async.cg"),
    }


if __name__ == "__main__":
    print(json.dumps(compile_instead_of_launching(int(sys.argv[1]))))
