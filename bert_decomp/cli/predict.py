"""``lowrank-bert predict``: what a model says of every text of a file, as Parquet or JSON-lines, resumable."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..extras import require
from .command import quiet_libraries
from .parser import Parser, flags_in_messages


def main(argv: list[str]) -> None:
    """The command: ``argv`` are its options."""
    parser = Parser(prog="lowrank-bert predict", description=__doc__.partition(": ")[2])
    parser.add_argument(
        "folder",
        help="a saved model of any kind, low-rank or dense, or an encoder in the layout of sentence-transformers",
    )
    parser.add_argument(
        "input", help="CSV, JSON-lines, Parquet or CoNLL, or a folder of datasets' save_to_disk"
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="the file to write, .parquet or .jsonl"
    )
    parser.add_argument(
        "--text_column_names",
        help="one or two columns with text, separated by commas, such as question,context (default: found by "
        "name, else by content)",
    )
    parser.add_argument(
        "--keep_columns",
        help="columns to carry into the output, separated by commas, such as id; or all (default: none)",
    )
    parser.add_argument(
        "--max_seq_length",
        type=int,
        help="longest text in tokens; longer ones are cut, or become windows where answers are places in texts "
        "(default: what the model takes)",
    )
    parser.add_argument(
        "--batch_tokens",
        type=int,
        default=4096,
        help="tokens of a batch, padding included (default: %(default)s)",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="compute in 8 bits on the CPU, calibrated on the first 256 texts",
    )
    parser.add_argument(
        "--version_2_with_negative",
        action="store_true",
        help="a question may have no answer, as in SQuAD 2 (default: where the model's config says so)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="each with a model of its own (default: %(default)s)",
    )
    parser.add_argument(
        "--engine",
        default="local",
        help="where the processes are: local for this machine, ray for a Ray cluster (default: %(default)s)",
    )
    parser.add_argument(
        "--ray_address",
        help="HOST:PORT of a Ray cluster, or auto for that of this machine (default: RAY_ADDRESS, else a cluster that "
        "is started here for this job)",
    )
    options = parser.parse_args(argv)
    for name, smallest in (("max_seq_length", 3), ("batch_tokens", 1), ("processes", 1)):
        if getattr(options, name) is not None and getattr(options, name) < smallest:
            raise UserError(f"--{name} is {getattr(options, name)}; give at least {smallest}")
    require("bert")
    quiet_libraries()

    from ..prediction.predict import predict
    from ..prediction.workers import keep_no_kernels

    keep_no_kernels()

    with flags_in_messages(vars(options)):
        done = predict(
            options.folder,
            options.input,
            options.output,
            text_column_names=_names(options.text_column_names),
            keep_columns=_names(options.keep_columns) or (),
            max_seq_length=options.max_seq_length,
            batch_tokens=options.batch_tokens,
            int8=options.int8,
            version_2_with_negative=options.version_2_with_negative,
            processes=options.processes,
            engine=options.engine,
            ray_address=options.ray_address,
        )
    if not done.texts:
        print(f"{options.output}: {done.rows} texts, all from an earlier run")
        return
    earlier = done.rows - done.texts
    print(
        f"{options.output}: {done.rows} texts{f', {earlier} of them from an earlier run' if earlier else ''}; "
        f"{done.tokens} tokens in {done.seconds:.1f} s, {done.tokens / done.seconds:.0f} a second"
    )


def _names(text: str | None) -> list[str] | None:
    return text.split(",") if text else None
