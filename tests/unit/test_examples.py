"""Every program in examples/ runs as it stands, in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
ELSEWHERE = {"05_custom_policy.py"}  # run by test_policies.py
EXAMPLES = sorted(p.name for p in FOLDER.glob("*.py") if p.name not in ELSEWHERE)
PRINTS = {  # the last line of those that always say the same
    "06_frame.py": "correlation of TTFT with prompt length: ",
    "07_plots.py": os.path.join("plots", "timeline.json"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / name)], cwd=tmp_path, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert PRINTS.get(name, "") in done.stdout.splitlines()[-1]
    if name == "07_plots.py":
        made = {p.name for p in (tmp_path / "plots").iterdir()}
        assert {"ttft.svg", "links.svg", "report.html", "timeline.json"} <= made
