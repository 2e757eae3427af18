"""The suite's training step: rows and their errors, the form of AdamW that fits, parts of a step by kernels' names."""

import dataclasses
import math
import sys

import pytest
import torch

from benchmarks import ladder, sizes, tokens_per_second
from benchmarks.peers import hf
from benchmarks.training import memory, ours, parts, runner, side, sides, weights
from benchmarks.training.work import GRAPH_WARMUP, Work
from openllama.presets import preset

CPU = torch.device("cpu")
WORK = Work("tiny", batch=2, seq=32, accumulation=2, steps=1)
KEYS = {
    "bench", "shape", "impl", "optimizer", "settings", "dtype", "ms", "rate", "unit", "model_tflops", "of_ceiling",
    "peak_gib", "parameters", "ratio", "losses", "parts", "error",
}  # fmt: skip


def test_sides_run_in_processes_of_their_own_and_one_that_fails_stops_nobody(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    broken = sides.Side("hf:broken", "hf", {"attention": "nonsense"})
    *_, rows = runner.run([sides.ours(), broken, sides.PEERS["hf:sdpa"]], WORK)
    mine, failed, theirs = rows
    assert all(row.keys() == KEYS for row in rows), rows
    assert [row["impl"] for row in rows] == ["ours", "hf:broken", "hf:sdpa"]
    assert failed["error"] and "nonsense" in failed["error"] and failed["rate"] is failed["ratio"] is None
    shape = {"preset": "tiny", "batch": 2, "seq": 32, "accumulation": 2}
    for row in (mine, theirs):
        assert (row["bench"], row["shape"], row["error"], row["dtype"]) == (
            "train_step",
            shape,
            None,
            "float32",
        )
        assert row["rate"] == pytest.approx(2 * 2 * 32 / (row["ms"] / 1e3))
        assert row["ratio"] == pytest.approx(mine["rate"] / row["rate"]) and row["peak_gib"] > 0
    # the same weights and batches: equal at the first step, and no stable embedding in theirs
    assert mine["losses"][0] == pytest.approx(theirs["losses"][0], rel=1e-5)
    assert mine["losses"][0] == pytest.approx(math.log(4096), rel=0.05)
    assert mine["parameters"] - theirs["parameters"] == 2 * preset("tiny").hidden
    assert "12.0 bytes" in mine["optimizer"] and "moments fp32" in mine["settings"]
    assert theirs["optimizer"] == "torch fused AdamW, states in float32" and theirs["settings"] == ""
    text = runner.table(rows)
    assert "1.00x" in text and f"hf:broken {failed['error']}" in text
    formula = runner.formula(WORK, rows)
    assert "6 x parameters that multiply" in formula and "256 parameters" in formula


@pytest.mark.parametrize(
    "script, error",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ChildProcessError: died of SIGKILL"),
        ("raise SystemExit(3)", "ChildProcessError: ended with exit code 3"),
    ],
)
def test_a_process_that_dies_is_an_error_row(script, error):
    ((row,),) = runner.run([sides.ours()], WORK, command=(sys.executable, "-c", script))
    assert row.keys() == KEYS and row["error"] == error and row["ms"] is None


def test_a_process_that_hangs_is_an_error_row(monkeypatch):
    monkeypatch.setattr(runner, "LIMIT", 0.2)
    ((row,),) = runner.run(
        [sides.ours()], WORK, command=(sys.executable, "-c", "import time; time.sleep(100)")
    )
    assert row["error"] == "TimeoutError: not done after 0.2 s"


def test_every_side_starts_from_the_same_loss():
    asked = (sides.ours(), sides.PEERS["ours:bf16-states"], sides.PEERS["hf:eager"])
    mine, *others = (side.measure(one, WORK, CPU) for one in asked)
    for other in others:
        assert other["losses"][0] == pytest.approx(mine["losses"][0], rel=1e-5)
        assert other["losses"][1] == pytest.approx(mine["losses"][1], rel=1e-2)
        assert other["optimizer"] != mine["optimizer"]


@pytest.mark.parametrize(
    "name, kernels", [("xformers", ""), ("flash", ""), ("sdpa", "liger"), ("torchao", "")]
)
def test_what_is_missing_is_named_so(name, kernels, monkeypatch):
    for package in ("xformers", "liger_kernel", "torchao"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr("transformers.utils.is_flash_attn_3_available", lambda: False)
    with pytest.raises((ModuleNotFoundError, hf.NotInstalled)) as raised:
        hf.from_config(
            preset("tiny"),
            CPU,
            torch.float32,
            "sdpa" if name == "torchao" else name,
            kernels,
            name == "torchao",
        )
    assert side.reason(raised.value) == "not installed"


def test_reasons():
    assert side.reason(torch.OutOfMemoryError("CUDA out of memory. Tried")) == "out of memory"
    assert side.reason(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when")) == "out of memory"
    assert side.reason(ValueError("one\ntwo")) == "ValueError: one"
    ours_missing = ModuleNotFoundError("No module named 'openllama.x'", name="openllama.x")
    assert side.reason(ours_missing).startswith("ModuleNotFoundError")


def test_ours_is_set_up_as_in_training_but_for_what_is_asked():
    def settings(**asked):
        return ours.Ours(
            weights.our_model(preset("tiny"), CPU, torch.bfloat16), 64, 64, **asked
        ).settings_words

    assert settings() == "recompute none, accumulate True, graph False, moments fp32, masters fp32"
    assert settings(recompute="mlp", accumulate=False).startswith(
        "recompute mlp, accumulate False, graph False"
    )
    with pytest.raises(TypeError, match="no_such"):
        settings(no_such=True)


def test_other_work_is_an_error_and_no_win():
    def row(impl, loss, error=None):
        return {
            "impl": impl,
            **runner.EMPTY,
            "error": error,
            "rate": 10.0,
            "dtype": "bfloat16",
            "losses": [loss, 1],
        }

    rows = [row("ours", 10.0), row("near", 10.2), row("far", 11.0), row("missing", 0, "not installed")]
    runner.hold_to(rows[0], rows)
    assert [r["ratio"] for r in rows] == [1, 1, None, None]
    assert rows[2]["error"].startswith("not the same work") and rows[2]["rate"] is None
    assert rows[3]["error"] == "not installed"


def test_out_of_memory_takes_the_next_leaner_form(monkeypatch):
    tried = []

    def build(work, config, device, dtype, form):
        tried.append(form)
        if form.masters == "fp32":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ours.Ours(weights.our_model(config, device, dtype), 64, 64, form)

    monkeypatch.setattr(ours, "build", build)
    made = side.measure(sides.ours(), WORK, CPU)
    assert tried == list(memory.FORMS[:2]) and "masters remainder" in made["settings"]
    with pytest.raises(torch.OutOfMemoryError):  # asked for by name: no other
        side.measure(sides.ours("fp32", "fp32"), WORK, CPU)


@pytest.mark.parametrize(
    "batch, gib, form",
    [  # 7b: 14 + 4, 12 + 4, 8 + 4 or 6.03 + 4 bytes a parameter, 1 GiB in reserve, 6 GB of activations at batch 2
        (2, 139, ("fp32", "fp32")),
        (8, 139, ("fp32", "remainder")),
        (2, 94, ("bf16", "remainder")),
        (2, 78, ("8bit", "remainder")),
        (2, 20, ("8bit", "remainder")),  # nothing fits: it is tried all the same
    ],
)
def test_the_first_form_that_fits(batch, gib, form, monkeypatch):
    monkeypatch.setattr(ours, "usable_bytes", lambda device: gib * 2**30)
    work = Work("7b", batch, 1024)
    forms = ours.forms(work, work.config, CPU, torch.bfloat16, "auto", "auto", None)
    assert forms == memory.FORMS[memory.FORMS.index(form) :]


def test_forms_that_are_asked_for():
    arguments = WORK, WORK.config, CPU, torch.bfloat16
    assert ours.forms(*arguments, "fp32", "none", None) == (("fp32", "none"),)
    assert ours.forms(*arguments, "auto", "remainder", None) == memory.FORMS[1:]
    with pytest.raises(ValueError, match="--moments, --masters: got auto, none"):
        ours.forms(*arguments, "auto", "none", None)


def test_the_largest_cut_of_a_model():
    work = Work("33b", 2, 1024, fit_layers=True)
    cut = memory.largest_cut(work.config, work, torch.bfloat16, 139 * 2**30)
    need = [
        memory.need(dataclasses.replace(cut, layers=n), 2048, torch.bfloat16, memory.FORMS[-1]) / 2**30
        for n in (cut.layers, cut.layers + 1)
    ]
    assert need[0] <= 139 < need[1] and cut.layers < 60
    assert memory.largest_cut(work.config, work, torch.bfloat16, 1e15) == work.config


def test_work():
    assert Work("7b", 2, 1024, 12).suffix == "7b-b2-s1024"
    cut = Work("7b", 2, 1024, 12, layers=4)
    assert cut.suffix == "7b-b2-s1024-l4" and cut.shape["layers"] == 4 and cut.config.layers == 4
    with pytest.raises(ValueError, match="--layers: got 33, takes 1 to 32"):
        Work("7b", 2, 1024, layers=33)


def test_peers_by_name():
    def names(*words, on_gpu=True):
        return [peer.impl for peer in sides.chosen(words, on_gpu)]

    assert names("all") == list(sides.PEERS) and names("none") == names() == []
    assert names("all", on_gpu=False) == ["hf:eager", "hf:sdpa"]
    assert names("hf:compile", "hf:sdpa") == ["hf:sdpa", "hf:compile"]
    with pytest.raises(ValueError, match="--peers: got 'hf', takes all, none, or some of ours:bf16-states"):
        names("hf")
    with pytest.raises(ValueError, match="alone"):
        names("none", "hf:sdpa")


OURS = "void openllama::cuda::(anonymous namespace)::"
KERNELS = {
    f"{OURS}fwd_kernel<__nv_bfloat16, 1>(openllama::cuda::RmsNormFwd)": "norms",
    f"{OURS}loose_bwd_kernel<float>(openllama::cuda::RmsNormBwd)": "norms",
    f"{OURS}reduce_kernel<float>(openllama::cuda::RmsNormBwd)": "norms",
    f"{OURS}fwd_kernel<__nv_bfloat16>(openllama::cuda::Swiglu)": "swiglu",
    f"{OURS}hopper::product_kernel<Backward<__nv_bfloat16>>(Maps, openllama::LinearSwiglu)": "matrix products",
    f"{OURS}hopper::product_kernel<Turn<__half, 64>>(Maps, openllama::LinearRotary)": "matrix products",
    f"{OURS}attention_fwd_kernel<__nv_bfloat16, true>(Maps, __nv_bfloat16*, float*, int*, Shape, int)": "attention",
    f"{OURS}attention_bwd_begin_kernel<__half>(openllama::AttentionBwd, int, int)": "attention",
    f"{OURS}rotary_kernel<__nv_bfloat16, false>(openllama::cuda::Rotary)": "rotary",
    f"{OURS}row_kernel<__nv_bfloat16, true>(openllama::cuda::CrossEntropy, int)": "loss",
    f"{OURS}scale_kernel<__nv_bfloat16>(openllama::cuda::Scale)": "loss",
    f"{OURS}segment_kernel<float>(openllama::cuda::EmbeddingBwd)": "embedding",
    f"{OURS}adamw_kernel<(openllama::cuda::Moments)0>(openllama::cuda::Table)": "optimizer",
    f"{OURS}squares_kernel<float>(openllama::cuda::Table, float*, bool)": "optimizer",
    "openllama::cuda::(anonymous namespace)::norm_kernel(float const*, float, float*)": "optimizer",
    "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNN": "matrix products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_kernel": "matrix products",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x128_64x3_nn_align8>(Params)": "matrix products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(cublasLt::cublasSplitKParams<float>)": "matrix products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false>>(Flash_fwd_params)": "attention",
    "void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128>>(Flash_bwd_params)": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>)": "attention",
    "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, false, true>(float*, float const*)": "attention",
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float, float, float, LogSoftMaxForwardEpilogue>": "loss",
    "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float, float>": "loss",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<c10::BFloat16, 4>>": "optimizer",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>(int, float)": "norms",
    "void at::native::vectorized_elementwise_kernel<4, rsqrt_kernel_cuda(TensorIteratorBase&)::lambda>": "norms",
    "void at::native::reduce_kernel<512, 1, ReduceOp<float, MeanOps<float, float, float>>>": "norms",
    "void at::native::vectorized_elementwise_kernel<4, silu_kernel(TensorIteratorBase&)::lambda>": "swiglu",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy_alignedK_contig<OpaqueType<2u>, unsigned int>": "rotary",
    "void at::native::(anonymous namespace)::embedding_backward_feature_kernel<c10::BFloat16, float, long>": "embedding",
    "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>>": "copies and adds",
    "void at::native::vectorized_elementwise_kernel<4, FillFunctor<float>, std::array<char*, 1ul>>": "copies and adds",
    "void at::native::reduce_kernel<128, 4, ReduceOp<float, func_wrapper_t<float, sum_functor<float>>>>": "copies and adds",
    "Memcpy DtoD (Device -> Device)": "copies and adds",
    "triton_poi_fused_add_mul_2": "copies and adds",
    "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3": "norms",
    "triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_backward_7": "norms",
    "triton_poi_fused_mul_silu_silu_backward_5": "swiglu",
    "triton_poi_fused_add_cat_cos_mul_neg_sin_slice_4": "rotary",
    "triton_red_fused__log_softmax__to_copy_nll_loss_forward_1": "loss",
    "_rms_norm_forward_kernel": "norms",
    "_triton_rope": "rotary",
    "_swiglu_backward_kernel": "swiglu",
    "liger_cross_entropy_kernel": "loss",
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL": "other",
}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
def test_part_of_a_kernel(kernel):
    assert parts.part_of(kernel) == KERNELS[kernel]


def test_parts_of_a_step_and_its_idle_time():
    kernels = [
        ("nvjet_a", 0, 4000),
        ("Memset", 3000, 5000),
        ("flash_fwd_kernel", 6000, 7000),
        ("what", 6500, 6600),
    ]
    made = parts.split(kernels, step_ms=10)
    assert {name: ms for name, ms in made.items() if ms} == {
        "matrix products": 4, "copies and adds": 2, "attention": 1, "other": pytest.approx(0.1), "idle": 4,
    }  # fmt: skip
    assert list(made) == list(parts.PARTS) and parts.split(kernels, step_ms=1)["idle"] == 0
    assert parts.text(made).startswith("matrix products 4.0, idle 4.0, copies and adds 2.0")


def test_the_ladders_rungs(monkeypatch):
    assert [rung.impl for rung in ladder.RUNGS] == [
        "HF eager + PyTorch Adam + padding mask", "+ fused attention", "+ fused optimizer", "our ops",
        "fused block, fp32 gradients and masters", "accumulation in the GEMM", "CUDA graph",
    ]  # fmt: skip
    answers = {
        rung.impl: {"rate": 100.0 * n, "dtype": "bfloat16", "losses": [10.0, 9.0], "ms": 1.0, "peak_gib": 1.0}
        for n, rung in enumerate(ladder.RUNGS, 1)
    }
    answers["our ops"] = {"error": "not installed"}
    monkeypatch.setattr(runner, "ask", lambda rung, work, command: answers[rung.impl])
    *_, rows = ladder.climb(WORK)
    assert [row["speedup"] for row in rows] == pytest.approx([1, 2, 3, None, 5, 6, 7])
    assert {row["bench"] for row in rows} == {"ladder"} and {row["ratio"] for row in rows} == {None}
    assert "not installed" in ladder.table(rows) and "7.00x" in ladder.table(rows)


def test_sizes_are_whole_or_say_their_layers(monkeypatch):
    answer = {
        "rate": 100.0,
        "dtype": "bfloat16",
        "losses": [10.0, 9.0],
        "ms": 1.0,
        "peak_gib": 1.0,
        "parameters": 2e9,
    }
    monkeypatch.setattr(
        runner, "ask", lambda one, work, command: answer | {"shape": {**work.shape, "layers": 3}}
    )
    row = sizes.measure(Work("65b", 2, 1024, fit_layers=True))
    assert (row["bench"], row["shape"]["layers"], row["rate_x_billions"]) == ("sizes", 3, 200)
    assert "3 layers" in sizes.line(row)
    whole = side.measure(sides.ours(), dataclasses.replace(WORK, fit_layers=True), CPU)
    assert "layers" not in whole["shape"]


def test_the_command_stores_under_its_shape_what_it_has(monkeypatch, capsys):
    seen, stored = {}, []

    def run(asked, work):
        seen.update(sides=asked, work=work)
        rows = [{"bench": "train_step", "impl": one.impl, **runner.EMPTY, "error": "none"} for one in asked]
        yield rows[:1]
        yield rows

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(runner, "store", lambda name, rows: stored.append(len(rows)) or name)
    words = "--preset 7b --layers 2 --batch 2 --accumulation 12 --peers hf:sdpa --moments bf16 --masters none --parts"
    monkeypatch.setattr(sys, "argv", ["tokens_per_second", *words.split()])
    tokens_per_second.main()
    assert "stored in tokens-per-second-7b-b2-s1024-l2\n" in capsys.readouterr().out
    assert stored == [1, 2]  # after each side
    assert seen["work"] == Work("7b", 2, 1024, 12, layers=2, parts=True)
    mine, theirs = seen["sides"]
    assert (mine.settings["moments"], mine.settings["masters"], theirs) == (
        "bf16",
        "none",
        sides.PEERS["hf:sdpa"],
    )


def test_a_step_is_timed_after_warming_up(monkeypatch):
    """What the medians leave out: the first steps."""
    seconds = iter([9.0] * GRAPH_WARMUP + [1.0, 3.0, 2.0])
    monkeypatch.setattr(side, "timed_step", lambda *arguments: (5.0, next(seconds)))
    made = side.measure(sides.ours(), dataclasses.replace(WORK, steps=3), CPU)
    assert made["ms"] == 2000 and made["rate"] == WORK.tokens / 2
