"""No figure in the README is typed by hand: its tables are what the stored results say. How ops are timed on a GPU."""

import json
import re
from functools import partial

import pytest
import torch

from benchmarks import report, report_ops, results
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
def test_the_report_with_and_without_a_gpu_run(stored, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(
        "".join(f"<!-- {n} -->\n<!-- /{n} -->\n" for n in ("training", "ops", "ops-gpu", "data"))
    )
    folder = tmp_path / "results"
    folder.mkdir()
    for path in results.FOLDER.glob("*.json"):
        if path.name == "ops-cpu.json" or not path.name.startswith("ops-"):
            (folder / path.name).write_text(path.read_text())
    if stored:
        (folder / "ops-card.json").write_text(json.dumps(gpu_run()))
    for name, value in {"README": readme, "RESULTS": folder, "DOCS": tmp_path / "docs"}.items():
        monkeypatch.setattr(report, name, value)
    report.main()
    text = readme.read_text()
    assert ("no GPU results stored yet" in text) is not stored
    assert ("docs/ops.svg" in text) is stored and ("0.80x" in text) is stored
    pictures = {"speed.svg", "speed.png"} | ({"ops.svg", "ops.png"} if stored else set())
    assert {path.name for path in (tmp_path / "docs").iterdir()} == pictures


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
