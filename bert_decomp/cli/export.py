"""``lowrank-bert export``: write a saved classifier, low-rank or dense, in a format that other runtimes read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..extras import require
from .command import quiet_libraries
from .parser import Parser


def read_texts(path: str | None) -> list[str] | None:
    """The lines of a text file, at most 300; None without a file."""
    if path is None:
        return None
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path}: {error}; give a text file with one sentence a line"
        ) from error
    texts = [line for line in lines if line][:300]
    if len(texts) < 3:
        raise UserError(f"{path} has {len(texts)} sentences; give at least 3, one a line")
    return texts


def main(argv: list[str]) -> None:
    """The command: ``argv`` are its options."""
    parser = Parser(prog="lowrank-bert export", description=__doc__.partition(": ")[2])
    parser.add_argument(
        "folder", help="a saved classifier, low-rank or dense; with --dense, any model"
    )
    parser.add_argument(
        "--format", help="onnx, optimum, openvino, torch-export or fused (default: onnx)"
    )
    parser.add_argument(
        "--dense",
        action="store_true",
        help="instead of a format: multiply factors out and pad smaller layers into a plain transformers folder, which "
        "loads without this package",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the file or folder to write (default, in the folder: model.onnx, optimum, openvino or model.pt2; in int8 "
        "model.int8.onnx, optimum-int8, openvino-int8 or fused-int8; with --dense, dense)",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="quantise weights and activations to int8 (onnx, optimum, openvino; fused is int8 alone)",
    )
    parser.add_argument(
        "--texts",
        help="a text file, one sentence a line, to check on and to calibrate int8 on (default: "
        "built-in sentences; fused needs yours)",
    )
    options: Any = parser.parse_args(argv)
    texts = read_texts(options.texts)
    require("bert")
    quiet_libraries()

    import torch

    from ..exporting.export import export, megabytes
    from ..exporting.formats import find_format
    from ..kinds import kind_of
    from ..models.folders import trained_kind
    from ..models.loading import load_model, load_tokenizer

    if options.dense:
        if options.int8 or options.format is not None:
            raise UserError(
                "--dense writes a plain transformers folder; leave --int8 and --format out"
            )
        _write_dense(options.folder, options.output or Path(options.folder) / "dense")
        return
    name = options.format or "onnx"
    chosen = find_format(name)
    kind = trained_kind(options.folder)
    model, tokenizer = load_model(options.folder, kind), load_tokenizer(options.folder)
    target = chosen.int8_target if options.int8 else chosen.target
    path = options.output or Path(options.folder) / (target or chosen.target)
    worst, same = export(model, tokenizer, path, name, int8=options.int8, texts=texts)
    decided = ""
    if kind_of(model).decisions(torch.zeros(1, model.config.num_labels)) is not None:
        decided = f", {100 * same:.0f} % of the decisions as in torch"
    outputs = " and ".join(kind_of(model).outputs)
    print(
        f"{path}: {megabytes(path):.1f} MB; loaded again, {outputs} within {worst:.1e} of the largest"
        f"{decided}"
    )


def _write_dense(folder: str, path: Path) -> None:
    from ..exporting.dense import dense
    from ..exporting.export import megabytes
    from ..models.loading import load_as_saved, load_tokenizer
    from ..models.saving import save

    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not an empty folder; choose another --output")
    save(dense(load_as_saved(folder)), load_tokenizer(folder), path)
    print(f"{path}: {megabytes(path):.1f} MB; a plain transformers folder")
