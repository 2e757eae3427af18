"""Labels and positions that can't be, on the CUDA kernels: a device assert, with what is wrong on stderr.

It is the end of a process's CUDA calls, so each case has a process of its own. The Triton twins give NaN
(test_triton.py).
"""

import pytest

from .contract import on_hopper
from .test_backend import python

pytestmark = pytest.mark.gpu

SCRIPT = """
import torch
{setup}
{call}  # what is right is not stopped
torch.cuda.synchronize()
print("right", flush=True)
{spoil}
{call}
torch.cuda.synchronize()
print("wrong", flush=True)
"""


def assert_stops(setup, call, spoil, message):
    result = python(SCRIPT.format(setup=setup, call=call, spoil=spoil))
    assert result.stdout == "right\n" and result.returncode != 0, result.stderr
    assert message in result.stderr, result.stderr


CROSS_ENTROPY = """
from openllama.ops import cross_entropy
logits = torch.zeros(9, {vocab}, dtype=torch.bfloat16, device="cuda", requires_grad=True)
labels = torch.zeros(9, dtype=torch.int64, device="cuda")
dloss, lse = torch.ones(9, device="cuda"), torch.zeros(9, 2, device="cuda")
"""

CALLS = {
    "forward": "cross_entropy(logits, labels, backend='cuda')",
    "backward": "torch.ops.openllama.cross_entropy_bwd(dloss, logits.detach(), labels, lse, -100, 0.0, 0.0)",
    "in place": "cross_entropy(logits * 1, labels, inplace=True, backend='cuda')",
}


@pytest.mark.parametrize("call", CALLS)
# In place: rows of a block, short ones, and rows of a cluster (on Hopper).
@pytest.mark.parametrize("vocab, label", ((128_256, 128_256), (41, -1), (400_000, 2**40)))
def test_an_impossible_label(call, vocab, label):
    message = "cross_entropy: a label lies outside the vocabulary"
    assert_stops(CROSS_ENTROPY.format(vocab=vocab), CALLS[call], f"labels[5] = {label}", message)


ROTARY = """
from openllama.ops import rotary, rotary_tables
x, tables = torch.zeros(9, 3, 16, device="cuda"), rotary_tables(16, 64, device="cuda")
positions = torch.zeros(9, dtype=torch.int64, device="cuda")
"""


@pytest.mark.parametrize("position, inplace", ((64, False), (-1, True), (2**32, False)))
def test_a_position_outside_the_tables(position, inplace):
    call = f"rotary(x, *tables, positions, 2, inplace={inplace}, backend='cuda')"
    assert_stops(ROTARY, call, f"positions[5] = {position}", "rotary: a position lies outside the tables")


HOPPER = """
from openllama.ops import attention_qkv, attention_qkv_backward, linear_rotary, rotary_tables
x, weights = torch.ones(1024, 64, device="cuda").half(), [torch.ones(256, 64, device="cuda").half()]
qkv, tables = torch.ones(1, 1024, 4, {width}, device="cuda").half(), rotary_tables({width}, 64, device="cuda")
out, kept = attention_qkv(qkv, 2, 1)
positions = torch.zeros(1024, dtype=torch.int64, device="cuda")
"""
ON_HOPPER_CALLS = {
    "attention: a position lies outside rotary's tables": "attention_qkv_backward(out, kept, *tables, positions)",
    "unspecified launch failure": "linear_rotary(x, weights, *tables, positions, {width}, 1, backend='cuda')",
}


@on_hopper
@pytest.mark.parametrize("message", ON_HOPPER_CALLS)
@pytest.mark.parametrize("width, position", ((64, 64), (128, -1), (64, 2**32)))
def test_a_position_outside_the_tables_of_what_is_fused(message, width, position):
    call = ON_HOPPER_CALLS[message].format(width=width)
    assert_stops(HOPPER.format(width=width), call, f"positions[5] = {position}", message)
