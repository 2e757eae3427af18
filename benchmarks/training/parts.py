"""Where a step's time goes on a GPU: kernels by what they are for, read off their names.

A fused kernel of torch.compile counts for the first part that its name speaks of. What only adds, multiplies, casts or
copies is one part: a name doesn't say for whom.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

# The first pattern that is found in a kernel's name decides.
PATTERNS: tuple[tuple[str, str], ...] = (
    # AdamW, the gradient's norm and clipping: ours, then torch's foreach and fused ones
    ("optimizer", r"adamw|squares_kernel|\bnorm_kernel|_squares|multi_tensor_apply|lpnorm|FusedAdam"),
    # before matrix products: attention kernels are built of them, and some say so
    ("attention", r"flash|fmha|sdpa|cudnn::fusion|attention|attn|AttentionKernel|_dq_dk_dv|dkv_kernel|fwd_splitkv"),
    ("matrix products", r"hopper::product_kernel|nvjet|gemm|cutlass|xmma|cublas|splitk|gemv|triton_tem_|scaled_mm|wgrad_alpha"),
    ("loss", r"CrossEntropy|cross_entropy|openllama.*scale_kernel|LogSoftMax|log_softmax|nll_loss|logsumexp|element_mul_kernel|_fwd_bwd\b"),
    ("attention", r"softmax|SoftMax"),
    ("embedding", r"[Ee]mbedding|indexSelect|vectorized_gather|segment_kernel|RadixSort|sum_and_scatter|compute_grad_weight|krn_partial"),
    ("norms", r"rms_?norm|RmsNorm|RMSNorm|layer_?norm|LayerNorm|GammaBeta|rsqrt|pow|mean|Mean"),
    ("rotary", r"[Rr]otary|rope|_turn\b|CatArray|neg_|_neg|_cos|_sin|cos_kernel|sin_kernel"),
    ("swiglu", r"[Ss]wi[Gg][Ll][Uu]|silu|Silu|sigmoid"),
    (
        "copies and adds",
        r"Memcpy|Memset|FillFunctor|CUDAFunctor|BinaryFunctor|MulFunctor|AUnaryFunctor|copy_kernel|elementwise_kernel"
        r"|reduce_kernel|triton_(poi|red|per)_fused|arange|float8|amax",
    ),
)  # fmt: skip
OTHER, IDLE = "other", "idle"
PARTS = (*dict.fromkeys(part for part, _ in PATTERNS), OTHER, IDLE)

Span = tuple[str, float, float]  # a kernel's name, start and end in microseconds


def part_of(kernel: str) -> str:
    return next((part for part, pattern in PATTERNS if re.search(pattern, kernel)), OTHER)


def split(kernels: Sequence[Span], step_ms: float) -> dict[str, float]:
    """Milliseconds of each part of a step; `idle` is what of `step_ms` no kernel covers."""
    parts = dict.fromkeys(PARTS, 0.0)
    for name, start, end in kernels:
        parts[part_of(name)] += (end - start) / 1e3
    parts[IDLE] = max(0.0, step_ms - covered((start, end) for _, start, end in kernels) / 1e3)
    return parts


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans: kernels of two streams may overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def profiled(step: Callable[[], object], step_ms: float) -> dict[str, float]:
    """The parts of one step. `step_ms` is what it takes without the profiler, which slows the host: idle is of that."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return split(kernels, step_ms)


def text(parts: dict[str, float]) -> str:
    """In one line, the largest first."""
    largest = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {ms:.1f}" for name, ms in largest if ms >= 0.05)
