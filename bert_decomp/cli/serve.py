"""``lowrank-bert serve``: a saved model behind HTTP: /v1/embeddings, /classify, /rerank, /health and /metrics."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..extras import require
from .command import quiet_libraries
from .export import read_texts
from .parser import Parser, flags_in_messages


def main(argv: list[str]) -> None:
    """The command: ``argv`` are its options."""
    parser = Parser(prog="lowrank-bert serve", description=__doc__.partition(": ")[2])
    parser.add_argument(
        "folder",
        help="a saved classifier, low-rank or dense, or an encoder in the layout of sentence-transformers",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port (default: %(default)s)")
    parser.add_argument(
        "--name", help="what requests may call the model (default: the folder's name)"
    )
    parser.add_argument(
        "--max_seq_length", type=int, help="longest text in tokens (default: what the model takes)"
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
        help="compute in 8 bits on the CPU, calibrated on --texts",
    )
    parser.add_argument("--texts", help="for --int8: a text file, one sentence a line")
    options = parser.parse_args(argv)
    for name, smallest in (("max_seq_length", 3), ("batch_tokens", 1), ("port", 0)):
        if getattr(options, name) is not None and getattr(options, name) < smallest:
            raise UserError(f"--{name} is {getattr(options, name)}; give at least {smallest}")
    if options.int8 != (options.texts is not None):
        raise UserError("--int8 needs --texts to be calibrated on, and --texts is for --int8 alone")
    calibration = read_texts(options.texts)
    require("bert")
    require("serve")
    quiet_libraries()

    from ..prediction.predictor import Predictor
    from ..serving.server import server

    with flags_in_messages(vars(options)):
        predictor = Predictor(
            options.folder,
            max_seq_length=options.max_seq_length,
            batch_tokens=options.batch_tokens,
            calibration=None if calibration is None else [calibration],
        )
    name = options.name or Path(options.folder).resolve().name
    running = server(predictor, name, options.host, options.port)
    print(f"{name} on http://{options.host}:{options.port}; Ctrl-C stops it", flush=True)
    try:
        running.run()
    except KeyboardInterrupt:
        # uvicorn has let open requests finish, and passes the signal on.
        print("stopped")
