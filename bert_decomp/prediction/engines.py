"""What executes the windows of a job: processes of this machine, or actors of Ray. An engine is one row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UserError
from ..extras import require
from .on_ray import answer_on_ray
from .workers import answer_locally


@dataclass(frozen=True)
class Engine:
    """An engine.

    Attributes:
        answer: (work, windows, report, processes, address), writes the shard of every window.
        extra: of this distribution, that it needs.
        addressed: whether it may be told where it runs.
    """

    answer: Callable[..., None]
    extra: str = "bert"
    addressed: bool = False


ENGINES = {
    "local": Engine(answer_locally),
    "ray": Engine(answer_on_ray, extra="ray", addressed=True),
}


def find_engine(name: str, address: str | None) -> Engine:
    """The engine of a name.

    Raises:
        UserError: there is none, it is not installed, or it takes no address.
    """
    if name not in ENGINES:
        raise UserError(f"engine is {name!r}; choose one of {', '.join(ENGINES)}")
    engine = ENGINES[name]
    if address is not None and not engine.addressed:
        raise UserError(f"ray_address is not for engine {name}; choose engine ray, or leave it out")
    require(engine.extra)
    return engine
