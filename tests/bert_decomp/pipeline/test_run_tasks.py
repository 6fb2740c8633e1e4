"""The main job on every kind of text (unlabelled, pairs, scores, GLUE), in every family, evaluated while training."""

import json
import os

import pytest
from cases import trainer_for, write, write_glue
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import FAMILY_SIZES, tiny_model, write_csv
from transformers import AutoConfig, AutoModelForSequenceClassification

from bert_decomp.cli.command import command
from bert_decomp.cli.compress import main
from bert_decomp.cli.evaluate import main as evaluate_main
from bert_decomp.data.batches import batches, encode
from bert_decomp.data.files import load_labelled
from bert_decomp.data.model_labels import ModelLabels
from bert_decomp.distillation.losses import PRESETS
from bert_decomp.distillation.resumable import fit
from bert_decomp.evaluation.metrics import evaluate
from bert_decomp.models.loading import load_model
from bert_decomp.models.saving import save

NAMES = {
    "num_labels": 2,
    "id2label": {0: "coloured", 1: "plain"},
    "label2id": {"coloured": 0, "plain": 1},
}


@pytest.fixture
def teacher(tmp_path, tokenizer):
    save(tiny_model("bert", **NAMES), tokenizer, tmp_path / "teacher")
    return tmp_path / "teacher"


def line(tmp_path, model, out="run", **changes):
    options = {
        "model_name_or_path": model,
        "output_dir": tmp_path / out,
        "cache_dir": tmp_path / "cache",
        "encoder_fraction": 0.3,
        "teacher_num_train_epochs": 1,
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "measure_batch_sizes": "1",
        "measure_seconds": 0.01,
        "measure_seq_length": 7,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        **changes,
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def logged(folder):
    return {
        name
        for entry in json.loads((folder / "distillation_log.json").read_text())
        for name in entry
    }


@pytest.mark.slow
def test_text_without_labels_serves_features_and_logits(
    tmp_path, teacher, encoder_folder, caplog, capsys
):
    write_csv(tmp_path / "dev.csv", 20)
    write(
        tmp_path / "plain.csv",
        [(f"the {animal} sees a dog",) for animal in ("cat", "hen", "owl", "cow") * 8],
        ("sentence",),
    )
    files = {"train_file": tmp_path / "plain.csv", "validation_file": tmp_path / "dev.csv"}
    caplog.set_level("INFO", "bert_decomp")
    assert command(main, line(tmp_path, teacher, **files)) == 0
    assert "the preset's term task is left out" in caplog.text
    assert "loss_logits" in logged(tmp_path / "run") and "loss_task" not in logged(tmp_path / "run")
    assert results_of(tmp_path / "run")["metrics"]["distilled"]["accuracy"] <= 1
    for model, changes, word in (
        (encoder_folder, {}, "no labels to fine-tune it on"),
        (teacher, {"distillation_terms": "task=1"}, "needs labelled examples"),
    ):
        assert command(main, line(tmp_path, model, "other", **files, **changes)) == 2
        assert word in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_pairs_with_scores_are_distilled_by_regression(tmp_path, encoder_folder):
    rows = [
        (f"the {a} sees", f"a {b}", float(a == b) * 4 + 0.5)
        for a in ("cat", "dog", "hen")
        for b in ("cat", "dog", "hen")
    ]
    path = write(tmp_path / "pairs.csv", rows * 4, ("first", "second", "score"))
    files = {
        "train_file": path,
        "validation_file": path,
        "text_column_names": "first,second",
        "label_column_name": "score",
    }
    assert command(main, line(tmp_path, encoder_folder, **files, distillation_preset="best")) == 0
    assert list(results_of(tmp_path / "run")["metrics"]["distilled"]) == ["spearmanr", "pearson"]
    assert load_model(str(tmp_path / "run" / "model")).config.num_labels == 1
    assert (
        command(
            evaluate_main,
            [
                str(tmp_path / "run" / "model"),
                "--file",
                path,
                "--text_column_names",
                "first,second",
                "--label_column_name",
                "score",
                "--output_file",
                str(tmp_path / "m.json"),
            ],
        )
        == 0
    )
    assert json.loads((tmp_path / "m.json").read_text())["metrics"] == pytest.approx(
        results_of(tmp_path / "run")["metrics"]["distilled"], abs=1e-6
    )


@pytest.mark.slow
def test_glue_by_name_with_both_of_mnlis_splits_and_cached_logits(tmp_path, encoder_folder):
    write_glue(tmp_path / "glue", "mnli")
    assert (
        command(
            main,
            line(
                tmp_path,
                encoder_folder,
                task_name="mnli",
                data_dir=tmp_path / "glue",
                distillation_terms="logits=1,task=0.5",
                cache_teacher_logits=True,
            ),
        )
        == 0
    )
    metrics = results_of(tmp_path / "run")["metrics"]["distilled"]
    assert next(iter(metrics)) == "accuracy" and {"accuracy_mismatched", "f1_mismatched"} < set(
        metrics
    )
    assert (tmp_path / "run" / "teacher_logits.safetensors").is_file()
    assert load_model(str(tmp_path / "run" / "model")).config.id2label == {
        0: "entailment",
        1: "neutral",
        2: "contradiction",
    }


@pytest.mark.slow
def test_the_best_model_of_a_run_is_the_one_that_is_saved(tmp_path, teacher):
    write_csv(tmp_path / "train.csv", 64)
    write_csv(tmp_path / "dev.csv", 30, 1)
    assert (
        command(
            main,
            line(
                tmp_path,
                teacher,
                train_file=tmp_path / "train.csv",
                validation_file=tmp_path / "dev.csv",
                eval_strategy="steps",
                eval_steps=2,
                save_steps=2,
                load_best_model_at_end=True,
                metric_for_best_model="accuracy",
                early_stopping_patience=3,
                num_train_epochs=2,
            ),
        )
        == 0
    )
    log = json.loads((tmp_path / "run" / "distillation_log.json").read_text())
    best = max(entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry)
    assert results_of(tmp_path / "run")["metrics"]["distilled"]["accuracy"] == pytest.approx(best)


@pytest.mark.slow
def test_tensorboard_gets_every_term_and_the_report_its_curve_of_sizes(tmp_path, teacher):
    """The event files outlive the checkpoints beside which Trainer would put them."""
    write_csv(tmp_path / "train.csv", 64)
    assert (
        command(
            main,
            line(
                tmp_path,
                teacher,
                train_file=tmp_path / "train.csv",
                report_to="tensorboard",
                distillation_preset="light",
                pareto_fractions="0.6,0.25",
            ),
        )
        == 0
    )
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ, (
        "the next run of this process would write into this one's folder"
    )
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    entries = [
        entry
        for entry in json.loads((tmp_path / "run" / "distillation_log.json").read_text())
        if "loss" in entry
    ]
    assert len(entries) > 3
    for name in ("loss", "loss_hidden", "loss_logits", "loss_task"):
        seen = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert seen == pytest.approx({entry["step"]: entry[name] for entry in entries})
    curve = results_of(tmp_path / "run")["pareto"]
    assert [point["label"] for point in curve["points"]] == ["60 %", "25 %"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "60 %" in page and "25 %" in page


@pytest.mark.parametrize(
    "changes,word",
    [
        ({"early_stopping_patience": 2}, "needs a number"),
        (
            {"metric_for_best_model": "f2", "eval_strategy": "epoch"},
            "choose one of loss, accuracy",
        ),
        ({"load_best_model_at_end": True}, "eval_strategy|evaluation|eval"),
        ({"cache_teacher_logits": True}, "must run for"),
        ({"report_to": "nothing"}, "nothing that is installed"),
        ({"distillation_terms": "hidden=1@first"}, "unknown layer weights"),
        ({"distillation_temperature": 0}, "above zero"),
        ({"data_dir": "x"}, "whole path"),
        ({"pareto_fractions": "0.6,0.01"}, "the smallest is"),
    ],
)
def test_bad_requests_are_one_line_and_code_2(tmp_path, teacher, capsys, changes, word):
    write_csv(tmp_path / "train.csv", 20)
    capsys.readouterr()
    assert command(main, line(tmp_path, teacher, train_file=tmp_path / "train.csv", **changes)) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in word.split("|")) and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


def test_another_models_tokenizer_is_refused(tmp_path, tokenizer, capsys):
    write_csv(tmp_path / "train.csv", 20)
    save(tiny_model("bert", vocab_size=9, **NAMES), tokenizer, tmp_path / "small")
    assert command(main, line(tmp_path, tmp_path / "small", train_file=tmp_path / "train.csv")) == 2
    assert "17 entries but the model embeds 9" in capsys.readouterr().err


@pytest.mark.slow
def test_an_unknown_architecture_is_distilled_through_its_hidden_states(
    tmp_path, tokenizer, caplog, capsys
):
    config = AutoConfig.for_model(
        "deberta-v2",
        hidden_size=36,
        intermediate_size=57,
        num_hidden_layers=2,
        vocab_size=64,
        num_attention_heads=4,
        max_position_embeddings=40,
        relative_attention=True,
        **NAMES,
    )
    save(AutoModelForSequenceClassification.from_config(config), tokenizer, tmp_path / "teacher")
    write_csv(tmp_path / "train.csv", 40)
    caplog.set_level("INFO", "bert_decomp")
    assert (
        command(main, line(tmp_path, tmp_path / "teacher", train_file=tmp_path / "train.csv")) == 2
    )
    assert (
        "use --distillation_preset light" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )
    assert (
        command(
            main,
            line(
                tmp_path,
                tmp_path / "teacher",
                "light",
                train_file=tmp_path / "train.csv",
                distillation_preset="light",
            ),
        )
        == 0
    )
    assert caplog.text.count("has no row in bert_decomp/models/architectures.py") == 1
    assert {"loss_hidden", "loss_logits", "loss_task"} <= logged(tmp_path / "light")


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_every_family_is_decomposed_distilled_saved_loaded_and_evaluated(
    tmp_path, tokenizer, family
):
    teacher, path = tiny_model(family, **NAMES), write_csv(tmp_path / "dev.csv", 30)
    trainer = trainer_for(
        tmp_path / "checkpoints",
        tokenizer,
        terms=PRESETS["best"],
        teacher=teacher,
        max_steps=2,
        data=encode(
            load_labelled(str(path), ModelLabels.named("coloured", "plain"))[0], tokenizer, 20
        ),
    )
    fit(trainer)
    trainer.close()
    save(trainer.model, tokenizer, tmp_path / "model")
    assert (
        command(
            evaluate_main,
            [
                str(tmp_path / "model"),
                "--file",
                str(path),
                "--output_file",
                str(tmp_path / "m.json"),
            ],
        )
        == 0
    )
    expected = evaluate(trainer.model, batches(trainer.train_dataset, tokenizer, 7), progress=False)
    assert json.loads((tmp_path / "m.json").read_text())["metrics"] == expected
