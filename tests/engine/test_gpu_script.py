"""The script for one GPU runs, on tiny models and this machine's CPU."""

import json
import subprocess
import sys
from pathlib import Path

STEPS = (
    "attention,one_token,start,waits,first_token,baseline,decoding,first_token_from_host,ingestion"
)


def test_its_steps_run(tmp_path):
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--tiny",
        "--out",
        tmp_path,
        "--steps",
        STEPS,
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert "failed" not in rows, rows["failed"]
    assert [row["step"] for row in rows["took"]] == STEPS.split(",")
    assert all(row["number"] == 0 for row in rows["waits"])
    assert all(row["error"] < 0.01 for row in rows["attention"])
