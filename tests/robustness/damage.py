"""A case of a malformed file, and what may be done to a valid one: cuts, flipped bits, other values and headers.

A case that must be refused says so; where the damage means nothing (a byte order mark, a repaired line end) it must be
harmless; and a flipped bit may be either, as a changed digit is still a number where no checksum stands beside it.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path, random.Random], None]
Lay = Callable[[Path, Path, random.Random], list[str]]
RANKS = {
    "0": 0,
    "-3": -3,
    "3.5": 3.5,
    "true": True,
    "text": "5",
    "list": [5],
    "10^18": 10**18,
    "10^400": 10**400,
    "null": None,
}


@dataclass(frozen=True)
class Case:
    """Files to be laid out in a folder, and the command line that reads them.

    ``expect`` is ``refused``, ``harmless`` or ``either``; ``lay`` takes the folder of valid files, the case's own
    folder and a generator, and returns the arguments of ``main``.
    """

    kind: str
    name: str
    main: str
    expect: str
    lay: Lay


def run_line(base: Path, out: Path, **options: object) -> list[str]:
    """The main job, as small as it can be."""
    values = {
        "model_name_or_path": base / "dense",
        "train_file": base / "train.csv",
        "validation_file": base / "dev.csv",
        "max_seq_length": 16,
        "method": "kfac",
        "encoder_fraction": 0.5,
        "distillation_preset": "light",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 12,
        "calibration_samples": 12,
        "measure_seconds": 0.01,
        "measure_batch_sizes": "1",
        "measure_seq_length": 8,
        "use_cpu": True,
        "disable_tqdm": True,
        "cache_dir": base / "cache",
        "output_dir": out,
        **options,
    }
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def table() -> dict[str, Any]:
    """A tuning table as ``lowrank_kernels.tune`` writes them, with made-up times."""
    tile = {
        "block_m": 64,
        "block_n": 64,
        "block_k": 32,
        "block_f": 0,
        "warps": 8,
        "stages": 3,
        "splits": 2,
    }
    choice = {
        "backend": "triton",
        "options": {"tile": tile},
        "milliseconds": {"torch": 0.2, "triton": 0.1},
    }
    entry = {"eager": choice, "captured": copy.deepcopy(choice), "rank": 128}
    plain = {"backend": "torch", "options": {}, "milliseconds": {"torch": 0.2}}
    return {
        "version": 2,
        "device": "Some GPU",
        "environment": {},
        "entries": {
            **{
                f"linear/bfloat16/k768/n768/f0/r128/m{1 << rows}": copy.deepcopy(entry)
                for rows in range(4)
            },
            "linear/bfloat16/k768/n3072/f0/r128/m16": {
                "eager": plain,
                "captured": plain,
                "rank": 128,
            },
        },
    }


# Damage to the bytes of any file.


def cut(share: float) -> Damage:
    """Keep only that share of the file."""
    return lambda path, draw: os.truncate(path, int(path.stat().st_size * share))


def put(content: bytes) -> Damage:
    """Other content."""
    return lambda path, draw: path.write_bytes(content)


def flip(region: Callable[[bytes], tuple[int, int]] = lambda content: (0, len(content))) -> Damage:
    """Flip one bit, drawn from a region of the file."""

    def damage(path: Path, draw: random.Random) -> None:
        content = bytearray(path.read_bytes())
        place = draw.randrange(*region(bytes(content)))
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)

    return damage


def around(
    before: bytes = b"", after: bytes = b"", change: Callable[[bytes], bytes] = bytes
) -> Damage:
    """Bytes before and after the changed content."""
    return lambda path, draw: path.write_bytes(before + change(path.read_bytes()) + after)


def as_folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path, draw: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def link(target: str | None = None) -> Damage:
    """A link to ``target``, or to the file itself under another name in the folder above."""

    def damage(path: Path, draw: random.Random) -> None:
        moved = path.parent.parent / f"moved-{path.name}"
        shutil.move(path, moved)
        path.symlink_to(target or moved)

    return damage


HARMED: dict[str, Damage] = {
    "empty": put(b""),
    **{f"cut-{share}": cut(share) for share in (0.02, 0.3, 0.6, 0.97)},
    "zeros": put(bytes(300)),
    "noise": lambda path, draw: path.write_bytes(draw.randbytes(400)),
    "a-folder": as_folder,
    "a-pipe": as_pipe,
    "link-to-a-device": link("/dev/zero"),
    "link-to-nothing": link("nothing"),
    "link-to-itself": link("config.json"),
    "half-surrogate-bytes": put(b'{"a": "\xed\xa0\x80"}'),
    "latin-1": put('{"ä": 1}'.encode("latin-1")),
}
BAD_JSON: dict[str, Damage] = {
    "deep-lists": put(b"[" * 200_000),
    "deep-objects": put(b'{"a":' * 200_000),
    "deep-and-closed": put(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a-list": put(b"[]"),
    "a-number": put(b"7"),
    "a-long-number": put(b'{"version": ' + b"9" * 100_000 + b"}"),
    "null": put(b"null"),
    "key-twice": around(
        change=lambda text: text.replace(b"{", b'{"version": 1, "version": 1, ', 1)
    ),
    "nul-inside": around(change=lambda text: text[:20] + b"\0" + text[20:]),
    "utf-16": around(change=lambda text: text.decode().encode("utf-16")),
    "megabytes-of-one-line": put(b'{"a": "' + b"x" * 20_000_000 + b'"}'),
}
HARMLESS: dict[str, Damage] = {
    "byte-order-mark": around(before=b"\xef\xbb\xbf"),
    "crlf": around(change=lambda text: text.replace(b"\n", b"\r\n")),
    "a-link-out": link(),
    "one-line": around(change=lambda text: json.dumps(json.loads(text)).encode()),
}


def edit(*path: str | int, to: Any = None, drop: bool = False) -> Damage:
    """Set, or drop, one value in a JSON file; ``to`` may be a function of the value before."""

    def damage(file: Path, draw: random.Random) -> None:
        values = json.loads(file.read_text())
        place = values
        for step in path[:-1]:
            place = place.setdefault(step, {})
        if drop:
            del place[path[-1]]
        else:
            place[path[-1]] = to(place.get(path[-1])) if callable(to) else to
        file.write_text(json.dumps(values))

    return damage


# Damage to safetensors files.


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], **metadata: str) -> Damage:
    """Other tensors in a safetensors file."""

    def damage(path: Path, draw: random.Random) -> None:
        found = load_file(path)
        change(found)
        save_file(found, path, metadata={"format": "pt", **metadata})

    return damage


def filled(name: str, value: float) -> Damage:
    return tensors(lambda found: found[name].view(-1)[3:4].fill_(value))


def header(
    change: Callable[[dict[str, Any]], Any] | None = None,
    text: Callable[[str], str] = str,
    length: int | None = None,
) -> Damage:
    """Another header before the same numbers, without safetensors' help."""

    def damage(path: Path, draw: random.Random) -> None:
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        about = json.loads(content[8 : 8 + size])
        if change is not None:
            change(about)
        new = text(json.dumps(about)).encode()
        path.write_bytes(
            struct.pack("<Q", len(new) if length is None else length) + new + content[8 + size :]
        )

    return damage


def twice(text: str) -> str:
    first = json.dumps(next(name for name in json.loads(text) if name != "__metadata__"))
    entry = json.dumps(json.loads(text)[json.loads(first)])
    return text[:-1] + f", {first}: {entry}}}"


HEADERS: dict[str, Damage] = {
    **{
        f"header-length-{length:.0e}": header(length=length)
        for length in (2**60, 2**64 - 1, 10**8, 10**6)
    },
    "header-length-0": header(length=0),
    "header-deep": header(text=lambda _: "[" * 50_000),
    "header-name-twice": header(text=twice),
    "header-shape-overflows": header(
        lambda about: next(iter(reversed(about.values()))).update(shape=[2**62, 4])
    ),
    "header-shape-terabytes": header(
        lambda about: next(iter(reversed(about.values()))).update(shape=[2**40, 1])
    ),
    "header-shape-negative": header(
        lambda about: next(iter(reversed(about.values()))).update(shape=[-1, 36])
    ),
    "header-offsets-outside": header(
        lambda about: next(iter(reversed(about.values()))).update(data_offsets=[0, 2**50])
    ),
    "header-offsets-turned": header(
        lambda about: next(iter(reversed(about.values()))).update(data_offsets=[400, 0])
    ),
    "header-dtype-unknown": header(
        lambda about: next(iter(reversed(about.values()))).update(dtype="F7")
    ),
    "header-name-of-a-path": header(
        text=lambda text: text.replace("bert.encoder.layer.0.", "../../../x/", 1)
    ),
}
