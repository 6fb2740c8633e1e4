"""The measuring process of ``calibration``: a request on stdin, one JSON event a line on stdout.

The request has ``device``, ``budget``, ``quick``, ``problems`` and ``skip`` (the labels of candidates to leave out, by
problem). An event has a name, what it is about (a problem's key, or the text of a ``warning``) and a value: ``begin``
with the label of a candidate before it runs, so that the other side knows which one broke the GPU; then ``entry`` with
the winners, or ``failed``.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import TextIO

import torch

from .. import rivals, tuning
from ..problem import Problem

# After a CUDA error nothing runs in this process.
BROKEN = 3
# Problems whose kernels are compiled together.
AHEAD = 20


def serve(request: dict, output: TextIO) -> int:
    """Measure the request's problems; an exit code."""

    def say(event: str, about: str, value: object = None) -> None:
        line = {"event": event, "about": about, "value": value}
        print(json.dumps(line), file=output, flush=True)

    device = torch.device(request["device"])
    problems = [
        Problem(operator, rows, inner, outer, rank, getattr(torch, dtype), hidden)
        for operator, rows, inner, outer, rank, dtype, hidden in request["problems"]
    ]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with torch.inference_mode():
        for number, problem in enumerate(problems):
            if request["quick"] and number % AHEAD == 0:
                rivals.compile_ahead(problems[number : number + AHEAD], device)
            key = tuning.key(problem)
            try:
                entry = rivals.fastest(
                    problem,
                    device,
                    request["budget"],
                    request["skip"].get(key, ()),
                    partial(say, "warning"),
                    request["quick"],
                    partial(say, "begin", key),
                )
            except rivals.BrokenGpu as error:
                print(f"{error} ended in a CUDA error", file=sys.stderr)
                return BROKEN
            except Exception as error:
                # Too large for this GPU's memory, for example: the other problems are still worth measuring.
                if "CUDA error" in str(error):
                    raise
                say("warning", f"{key} was not measured: {str(error)[:200]}")
                say("failed", key)
                continue
            say("entry", key, tuning.entry_as_json(entry, problem.rank))
    return 0


def main() -> int:
    # Whatever else prints must not come between the events.
    output, sys.stdout = sys.stdout, sys.stderr
    return serve(json.load(sys.stdin), output)


if __name__ == "__main__":
    sys.exit(main())
