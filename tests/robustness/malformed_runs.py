"""Malformed plans and statistics of a run, as ``Case``s."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .damage import (
    BAD_JSON,
    HARMED,
    HARMLESS,
    HEADERS,
    RANKS,
    Case,
    Damage,
    edit,
    flip,
    header,
    link,
    run_line,
)


def entry(**changes: Any) -> Damage:
    """Changes in the first entry of a plan."""

    def damage(path: Path, draw: random.Random) -> None:
        values = json.loads(path.read_text())
        next(iter(values["matrices"].values())).update(changes)
        path.write_text(json.dumps(values))

    return damage


def plan(name: str, damage: Damage, expect: str = "refused") -> Case:
    def lay(base: Path, folder: Path, draw: random.Random) -> list[str]:
        (folder / "in").mkdir()
        path = shutil.copy(base / "whole" / "plan.json", folder / "in" / "plan.json")
        damage(path, draw)
        return run_line(base, folder / "out", encoder_fraction=None, plan_file=path)

    return Case("plan", name, "run", expect, lay)


def plan_cases() -> list[Case]:
    wide = {"in_features": 36, "out_features": 36, "rank": 3}

    def many(count: int) -> dict[str, Any]:
        return {f"m{i}": {**wide} for i in range(count)}

    out = [plan("undamaged", lambda path, draw: None, "harmless")]
    out += [plan(name, damage) for name, damage in (HARMED | BAD_JSON).items()]
    out += [plan(name, HARMLESS[name], "harmless") for name in ("byte-order-mark", "a-link-out")]
    out += [plan(f"flip-{number}", flip(), "either") for number in range(8)]
    out += [
        plan(f"rank-{name}", entry(rank=value))
        for name, value in RANKS.items()
        if value is not None
    ]
    out += [
        plan(name, damage)
        for name, damage in {
            "rank-above-full": entry(rank=37),
            "width-10^18": entry(in_features=10**18),
            "width-text": entry(in_features="36"),
            "width-other": entry(in_features=35),
            "width-0": entry(out_features=0),
            "loss-text": entry(expected_loss="small"),
            "loss-nan": entry(expected_loss=float("nan")),
            "loss-inf": entry(expected_loss=float("inf")),
            "loss-list": entry(expected_loss=[]),
            "foreign-field": entry(evil=1),
            "version-2": edit("version", to=2),
            "version-3": edit("version", to=3),
            "version-true": edit("version", to=True),
            "version-text": edit("version", to="1"),
            "matrices-none": edit("matrices", to={}),
            "matrices-list": edit("matrices", to=[]),
            "matrices-text": edit("matrices", to="all"),
            "entry-list": edit("matrices", "x", to=[]),
            "entry-null": edit("matrices", "x", to=None),
            "name-of-a-path": edit("matrices", "../../x", to=wide),
            "name-empty": edit("matrices", "", to=wide),
            "name-with-escapes": edit("matrices", "\x1b[2J\nerror: all is well\u202e", to=wide),
            "name-of-megabytes": edit("matrices", "x" * 900_000, to=wide),
            "name-surrogate": edit("matrices", "\ud800", to=wide),
            "dense-of-another-model": edit(
                "matrices", "bert.encoder.layer.99.x", to={**wide, "rank": None}
            ),
            "entries-5000": edit("matrices", to=lambda _: many(5000)),
            "entries-10^6": edit("matrices", to=lambda _: many(10**6)),
        }.items()
    ]
    return out


def statistics(
    name: str, damage: Damage, expect: str = "refused", file: str = "statistics.safetensors"
) -> Case:
    def lay(base: Path, folder: Path, draw: random.Random) -> list[str]:
        shutil.copytree(base / "stopped", folder / "out")
        damage(folder / "out" / file, draw)
        return run_line(base, folder / "out")

    return Case("statistics", name, "run", expect, lay)


def statistic(part: str, change: Callable[[torch.Tensor], Any], keep: bool = False) -> Damage:
    """Another tensor in place of the first one called ``part``; the checksum goes, as in older files, or is kept."""

    def damage(path: Path, draw: random.Random) -> None:
        content = path.read_bytes()
        about = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])["__metadata__"]
        found = load_file(path)
        name = next(name for name in found if name.endswith(part))
        found[name] = change(found[name]).contiguous()
        save_file(found, path, metadata=about if keep else {"bert_decomp": about["bert_decomp"]})

    return damage


def described(*path: str, to: Any) -> Damage:
    """Another description of the statistics, without a checksum."""

    def change(about: dict[str, Any]) -> None:
        text = json.loads(about["__metadata__"].pop("bert_decomp"))
        about["__metadata__"].pop("checksum", None)
        place = text
        for step in path[:-1]:
            place = place[step] if step != "*" else place[next(iter(place))]
        place[path[-1] if path[-1] != "*" else next(iter(place))] = to
        about["__metadata__"]["bert_decomp"] = json.dumps(text)

    return header(change)


def statistics_cases() -> list[Case]:
    out = [statistics("undamaged", lambda path, draw: None, "harmless")]
    out += [
        statistics(name, damage)
        for name, damage in (HARMED | HEADERS).items()
        if name
        not in (
            "a-folder",
            "a-pipe",
            "link-to-nothing",
            "link-to-itself",
            "link-to-a-device",
            "header-name-of-a-path",
        )
    ]
    out += [statistics("a-link-out", link(), "harmless")]
    out += [statistics(f"flip-{number}", flip(), "either") for number in range(6)]
    out += [
        statistics(
            f"flip-numbers-{number}", flip(lambda content: (len(content) // 3, len(content)))
        )
        for number in range(4)
    ]
    out += [
        statistics(name, damage)
        for name, damage in {
            "nan": statistic(":mean", lambda value: value * float("nan")),
            "inf": statistic(":second_moment", lambda value: value / 0),
            "float32": statistic(":mean", lambda value: value.float()),
            "int": statistic(":abs_mean", lambda value: value.long()),
            "longer": statistic(":mean", lambda value: torch.cat([value, value])),
            "scalar": statistic(":mean", lambda value: value[0]),
            "square-for-a-row": statistic(":mean", lambda value: torch.outer(value, value)),
            "empty-tensor": statistic(":second_moment", lambda value: value[:0]),
            "changed-under-its-checksum": statistic(":mean", lambda value: value + 1, keep=True),
            "tokens-text": described("tokens", "*", to="many"),
            "tokens-negative": described("tokens", "*", to=-1),
            "energy-nan": described("energy", "*", to=float("nan")),
            "energy-text": described("energy", "*", to="x"),
            "fingerprint-other": described("fingerprint", to="0" * 16),
            "fingerprint-list": described("fingerprint", to=[]),
            "source-list": described("source", to=[]),
            "source-of-a-path": described("source", "*", to="../../x"),
            "tokens-list": described("tokens", to=[1]),
            "metadata-none": header(lambda about: about.pop("__metadata__")),
            "metadata-deep": header(
                lambda about: about["__metadata__"].update(bert_decomp="[" * 100_000)
            ),
        }.items()
    ]
    out += [
        statistics(f"run.json-{name}", BAD_JSON[name], file="run.json")
        for name in ("deep-lists", "key-twice", "nul-inside", "a-list")
    ]
    out += [
        statistics(
            "run.json-seconds-text", edit("stage_seconds", to="long"), "harmless", "run.json"
        ),
        statistics("run.json-other-options", edit("options", "seed", to=1), file="run.json"),
    ]
    return out
