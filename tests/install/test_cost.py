"""What a training costs, from a rate, a run's metrics, or stored results."""

import json

import pytest

from benchmarks import cost


def metrics(tmp_path, *records):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def step(number, tokens, speed):
    return {"step": number, "loss": 1.0, "tokens": tokens, "tokens_per_second_per_gpu": speed}


def test_open_llamas_own_figures():
    hours = cost.gpu_hours(500e9, 3290)
    assert int(hours) == 42215 and cost.days(hours, 64) == pytest.approx(27.48, abs=0.01)
    assert hours * cost.ORIGINAL_GPU_HOUR == pytest.approx(66_489, abs=1)


def test_a_rate_in_words(capsys):
    cost.main(["--tokens", "500e9", "--rate", "3290", "--gpu-hour", "1.5", "--gpus", "64"])
    said = "500,000,000,000 tokens at 3,290 tokens/s/GPU: 42,215 GPU-hours, $63,323.20 at $1.50 a GPU-hour"
    assert capsys.readouterr().out == f"{said}; 27.5 days on 64 GPUs\n"


def test_a_run_is_what_its_step_records_say(tmp_path, capsys):
    """Not every step is logged, validation has no speed, and a resumed run goes on from the tokens it had."""
    path = metrics(
        tmp_path,
        step(10, 36_000, 10.0),
        {"step": 10, "valid_loss": 2.0, "valid_bits_per_byte": 1.0},
        step(20, 72_000, 20.0),
        step(25, 108_000, 5.0),  # resumed, from a step that had not been logged
    )
    assert cost.of_run(path) == (108_000, pytest.approx(1.0 + 0.5 + 2.0))
    cost.main(["--run", str(path), "--gpu-hour", "2", "--gpus", "2"])
    said = "108,000 tokens at 9 tokens/s/GPU: 3.50 GPU-hours, $7.00 at $2.00 a GPU-hour; 0.073 days on 2 GPUs"
    assert capsys.readouterr().out == said + "\n"


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    path = metrics(tmp_path, step(1, 3600, 1.0))
    path.write_text(path.read_text() + '{"step": 2, "loss')
    assert cost.of_run(path) == (3600, 1.0)


def test_stored_runs_side_by_side(tmp_path, capsys):
    rows = [
        {"shape": {"preset": "7b", "batch": 2}, "impl": impl, "rate": rate, "unit": "tokens/s"}
        for impl, rate in (("ours", 14000.0), ("hf:sdpa", 10000.0), ("hf:eager", None))
    ]
    path = tmp_path / "tokens-per-second-7b.json"
    path.write_text(json.dumps({"device": "Card", "rows": rows}))
    cost.main(["--results", str(path), "--gpu-hour", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "500,000,000,000 tokens at $3.00 a GPU-hour" and lines[2] == "preset 7b, batch 2, Card"
    assert [line.split() for line in lines[4:]] == [
        ["ours", "14,000", "9,921", "$29,762"],
        ["hf:sdpa", "10,000", "13,889", "$41,667"],
    ]


@pytest.mark.parametrize(
    "words, named",
    (
        ("--rate 0 --gpu-hour 1", "--rate: got 0"),
        ("--rate nan --gpu-hour 1", "--rate: got nan"),
        ("--rate 10 --tokens -1 --gpu-hour 1", "--tokens: got -1"),
        ("--rate 10 --gpu-hour inf", "--gpu-hour: got inf"),
        ("--rate 10 --gpu-hour 1 --gpus 0", "--gpus: got 0"),
        ("--run RUN --tokens 1 --gpu-hour 1", "--tokens: a run's tokens"),
        ("--run RUN --gpu-hour 1", "--run: RUN: no step"),
        ("--run GONE --gpu-hour 1", "--run: GONE is not a file"),
        ("--results GONE --gpu-hour 1", "--results: GONE: No such file"),
        ("--results RUN --gpu-hour 1", "--results: RUN: takes files of"),
        ("--results RUN --gpu-hour 1 --gpus 2", "--gpus: GPU-hours and prices"),
    ),
)
def test_an_error_names_the_argument(words, named, tmp_path):
    files = {"RUN": str(metrics(tmp_path)), "GONE": str(tmp_path / "gone.jsonl")}
    for name, path in files.items():
        words, named = words.replace(name, path), named.replace(name, path)
    with pytest.raises((ValueError, OSError)) as e:
        cost.main(words.split())
    assert str(e.value).startswith(named)


@pytest.mark.parametrize("second", (step(2, 50, 1.0), step(2, 200, 0.0)))
def test_records_of_more_than_one_run_are_no_runs(second, tmp_path):
    with pytest.raises(ValueError, match=r"--run: .*step 2 has .* tokens"):
        cost.of_run(metrics(tmp_path, step(1, 100, 1.0), second))


def test_a_record_without_its_tokens_is_named(tmp_path):
    with pytest.raises(ValueError, match="a step record without 'tokens'"):
        cost.of_run(metrics(tmp_path, {"step": 1, "loss": 1.0}))
