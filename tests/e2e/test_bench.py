"""`ctxserve bench`: its numbers agree with each other. How large they are is the machine's business."""

import json

import pytest

from server import run

OUTPUT, REPEAT = 6, 3


def close(a, b):
    return a == pytest.approx(b, rel=1e-6)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Everything at once: the report, and what was printed."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    done = run(
        "bench", "--model", "demo", "--batch", "1,5", "--prompt", "20,200", "--output", OUTPUT, "--repeat", REPEAT,
        "--ttft", "30,300", "--prefill", "4x100", "--http", "--bandwidth-gbs", 20, "--tflops", 0.5, "--json", path,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def check_speed(speed, batch, prompt):
    assert speed["tokens"] == batch * OUTPUT and speed["seconds"] > 0
    assert close(speed["tokens_per_second"], speed["tokens"] / speed["seconds"])
    assert close(speed["ms_per_step"], speed["seconds"] * 1e3 / OUTPUT)
    assert len(speed["runs"]) == REPEAT and close(sorted(speed["runs"])[REPEAT // 2], speed["tokens_per_second"])
    assert 0 <= speed["itl_ms"]["p50"] <= speed["itl_ms"]["p99"]
    # The middle of the measured tokens of a sequence that had one or more before.
    assert speed["mean_context"] >= prompt + 1 + (OUTPUT - 1) / 2


def test_the_report_says_what_was_measured(measured):
    report, _ = measured
    assert {"version", "commit", "date", "model", "device", "engine", "settings", "ready"} <= set(report)
    assert "gpt_oss" in report["model"]["description"] and "CPU" in report["device"]
    assert report["settings"]["output"] == OUTPUT and report["settings"]["bandwidth_gbs"] == 20
    ready = report["ready"]
    parts = [ready[part] for part in ("open", "weights", "kv_cache", "first_token")]
    assert all(part >= 0 for part in parts) and sum(parts) <= ready["seconds"]


def test_decode_counts_every_token_of_the_batch(measured):
    report, _ = measured
    cases = report["decode"]
    assert [(case["batch"], case["prompt"]) for case in cases] == [(1, 20), (1, 200), (5, 20), (5, 200)]
    for case in cases:
        check_speed(case, case["batch"], case["prompt"])
        assert close(case["roofline"], case["bytes_per_step"] / 20e9 / (case["ms_per_step"] / 1e3))
    # More sequences touch more experts, longer ones have more keys and values.
    assert cases[2]["bytes_per_step"] > cases[0]["bytes_per_step"] < cases[1]["bytes_per_step"]


def test_the_other_measurements_are_consistent(measured):
    report, _ = measured
    assert [case["prompt"] for case in report["ttft"]] == [30, 300]
    for case in report["ttft"]:
        assert len(case["runs_ms"]) == REPEAT and case["ms"] == sorted(case["runs_ms"])[REPEAT // 2] > 0
        assert close(case["roofline"], case["flops"] / 0.5e12 / (case["ms"] / 1e3))
    [case] = report["prefill"]
    assert case["tokens"] == 400 and close(case["tokens_per_second"], 400 / case["seconds"])
    assert len(case["runs"]) == REPEAT
    assert [case["prompt"] for case in report["http"]] == [20, 200]
    for case in report["http"]:
        check_speed(case["engine"], 1, case["prompt"])
        check_speed(case["http"], 1, case["prompt"])
        ratio = case["http"]["ms_per_step"] / case["engine"]["ms_per_step"]
        assert case["overhead_percent"] == pytest.approx((ratio - 1) * 100, abs=1e-6)


def test_the_table_has_a_row_a_case(measured):
    _, table = measured
    rows = table.splitlines()
    assert rows[0].startswith("ctxserve ") and "ready in " in table
    names = ["decode 1 x 20", "decode 5 x 200", "engine 1 x 20", "HTTP 1 x 200", "TTFT 300", "prefill 4 x 100"]
    for name in names:
        assert sum(row.startswith(f"{name} ") for row in rows) == 1, table


def test_json_on_standard_output_is_alone_there():
    done = run("bench", "--model", "demo", "--ttft", 16, "--repeat", 1, "--json", "-", "--log-level", "error")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["decode"] == report["http"] == report["prefill"] == []
    [case] = report["ttft"]
    # Without the device's figures there is no share of them.
    assert case["roofline"] is None and "TTFT 16" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--batch", "0"], 2, ["--batch", "0"]),
        (["--prefill", "16"], 2, ["--prefill", "256x1024"]),
        (["--output", "many"], 2, ["--output", "many"]),
        (["--max-num-seqs", "2", "--batch", "4"], 2, ["--max-num-seqs", "--batch needs 4"]),
        (["--port", "1"], 2, ["--port"]),
        (["--prompt", "16300", "--output", "85"], 1, ["16386", "--max-model-len is 16384"]),
        (["--max-model-len", "100", "--ttft", "100"], 1, ["--ttft 100", "100"]),
        (["--batch", "600"], 1, ["--batch 600", "--max-num-batched-tokens"]),
        (["--batch", "8", "--prompt", "4k", "--kv-cache-memory-bytes", "10MB"], 1, ["--kv-cache-memory-bytes"]),
        (["--json", "/no/such/place/x.json"], 1, ["/no/such/place"]),
        (["replay:/no/such/file"], 1, ["/no/such/file"]),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_before_it_is_tried(args, code, says):
    done = run("bench", *args, "--log-level", "error")
    assert done.returncode == code and done.stdout == "", (done.returncode, done.stdout, done.stderr)
    assert all(text in done.stderr for text in says), done.stderr
