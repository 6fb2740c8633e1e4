"""The speed page: the floor, the time split and the plot of quality against latency, from what was really measured."""

import copy

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_models import tiny_batch, tiny_model
from transformers import pipeline

from bert_decomp.cli.compress import parse
from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.errors import UserError
from bert_decomp.evaluation import plots
from bert_decomp.evaluation.card import model_card
from bert_decomp.evaluation.report import _speed
from bert_decomp.pipeline.pareto import pareto
from bert_decomp.runtime import fuse_


def measured():
    teacher, student = tiny_model("bert"), tiny_model("bert")
    config = DecompositionConfig("svd", rank=7)
    plan = decompose_(student, config, progress=False)
    curve = pareto(
        teacher,
        student,
        config,
        None,
        [0.7, 0.4],
        [tiny_batch()],
        batch_size=2,
        length=7,
        seconds=0.01,
        threads=1,
    )
    return teacher, student, plan, curve


def test_the_card_says_what_was_measured_and_names_no_folder(tmp_path):
    rows = [
        {"form": form, "batch_size": size, "latency_ms": time}
        for size in (1, 8)
        for form, time in (("dense", 9.0), ("low-rank", 7.5), ("fused", 2.25))
    ]
    results = {
        "task": {"name": "movies", "validation": 1234, "pipeline_tag": "text-ranking"},
        "options": {"model_name_or_path": "org/encoder", "method": "whiten"},
        "parameters": {
            "teacher": {"whole": 5000, "encoder": 4000},
            "student": {"whole": 2000, "encoder": 1000},
        },
        "metrics": {"teacher": {"f1": 0.91}, "decomposed": {"f1": 0.5}, "distilled": {"f1": 0.905}},
        "timings": {"rows": rows, "threads": 1, "length": 128, "device": "a processor"},
        "environment": {"torch": "2.13.0", "transformers": "5.23.0"},
    }
    card = ModelCard(model_card(results, "sentence-transformers"))
    assert (
        card.data.base_model == "org/encoder" and card.data.library_name == "sentence-transformers"
    )
    (found,) = card.data.eval_results
    assert (found.metric_type, found.metric_value, found.task_type) == ("f1", 0.905, "text-ranking")
    for line in (
        "# encoder at 25 % of its encoder",
        "| f1 | 91.0 | 90.5 |",
        "| of the encoder | 4,000 | 1,000 |",
        "| ms, 8 x 128 tokens | 9.00 | 2.25 |",
    ):
        assert line in card.text.splitlines(), card.text
    results["options"]["model_name_or_path"] = str(tmp_path)
    card = ModelCard(model_card(results))
    assert card.data.base_model is None and str(tmp_path) not in card.content


@pytest.mark.slow
def test_the_curve_has_every_size_and_the_page_shows_it_or_says_that_it_was_not_asked_for():
    _, student, plan, curve = measured()
    assert [point["label"] for point in curve["points"]] == ["70 %", "40 %"]
    assert [point["label"] for point in curve["references"]] == ["teacher", "distilled"]
    assert all(
        0 <= point["metric"] <= 1 and point["latency_ms"] > 0
        for point in curve["points"] + curve["references"]
    )
    # What was measured came back unfused.
    assert student.training is False and all(
        "Packed" not in type(module).__name__ for module in student.modules()
    )

    rows = [
        {
            "form": form,
            "batch_size": size,
            "latency_ms": 10.0 * size,
            "latency_ms_q20": 9.0,
            "latency_ms_q80": 11.0 * size,
            "sentences_per_second": 1.0,
            "speedup": 1.0,
            "peak_activation_mb": 1.0,
            "weights_mb": 1.0,
        }
        for size in (1, 3)
        for form in ("dense", "low-rank")
    ]
    split = {"dense": {"QKV": 0.75, "rest": 0.25}, "low-rank": {"QKV": 0.5, "rest": 0.5}}
    results = {
        "timings": {
            "rows": rows,
            "device": "a processor",
            "threads": 1,
            "length": 7,
            "time_split": split,
        },
        "plan": plan.to_dict(),
        "backend": "",
        "pareto": curve,
    }
    section = _speed(results)
    assert (
        len(section.plots) == 3 and "floor" in section.plots[0][1] and "rest" in section.plots[1][1]
    )
    assert all(label in section.plots[2][1] for label in ("70 %", "40 %", "teacher", "distilled"))
    without = _speed({**results, "pareto": None})
    assert len(without.plots) == 2 and "pareto_fractions" in without.text


def test_the_floor_is_drawn_at_the_share_of_the_first_forms_time():
    rows = [
        {
            "form": form,
            "batch_size": 1,
            "latency_ms": ms,
            "latency_ms_q20": ms,
            "latency_ms_q80": ms,
            "speedup": 1.0,
        }
        for form, ms in (("dense", 8.0), ("low-rank", 2.0))
    ]
    assert plots.latency_by_batch(rows, 0.25) != plots.latency_by_batch(rows, 0.5)
    assert "floor" not in plots.latency_by_batch(rows)


@pytest.mark.parametrize(
    "line",
    [
        "--pareto_fractions 1.5",
        "--pareto_fractions half",
        "--pareto_fractions 0.5 --allocation sensitivity",
    ],
)
def test_sizes_that_cannot_be_plotted_are_refused(line, tmp_path):
    with pytest.raises(UserError, match="pareto_fractions"):
        options = parse([*line.split(), "--output_dir", str(tmp_path)])
        options.measure.fractions()


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_transformers_pipeline_takes_a_fused_model_unchanged(family, tokenizer):
    model = tiny_model(family)
    decompose_(model, DecompositionConfig("svd", rank=7), progress=False)
    texts = ["the red cat sees a dog", "a hen", "the owl is blue", "a cow sees the grey dog"]
    for batch_size in (1, 3):
        before = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(
            texts, batch_size=batch_size
        )
        fused = fuse_(copy.deepcopy(model))
        after = pipeline("text-classification", model=fused, tokenizer=tokenizer, device="cpu")(
            texts, batch_size=batch_size
        )
        assert [one["label"] for one in before] == [one["label"] for one in after]
        torch.testing.assert_close(
            torch.tensor([one["score"] for one in after]),
            torch.tensor([one["score"] for one in before]),
        )
