"""Tables of predictions over files and of the server: results of benchmarks.predict, .million and .serving."""

from __future__ import annotations

from ..records import read_suite
from .markdown import machine, table


def predict() -> str:
    """Tokens a second of the runtime alone, of one process and of two."""
    records = read_suite("predict")
    if not records:
        return ""
    rows = [
        [
            record["name"].split("-")[1],
            f"{row['batch_tokens']}",
            f"{row['runtime']:.0f}",
            f"{row['one_process']:.0f} ({row['one_process'] / row['runtime']:.2f}x)",
            f"{row['two_processes']:.0f} ({row['two_processes'] / row['one_process']:.2f}x of one)",
            f"{row['megabytes']['1']:.0f} and {row['megabytes']['2']:.0f}",
        ]
        for record in records
        for row in record["rows"]
    ]
    head = ["", "tokens a batch", "runtime alone", "one process", "two processes", "MB"]
    return (
        table(head, rows)
        + f"\n\nTokens a second, {records[0]['texts']} movie sentences, MiniLM at 25 % (mixed units), one thread a "
        "process. "
        f"{machine(records[0]['environment'])}."
    )


def million() -> str:
    """A job that was killed and resumed."""
    parts = []
    for record in read_suite("million"):
        ends = ["killed", *(["killed again"] * (len(record["runs"]) - 2)), "to the end"]
        rows = [
            [
                end,
                f"{run['seconds']:.0f}",
                f"{run['windows']}" if run["killed"] else "all",
                f"{run['largest_process_mb']:.0f}",
            ]
            for end, run in zip(ends, record["runs"], strict=True)
        ]
        parts.append(
            table(["run", "seconds", "windows there", "largest process, MB"], rows)
            + f"\n\n{record['rows']:,} questions, MiniLM at 12.5 % (structured units), int8, two processes of one "
            f"thread: {record['rows_a_second']:.0f} rows a second, starts included. Every row is there once and in "
            f"order; the scores of {record['checked']} rows are those of the model alone (largest difference "
            f"{record['largest_difference']:.0e}). {machine(record['environment'])}."
        )
    return "\n\n".join(parts)


def _load(load: dict[str, float]) -> str:
    times = "/".join(f"{load[f'p{share}_ms']:.0f}" for share in (50, 95, 99))
    return f"{load['requests_a_second']:.0f} ({times})"


def serving() -> str:
    """What the server adds, and throughput and latency under load."""
    parts = []
    for record in read_suite("serving"):
        rows = []
        for row in record["rows"]:
            batch = row["batch_8"]
            cells = [f"{batch['ms']:.0f} ({100 * batch['overhead']:.1f} %)"]
            cells += map(_load, row["load"])
            answered = row["connections"]
            cells.append(f"{answered['answered']} of {answered['opened']}")
            first, last = (f"{row['megabytes'][place]:.0f}" for place in (0, -1))
            cells += [_load(row["load_again"]), f"{first} then {last}"]
            rows.append([row["form"], *cells])
        loads = record["rows"][0]["load"]
        head = ["", "batch 8, ms (server's part)"]
        head += [f"{load['clients']} client{'s' * (load['clients'] > 1)}" for load in loads]
        soak = record.get("soak_seconds", record["seconds"])
        head += ["1000 connections", f"{loads[-1]['clients']} clients for {soak:g} s", "MB"]
        parts.append(
            table(head, rows)
            + "\n\nOf clients: requests of one sentence a second (milliseconds at p50/p95/p99). "
            "all-MiniLM-L6-v2, one thread, "
            f"clients on the same {record['environment']['cores']} cores, {record['seconds']:g} seconds a measurement. "
            f"{machine(record['environment'])}."
        )
    return "\n\n".join(parts)
