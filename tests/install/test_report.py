"""No figure in the README is typed by hand: its tables are what the stored results say. How ops are timed on a GPU."""

import json
import re
from functools import partial

import pytest
import torch

from benchmarks import report, report_ops, report_pictures, report_training, results
from benchmarks.ops import (
    bars,
    bench_adamw,
    bench_cross_entropy,
    bench_rms_norm,
    bench_rotary,
    bench_swiglu,
    timing,
)
from openllama.kernels import library
from openllama.presets import preset


def test_readme_tables_are_the_stored_results():
    text = report.README.read_text()
    assert report.filled(text) == text, "run `make report` after a benchmark"


def test_stored_results_say_where_they_come_from():
    files = sorted(results.FOLDER.glob("*.json"))
    assert files
    for path in files:
        run = json.loads(path.read_text())
        assert run.keys() == {"command", "commit", "date", "device", "versions", "rows"} and run["rows"], path
        assert run["commit"] not in ("", "unknown") and not run["commit"].endswith("-dirty"), path
        assert all({"bench", "shape", "impl", "ms", "rate", "unit"} <= row.keys() for row in run["rows"]), (
            path
        )


def test_a_missing_mark_is_named():
    with pytest.raises(ValueError, match="<!-- speed -->"):
        report.fill("no mark here", "speed", "")


def test_the_chinese_readme_gives_the_same_commands():
    """In the same order, and none that the English one has not."""
    blocks = [
        re.findall(r"```\w+\n.*?```", (report.ROOT / name).read_text(), re.DOTALL)
        for name in ("README.md", "README.zh.md")
    ]
    assert [block for block in blocks[0] if block in blocks[1]] == blocks[1] != []


MARKS = ("training", "answer", "ladder", "sizes", "cost", "published", "ops", "ops-gpu", "data")

# ---------------------------------------------------------------- the training step

SHAPE = {"preset": "7b", "batch": 2, "seq": 1024, "accumulation": 12}


def side(impl, rate, shape=SHAPE, ours=14000.0, **more):
    """A row of a training run, as benchmarks/tokens_per_second.py stores it."""
    said = {"bench": "train_step", "shape": shape, "impl": impl, "optimizer": "lean", "unit": "tokens/s"}
    said |= {"dtype": "bfloat16", "settings": "", "parts": None, "error": None}
    if rate is None:  # a side that did not run
        none = ("ms", "rate", "model_tflops", "of_ceiling", "peak_gib", "ratio", "parameters", "dtype")
        return said | dict.fromkeys(none) | more
    timed = {"ms": 1e6 / rate, "rate": rate, "model_tflops": rate / 20, "of_ceiling": rate / 20000}
    return said | timed | {"peak_gib": 99.5, "ratio": ours / rate, "parameters": 6_885_879_808} | more


def training_run(rows, device="NVIDIA H200", date="2026-12-01"):
    return {
        **{"command": "time it", "commit": "1234567", "date": date, "device": device, "versions": {}},
        "rows": rows,
    }


def peers():
    return training_run(
        [
            side("ours", 14000.0, parts={"forward": 500.0, "backward": 900.0}, settings="recompute none"),
            side("ours:bf16-states", 14200.0),
            side("hf:eager", None, error="out of memory"),
            side("hf:sdpa", 10000.0),
            side("hf:compile", 12500.0, parts={"forward": 600.0, "optimizer": 20.0}),
            side("hf:fp8+compile", 19000.0),
            side("hf:xformers", None, error="not installed"),
            side("hf:flash", None, error="not installed"),
            side("hf:liger", None, error="RuntimeError: a | b\n" + "long " * 40),
        ]
    )


def test_a_run_has_a_line_for_each_side_and_the_best_bf16_peer_in_bold():
    lines = report_training.table(peers()).splitlines()
    assert lines[0] == "**7b, batch 2, seq 1024, accumulation 12, bfloat16, NVIDIA H200**"
    sides = {line.split(" | ")[0].strip("|* "): line for line in lines[4:] if line.startswith("|")}
    assert sides["ours"] == "| ours | lean | 14,000 | 700 | 70.0% | 99.5 |  |"
    assert sides["hf:compile"].endswith("| **12,500** | **625** | **62.5%** | **99.5** | **1.12x** |")
    assert sum("**" in line for line in sides.values()) == 1  # fp8, which is faster, is other arithmetic
    assert sides["hf:eager"] == "| hf:eager | lean | out of memory |  |  |  |  |"
    assert "RuntimeError: a \\| b long" in sides["hf:liger"] and len(sides["hf:liger"]) < 130
    assert lines[-1] == "not installed: hf:xformers, hf:flash" and "hf:flash" not in sides
    assert "ours with recompute none" in lines


def test_a_row_from_before_there_were_more_columns():
    new = ("settings", "peak_gib", "parameters", "parts", "error")
    run = peers()
    run["rows"] = [{k: v for k, v in row.items() if k not in new} for row in run["rows"] if row["rate"]]
    assert "| ours | lean | 14,000 | 700 | 70.0% |  |  |" in report_training.table(run)
    assert not report_pictures.has_parts([run]) and report_pictures.speed([run])
    assert "| **ours** | **7b** |" in report_training.published_table([], [run])


def test_runs_of_the_newest_day_come_first_and_cpus_last():
    tiny = SHAPE | {"preset": "tiny"}
    runs = [
        training_run([side("ours", 1.0, tiny)], "AMD EPYC, 2 threads", "2026-12-02"),
        training_run([side("ours", 1.0)], date="2026-11-01"),
        training_run([side("ours", 1.0, SHAPE | {"preset": "125m"})]),
        training_run([side("ours", 1.0, SHAPE | {"preset": "llama3-8b"})]),
        training_run([side("ours", 1.0, SHAPE | {"batch": 8})]),
        training_run([side("ours", 1.0)]),
    ]
    assert report_training.ordered(runs) == [runs[i] for i in (5, 4, 3, 2, 1, 0)]


def test_a_rung_is_held_against_the_last_one_that_ran():
    rungs = [side("eager", 8000.0), side("graphs", None, error="no such"), side("fused", 12000.0)]
    lines = report_training.ladder(training_run([*rungs, side("block", 14400.0)])).splitlines()[4:]
    assert lines[0].endswith("|  |  |") and "| no such |" in lines[1] and lines[1].endswith("|  |  |")
    assert lines[2].endswith("| 1.50x | 1.50x |") and lines[3].endswith("| 1.20x | 1.80x |")


def test_a_model_that_was_cut_says_so():
    cut = side("ours", 5000.0, SHAPE | {"preset": "65b", "layers": 12}, parameters=10_000_000_000)
    unknown = {**cut, "parameters": None}
    lines = report_training.sizes(training_run([side("ours", 14000.0), cut, unknown])).splitlines()[4:]
    assert lines[0].startswith("| 7b, 2 x 1024 | ours | 14,000 |") and lines[0].endswith("| 96,402 |")
    assert lines[1].startswith("| 65b, 12 of its 80 layers, 2 x 1024 |") and lines[1].endswith("| 50,000 |")
    assert lines[2].endswith("|  |")


def test_cost_takes_each_side_at_its_best_batch_on_the_newest_card():
    large = training_run([side("ours", 15500.0, SHAPE | {"batch": 8}), side("hf:eager", None)])
    other = training_run([side("ours", 99999.0)], "NVIDIA H100", "2026-01-01")
    text = report_training.cost_table([peers(), large, other], report.published())
    assert "| ours, 8 x 1024 | NVIDIA H200 | 15,500 | 8,961 | 3.000 | $26,882 |" in text
    assert "| hf:compile, 2 x 1024 |" in text and "99,999" not in text and "hf:eager" not in text
    assert text.splitlines()[-1].startswith("| Open-Llama, 2023 | A100 80 GB | 3,290 | 42,215 | 1.575 |")
    on_cpu = training_run([side("ours", 1.0)], "AMD EPYC, 2 threads")
    assert report_training.cost_table([on_cpu], []) == report_training.NOTHING


def test_every_published_figure_has_a_source_and_is_one_figure():
    entries = report.published()
    needed = {"project", "model", "parameters_billion", "device", "year", "source"}
    for entry in entries:
        rate = (
            {"tokens_per_second_per_gpu"} if "tokens_per_second_per_gpu" in entry else {"tokens", "gpu_hours"}
        )
        assert needed | rate <= entry.keys() <= needed | rate | {"precision", "seq", "how"}, entry
        assert entry["source"].startswith("https://") and report_training.rate_of(entry) > 0
        assert "how" in entry or "tokens" not in entry, entry
    rates = {(e["project"], e["model"]): report_training.rate_of(e) for e in entries}
    # the speeds that Open-Llama's own table states
    assert rates["LLaMA", "LLaMA 7B"] == pytest.approx(3370, abs=1)
    assert rates["LLaMA", "LLaMA 65B"] == pytest.approx(380, abs=1)
    assert rates["Bloom", "Bloom 175B"] == pytest.approx(93.9, abs=0.1)
    assert rates["GPT-NeoX", "GPT-NeoX 20B"] == pytest.approx(635.6, abs=0.1)
    table = report_training.published_table(entries, [peers()])
    assert table.splitlines()[2].startswith(
        "| **ours** | **7b** | **NVIDIA H200, bfloat16, seq 1024** | **2026** |"
    )


# ---------------------------------------------------------------- the op suite on a GPU


def rows_of(bench, shape, moved, shares, failed=()):
    """Rows on a card that copies 1000 GB/s."""
    timed = [
        {"impl": impl, "ms": moved / share / 1e9, "rate": 1000 * share, "of_ceiling": share}
        for impl, share in shares.items()
    ]
    none = {"ms": None, "rate": None, "of_ceiling": None, "error": "RuntimeError: bad"}
    rows = [*timed, *({"impl": impl, **none} for impl in failed)]
    return [{"bench": bench, "shape": shape, "unit": "GB/s", "bytes": moved, **row} for row in rows]


def gpu_run():
    fast = {"ours:cuda": 0.95, "ours:triton": 0.9, "eager:hf": 0.1, "eager:F": 0.5, "compile": 0.8}
    return {
        **{"command": "pytest", "commit": "1234567", "date": "2026-01-02", "device": "Card", "versions": {}},
        "rows": [
            *rows_of("copy", {"gib": 1}, 2**31, {"torch": 1.0}),
            *rows_of("rms_norm_fwd", {"tokens": 1}, 4e8, fast | {"ours:cuda": 0.64}),
            *rows_of("rms_norm_fwd", {"tokens": 2}, 4e8, fast | {"ours:cuda": 0.8}),
            *rows_of("rms_norm_fwd", {"tokens": 3}, 8e8, fast, failed=["quack"]),
            *rows_of("rms_norm_fwd", {"tokens": 4}, 4e6, fast | {"ours:cuda": 0.2}),
            *rows_of("swiglu_fwd", {"tokens": 1}, 4e8, {"compile": 0.8}, failed=["ours:cuda", "ours:triton"]),
        ],
    }


def test_the_gpu_table_has_the_worst_and_the_best_large_shape():
    lines = report_ops.table(gpu_run()).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["tokens 1", "tokens 3", "tokens 1"]
    assert lines[0].endswith("| 0.625 | 640 GB/s | 64.0% | 90.0% | compile | 0.500 | 0.80x |")
    assert lines[1].endswith("| 0.842 | 950 GB/s | 95.0% | 90.0% | compile | 1.000 | 1.19x |")
    assert "failed" in lines[2] and not lines[2].endswith("x |")


def test_what_is_under_its_bar():
    rows = gpu_run()["rows"]
    under = [(r["bench"], r["shape"]["tokens"], r["impl"]) for r in bars.missed(rows)]
    large = [("rms_norm_fwd", 1, "ours:cuda"), ("rms_norm_fwd", 2, "ours:cuda")]
    small = [("rms_norm_fwd", 4, "ours:cuda")]  # 4 MB: held against the fastest peer
    assert under == [*large, *small, ("swiglu_fwd", 1, "ours:cuda"), ("swiglu_fwd", 1, "ours:triton")]
    printed = "\n".join(bars.table(rows))
    assert "5 under their bar" in printed and "swiglu_fwd tokens=1 ours:cuda: RuntimeError: bad" in printed
    assert "0.6250 640 64.0%!" in printed and "0.8421 950 95.0% " in printed


def test_a_peer_within_the_noise_is_no_faster():
    slower = rows_of("grad_norm", {"n": 1}, 4e9, {"ours:cuda": 0.50, "eager": 0.52})
    equal = rows_of("grad_norm", {"n": 2}, 4e9, {"ours:cuda": 0.50, "eager": 0.505})
    assert bars.missed([*slower, *equal]) == [slower[0]]


@pytest.mark.parametrize("stored", (False, True))
def test_the_report_with_and_without_gpu_runs(stored, tmp_path, monkeypatch):
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    readme.write_text("".join(f"<!-- {n} -->\n<!-- /{n} -->\n" for n in MARKS))
    folder.mkdir()
    for path in (results.FOLDER / "ops-cpu.json", *results.FOLDER.glob("data-*.json")):
        (folder / path.name).write_text(path.read_text())
    runs = {"tokens-per-second-tiny-cpu": training_run([side("ours", 9.0)], "AMD EPYC, 2 threads")}
    if stored:
        runs |= dict.fromkeys(("tokens-per-second-7b-card", "ladder-card", "sizes-card"), peers())
        runs["ops-card"] = gpu_run()
        gaps = {"loss_gap_max": 0.25, "loss_gap_mean": 0.125, "grad_gap_max": 0.5, "grad_gap_median": 0.0625}
        runs["same-answer-card"] = training_run([side("ours", 9.0) | gaps])
    for name, run in runs.items():
        (folder / f"{name}.json").write_text(json.dumps(run))
    for name, value in {"README": readme, "RESULTS": folder, "DOCS": tmp_path / "docs"}.items():
        monkeypatch.setattr(report, name, value)
    report.main()
    text = readme.read_text()
    assert ("no GPU results stored yet" in text) is not stored
    assert text.count(report_training.NOTHING) == (0 if stored else 4)  # answer, ladder, sizes, cost
    assert all(
        (mark in text) is stored
        for mark in ("docs/ops.svg", "docs/parts.svg", "0.80x", "1.12x", "| 0.2500 | 0.1250 |")
    )
    made = {path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()}
    names = ("speed", "parts", "ops") if stored else ("speed",)
    assert made.keys() == {f"{name}.{suffix}" for name in names for suffix in ("svg", "png")}
    report.main()
    again = {path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()}
    assert again == made and readme.read_text() == text  # the same figures give the same files


@pytest.fixture
def no_card(monkeypatch):
    """torch.cuda's clock, on the CPU; what is done with it, in order."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            return 0.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**30)
    monkeypatch.setattr(timing, "CLEAR", 64)
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)
    return done


def test_a_race_restores_and_clears_before_each_call_and_goes_on_without_what_raises(no_card):
    def one():
        no_card.append("one")

    def missing():
        raise ModuleNotFoundError("No module named 'quack'", name="quack")

    def broken():
        raise RuntimeError("no such shape\nmore")

    builders = {"a": lambda: one, "b": missing, "c": lambda: broken, "d": lambda: one}
    made = timing.race(builders, prepare=lambda: no_card.append("prepare"), memory=True)
    assert list(made) == list("abcd")
    assert made["b"].error == "not installed" and made["c"].error == "RuntimeError: no such shape"
    assert made["a"] == made["d"] == timing.Result(0.25, timing.MIN_ROUNDS, peak_gib=2.0)
    call = ["prepare", "event", "one", "event"]
    timed = no_card[no_card.index("event") - 1 :]
    assert timed == call * (len(timed) // 4) and len(timed) // 4 == 2 * (timing.MIN_ROUNDS + 1)


GPU_CASES = {
    "rms_norm_fwd": partial(bench_rms_norm.test_fwd, tokens=4, hidden=16),
    "rms_norm_residual_fwd": partial(bench_rms_norm.test_residual_fwd, tokens=4, hidden=16),
    "rms_norm_bwd": partial(bench_rms_norm.test_bwd, tokens=4, hidden=16),
    "rms_norm_residual_bwd": partial(bench_rms_norm.test_residual_bwd, tokens=4, hidden=16),
    "swiglu_fwd": partial(bench_swiglu.test_fwd, tokens=4, intermediate=8),
    "swiglu_bwd": partial(bench_swiglu.test_bwd, tokens=4, intermediate=8),
    "swiglu_bwd_": partial(bench_swiglu.test_bwd_inplace, tokens=4, intermediate=8),
    "rotary_fwd": partial(
        bench_rotary.test_inplace, tokens=4, heads=2, kv_heads=1, inverse=False, head_dim=8
    ),
    "rotary_bwd": partial(bench_rotary.test_inplace, tokens=4, heads=2, kv_heads=1, inverse=True, head_dim=8),
    "cross_entropy_fwd_bwd": partial(bench_cross_entropy.test_inplace, tokens=4, vocab=32),
    "adamw_fp32": partial(bench_adamw.test_forms, form="fp32", name="tiny"),
    "adamw_masters": partial(bench_adamw.test_forms, form="masters", name="tiny"),
}


@pytest.mark.skipif(bool(library.missing), reason=library.missing)
@pytest.mark.parametrize("bench", GPU_CASES)
def test_gpu_cases_run_on_the_cpu_kernels(bench, no_card, monkeypatch):
    """They call the raw ops, whose CPU kernels have the schemas of the CUDA ones; and PyTorch's own, uncompiled."""
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)
    monkeypatch.setattr(timing, "MAX_ROUNDS", 1)
    ran = []

    def race(name, shape, builders, *, moved, prepare=None, dtype=torch.bfloat16):
        wanted = [impl for impl in builders if impl == "ours:cuda" or impl.startswith("eager")]
        made = timing.race({impl: builders[impl] for impl in wanted}, prepare)
        ran.append((name, len(made) > 1, {m.error for m in made.values()}, moved > 0))

    GPU_CASES[bench](race)
    assert ran == [(bench, True, {""}, True)]


@pytest.mark.parametrize("form, bytes_each", (("fp32", 28), ("masters", 30), ("lean", 16)))
def test_bytes_of_an_adamw_step(form, bytes_each):
    grads = bench_adamw.tensors("tiny", torch.float32)
    moved = bench_adamw.FORMS[form]("tiny", grads)[0] + bench_adamw.nbytes(grads)
    count = sum(size.numel() for size in bench_adamw.sizes("tiny"))
    assert count == sum(p.numel() for p in grads) > preset("tiny").vocab_size
    assert moved / count == pytest.approx(bytes_each, abs=0.1)
