"""Every malformed file: tuning tables and options are here, the others in the modules beside."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from .damage import (
    BAD_JSON,
    HARMED,
    HARMLESS,
    RANKS,
    Case,
    Damage,
    edit,
    flip,
    run_line,
    table,
)
from .malformed_data import data_cases
from .malformed_int8 import int8_cases
from .malformed_models import model_cases
from .malformed_runs import plan_cases, statistics_cases

# Tuning tables.


def tuned(name: str, damage: Damage, expect: str = "refused") -> Case:
    def lay(base: Path, folder: Path, draw: random.Random) -> list[str]:
        shutil.copytree(base / "tables", folder / "tables")
        damage(folder / "tables" / "some_gpu.json", draw)
        return [str(folder / "tables")]

    return Case("table", name, "table", expect, lay)


def table_cases() -> list[Case]:
    first = ("entries", next(iter(table()["entries"])))
    out = [tuned("undamaged", lambda path, draw: None, "harmless")]
    out += [
        tuned(name, damage)
        for name, damage in (HARMED | BAD_JSON).items()
        if name not in ("link-to-nothing", "link-to-itself")
    ]
    out += [tuned(name, damage, "harmless") for name, damage in HARMLESS.items()]
    out += [tuned(f"flip-{number}", flip(), "either") for number in range(10)]
    out += [
        tuned(name, damage)
        for name, damage in {
            "version-1": edit("version", to=1),
            "version-true": edit("version", to=True),
            "entries-list": edit("entries", to=[]),
            "backend-unknown": edit(*first, "eager", "backend", to="evil"),
            "backend-path": edit(*first, "eager", "backend", to="../../x"),
            "backend-list": edit(*first, "eager", "backend", to=["torch"]),
            "tile-list": edit(*first, "eager", "options", "tile", to=[64]),
            "tile-field-foreign": edit(*first, "eager", "options", "tile", "evil", to=1),
            "tile-block-10^18": edit(*first, "eager", "options", "tile", "block_m", to=10**18),
            "tile-block-48": edit(*first, "eager", "options", "tile", "block_m", to=48),
            "tile-block-negative": edit(*first, "eager", "options", "tile", "block_n", to=-64),
            "tile-warps-text": edit(*first, "eager", "options", "tile", "warps", to="8"),
            "tile-stages-true": edit(*first, "eager", "options", "tile", "stages", to=True),
            "tile-splits-0": edit(*first, "eager", "options", "tile", "splits", to=0),
            "times-list": edit(*first, "eager", "milliseconds", to=[1]),
            "times-nan": edit(*first, "eager", "milliseconds", "torch", to=float("nan")),
            "times-text": edit(*first, "eager", "milliseconds", "torch", to="fast"),
            "entry-null": edit("entries", "x", to=None),
            "key-of-a-path": edit(
                "entries", "../../x/m1", to=lambda _: table()["entries"][first[1]]
            ),
            "rows-0": edit(
                "entries",
                "linear/bfloat16/k1/n1/f0/r1/m0",
                to=lambda _: table()["entries"][first[1]],
            ),
            "rows-10^30": edit(
                "entries",
                f"linear/bfloat16/k1/n1/f0/r1/m{10**30}",
                to=lambda _: table()["entries"][first[1]],
            ),
        }.items()
    ]
    return out


# Files of options.


def options(
    name: str, content: bytes | dict[str, Any], expect: str = "refused", suffix: str = "json"
) -> Case:
    """A file of options: these bytes, or the usual options with these changes."""

    def lay(base: Path, folder: Path, draw: random.Random) -> list[str]:
        path = folder / f"options.{suffix}"
        usual = dict(
            part.removeprefix("--").split("=", 1) for part in run_line(base, folder / "out")
        )
        usual["encoder_fraction"] = 0.5
        path.write_bytes(
            content if isinstance(content, bytes) else json.dumps(usual | content).encode()
        )
        return [str(path)]

    return Case("options", name, "run", expect, lay)


def broken_options(name: str, damage: Damage, expect: str = "refused") -> Case:
    def lay(base: Path, folder: Path, draw: random.Random) -> list[str]:
        argv = options(name, {}).lay(base, folder, draw)
        damage(Path(argv[0]), draw)
        return argv

    return Case("options", name, "run", expect, lay)


def options_cases() -> list[Case]:
    laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
    )
    out = [options("undamaged", {}, "harmless")]
    out += [broken_options(name, damage) for name, damage in (HARMED | BAD_JSON).items()]
    out += [broken_options("byte-order-mark", HARMLESS["byte-order-mark"], "harmless")]
    # Not in the names of the folders to write to: others are as good.
    before = flip(lambda content: (0, content.index(b'"cache_dir"')))
    out += [broken_options(f"flip-{number}", before, "either") for number in range(4)]
    out += [
        options(
            f"rank-{name}",
            {"encoder_fraction": None, "allocation": "uniform", "rank": value},
            "harmless" if name == "text" else "refused",
        )
        for name, value in RANKS.items()
        if value is not None and name not in ("list",)
    ]
    out += [
        options(name, changes)
        for name, changes in {
            "unknown-option": {"evil": 1},
            "share-nan": {"encoder_fraction": float("nan")},
            "share-text": {"encoder_fraction": "half"},
            "share-2": {"encoder_fraction": 2},
            "share-object": {"encoder_fraction": {"a": {"b": 1}}},
            "method-path": {"method": "../../x"},
            "method-number": {"method": 3},
            "length-text": {"max_seq_length": "long"},
            "length-true": {"max_seq_length": True},
            "samples-negative": {"max_train_samples": -1},
            "samples-calibration-0": {"calibration_samples": 0},
            "batch-0": {"calibration_batch_size": 0},
            "batch-negative": {"calibration_batch_size": -3},
            "train-batch-0": {"per_device_train_batch_size": 0},
            "batch-sizes-text": {"measure_batch_sizes": "a,b"},
            "threads-10^18": {"measure_threads": 10**18},
            "threads-0": {"measure_threads": 0},
            "measured-length-0": {"measure_seq_length": 0},
            "measured-seconds-nan": {"measure_seconds": float("nan")},
            "measured-seconds-negative": {"measure_seconds": -1},
            "epochs-text": {"num_train_epochs": "two"},
            "temperature-0": {"distillation_temperature": 0},
            "terms-deep": {"distillation_terms": "(" * 10_000},
            "terms-code": {"distillation_terms": "__import__('os').system('touch CANARY')=1"},
            "nul-in-a-path": {"output_dir": "a\0b"},
            "surrogate-in-a-path": {"output_dir": "\ud800"},
            "two-sizes": {"rank": 4},
            "report-to-evil": {"report_to": "evil"},
            "model-is-a-number": {"model_name_or_path": 7},
            "model-is-a-device": {"model_name_or_path": "/dev/zero"},
            "columns-none": {"text_column_names": ","},
            "pattern-of-nothing": {"include": ["../../*"]},
            "seed-10^30": {"seed": 10**30},
            "multiple-10^18": {"rank_multiple": 10**18},
            "learning-rate-nan": {"learning_rate": float("nan")},
        }.items()
    ]
    out += [
        options(f"yaml-{name}", content, suffix="yaml")
        for name, content in {
            "code": b"output_dir: !!python/object/apply:os.system ['touch CANARY']\n",
            "laughs": laughs.encode(),
            "deep": b"a: " + b"[" * 50_000,
            "twice": b"seed: 1\nseed: 2\n",
            "two-documents": b"seed: 1\n---\nseed: 2\n",
            "list": b"- 1\n",
            "tab": b"\ta: 1\n",
            "date": b"output_dir: 2020-01-01\n",
            "binary": b"output_dir: !!binary aGVsbG8=\n",
            "empty": b"",
            "number-key": b"3: 4\n",
        }.items()
    ]
    return out


def cases() -> list[Case]:
    """Every case; each kind and command begins with the undamaged files."""
    return [
        *model_cases(),
        *int8_cases(),
        *plan_cases(),
        *statistics_cases(),
        *table_cases(),
        *options_cases(),
        *data_cases(),
    ]
