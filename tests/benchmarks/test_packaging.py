"""What an installation brings in: all of it pinned, its licences listed, and a source archive that can be built."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.reporting import licences, robustness_table

ROOT = Path(__file__).resolve().parents[2]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def test_every_package_that_an_installation_brings_in_is_pinned_to_one_release():
    # Except Triton, whose release torch decides.
    pinned = {canonicalize_name(pin.name) for pin in PINS} | {"triton"}
    assert len(pinned) == len(PINS) + 1 and all(
        [s.operator for s in pin.specifier] == ["=="] for pin in PINS
    )
    wanted = licences.requirements()
    assert len(wanted) >= 19
    assert not set(licences.closure(wanted)) - pinned
    assert not {canonicalize_name(requirement.name) for requirement in wanted} - pinned


def test_every_pin_is_within_what_pyproject_asks_for():
    asked = {
        canonicalize_name(requirement.name): requirement for requirement in licences.requirements()
    }
    for pin in PINS:
        version = next(iter(pin.specifier)).version
        requirement = asked.get(canonicalize_name(pin.name))
        assert requirement is None or requirement.specifier.contains(version), pin.name


def test_the_page_of_licences_names_every_package():
    text = licences.PAGE.read_text(encoding="utf-8")
    names = set(re.findall(r"^\| ([a-z0-9-]+) \|", text, flags=re.MULTILINE)) - {"package", "---"}
    assert set(licences.closure(licences.requirements())) - names == set()
    assert set(licences.MATERIAL) <= names
    material = (ROOT / "material.txt").read_text() + (ROOT / "material-base.txt").read_text()
    packages = {
        re.sub(r"-part-\d+$", "", line.split("==")[0])
        for line in material.splitlines()
        if "==" in line
    }
    assert packages == {re.sub(r"-part-\d+$", "", name) for name in licences.MATERIAL}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_the_source_archive_keeps_what_an_installation_reads():
    """The patterns that are left out of the archive, applied to the tracked files."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    left_out = re.findall(
        r'"([^"]+)"',
        re.search(r"^sdist\.exclude = \[(.*?)\]", text, flags=re.DOTALL | re.MULTILINE)[1],
    )
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    kept = [
        name
        for name in tracked
        if not any(
            name == p or name.startswith(f"{p}/") or fnmatch.fnmatch(name, p) for p in left_out
        )
    ]
    needed = (
        "LICENSE",
        "SECURITY.md",
        "constraints.txt",
        "material.txt",
        "CMakeLists.txt",
        "csrc/build_backend.py",
        "csrc/module.cpp",
        "csrc/cpu/module.cpp",
        "bert_decomp/evaluation/templates/report.html.j2",
        "lowrank_kernels/tuning.py",
    )
    assert set(needed) <= set(kept)
    assert sum((ROOT / name).stat().st_size for name in kept if (ROOT / name).exists()) < 3_000_000


def test_every_fault_that_was_found_is_kept_as_a_test():
    found = json.loads(robustness_table.FAULTS.read_text(encoding="utf-8"))
    assert len({entry["fault"] for entry in found}) == len(found) > 0
    for entry in found:
        file, _, name = entry["test"].partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), entry["test"]


def test_counts_of_any_result_are_found():
    """Plain counts win; without them every number counts, and groups of the same names are added up."""
    assert robustness_table.counts({"counts": {"calls": 3}, "seconds": 9, "options": {"n": 1}}) == {
        "calls": 3
    }
    result = {
        "kills": 2,
        "seed": 5,
        "failures": [],
        "ok": True,
        "targets": {"a": {"calls": 1, "kills": 7, "slowest": 3}, "b": {"calls": 4, "slowest": 2}},
    }
    assert robustness_table.counts(result) == {
        "kills": 2,
        "targets: calls": 5,
        "targets: slowest": 3,
    }
