"""The README's tables are what the committed result files give."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_agrees_with_the_result_files():
    found = subprocess.run([sys.executable, "-m", "benchmarks.readme_tables", "--check"], cwd=ROOT, capture_output=True,
                           text=True)
    assert found.returncode == 0, found.stderr
