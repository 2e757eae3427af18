"""Every public op by name. `from openllama.ops import rms_norm, swiglu`."""

from openllama.kernels.adamw import adamw
from openllama.kernels.attention import attention, attention_decode
from openllama.kernels.attention_qkv import attention_qkv, attention_qkv_backward
from openllama.kernels.cross_entropy import cross_entropy
from openllama.kernels.embedding import embedding
from openllama.kernels.grad_norm import grad_norm
from openllama.kernels.linear_cross_entropy import linear_cross_entropy
from openllama.kernels.linear_rotary import linear_rotary
from openllama.kernels.linear_swiglu import linear_swiglu, linear_swiglu_backward_
from openllama.kernels.matmul import matmul
from openllama.kernels.rms_norm import rms_norm
from openllama.kernels.rotary import rotary, rotary_pack
from openllama.kernels.rotary_tables import rotary_tables
from openllama.kernels.swiglu import swiglu, swiglu_backward_

__all__ = [
    "adamw", "attention", "attention_decode", "attention_qkv", "attention_qkv_backward", "cross_entropy", "embedding",
    "grad_norm", "linear_cross_entropy", "linear_rotary", "linear_swiglu", "linear_swiglu_backward_", "matmul", "rms_norm",
    "rotary", "rotary_pack", "rotary_tables", "swiglu", "swiglu_backward_",
]  # fmt: skip
