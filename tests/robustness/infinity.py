"""Exported folders in Infinity: ``python -m tests.robustness.infinity --python /tmp/infinity/bin/python``.

An encoder and a reranker are factored, exported as ``--dense`` and as ``--format optimum``, and served by Infinity's
engine in a fresh process of another environment, because its versions do not install beside this project's:

    python3.11 -m venv /tmp/infinity
    /tmp/infinity/bin/pip install torch==2.13.0
    /tmp/infinity/bin/pip install 'infinity-emb[torch,optimum]' torch==2.13.0

Vectors and scores must be those of ``Predictor`` on the folder that was exported, where ``segments`` is false those of
the model without the segment ids of a pair. The reranker's head is untrained:
what it answers does not matter, only that Infinity answers the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.records import save_record, suite_file
from bert_decomp import DecompositionConfig, Predictor, decompose_, save
from bert_decomp.data.demo import MINILM
from bert_decomp.data.task import load_task
from bert_decomp.exporting.dense import dense
from bert_decomp.exporting.export import export
from bert_decomp.io.environment import environment
from bert_decomp.kinds import EMBEDDING
from bert_decomp.models.loading import load_model, load_tokenizer

TEXTS = 64
# Of the largest number: the same products in another order, twelve layers deep at most.
TOLERANCE = 1e-4
# Run by the environment that has Infinity: one folder, with its texts, in one engine.
THEIRS = """
import asyncio, json, sys
from importlib.metadata import version
import numpy as np
from infinity_emb import AsyncEmbeddingEngine, EngineArgs

asked = json.load(open(sys.argv[1]))
options = {"engine": asked["engine"], "device": "cpu", "model_warmup": False}
if asked["engine"] == "optimum":
    # Its files of sentence-transformers are not read by this engine; nothing of another run is taken.
    options |= {"pooling_method": "mean", "onnx_disable_optimize": True}

async def main():
    engine = AsyncEmbeddingEngine.from_args(EngineArgs(model_name_or_path=".", **options))
    async with engine:
        if asked["query"] is None:
            found, _ = await engine.embed(sentences=asked["texts"])
            return [vector.tolist() for vector in found]
        found, _ = await engine.rerank(query=asked["query"], docs=asked["texts"], raw_scores=True)
        return [[float(one.relevance_score)] for one in sorted(found, key=lambda one: one.index)]

found = asyncio.run(main())
names = ("infinity-emb", "torch", "transformers", "sentence-transformers", "optimum-onnx", "numpy")
json.dump({"found": found, "versions": {name: version(name) for name in names}}, open(sys.argv[2], "w"))
"""


def prepared(work: Path) -> dict[str, str]:
    """Folders of a factored encoder and a factored reranker."""
    tokenizer = load_tokenizer(MINILM)
    torch.manual_seed(0)
    for name, model in (
        ("encoder", load_model(MINILM, EMBEDDING)),
        ("reranker", load_model(MINILM, num_labels=1)),
    ):
        decompose_(model, DecompositionConfig("svd", encoder_fraction=0.5), progress=False)
        save(model.eval(), tokenizer, work / name)
        save(dense(model), tokenizer, work / f"{name}-dense")
        export(model, tokenizer, work / f"{name}-optimum", "optimum")
    return {name: str(work / name) for name in ("encoder", "reranker")}


def in_infinity(python: str, work: Path, **asked: Any) -> dict[str, Any]:
    """What Infinity answers, and its versions."""
    (work / "asked.json").write_text(json.dumps(asked))
    hidden = ("PYTHONPATH", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    subprocess.run(
        [python, "-c", THEIRS, str(work / "asked.json"), str(work / "found.json")],
        env={**environment, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"},
        # With the path of a folder its engine for ONNX looks for the file under that path twice.
        cwd=asked["folder"],
        check=True,
    )
    return json.loads((work / "found.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="of an environment with infinity-emb")
    parser.add_argument("--output", type=Path, default=suite_file("robustness"))
    options = parser.parse_args()
    texts = load_task("questions").validation["text"][: TEXTS + 1]
    query, texts = texts[0], texts[1:]
    cases, failures, versions = [], [], {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for model, folder in prepared(work).items():
            pairs = [query] * len(texts) if model == "reranker" else None
            ours = Predictor(folder)
            for form, engine in (("dense", "torch"), ("optimum", "optimum")):
                segments = engine != "optimum" or model != "reranker"
                if not segments:
                    # Infinity's reranker for ONNX leaves the segments of a pair out, whatever the model.
                    ours.tokenizer.model_input_names = ["input_ids", "attention_mask"]
                wanted = ours(pairs, texts) if pairs else ours(texts)
                asked = {"folder": f"{folder}-{form}", "engine": engine, "texts": texts}
                answer = in_infinity(options.python, work, **asked, query=query if pairs else None)
                found, versions = np.array(answer["found"], np.float32), answer["versions"]
                difference = float(abs(found - wanted).max() / abs(wanted).max())
                case = {
                    **{"model": model, "export": form, "engine": engine},
                    **{"segments": segments, "difference": difference},
                }
                print(case, flush=True)
                cases.append(case)
                if not difference <= TOLERANCE:
                    failures.append(case)
    save_record(
        options.output,
        "infinity",
        {
            "options": {"texts": TEXTS, "tolerance": TOLERANCE, "encoder_fraction": 0.5},
            "folders": len(cases),
            "largest difference": max(case["difference"] for case in cases),
            "cases": cases,
            "failures": failures,
            "infinity": versions,
            "environment": environment(),
        },
    )
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
