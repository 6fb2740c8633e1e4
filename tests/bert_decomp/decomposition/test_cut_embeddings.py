"""Models whose word embedding a budget of the whole model cut: files, inference form, int8, export, the main job."""

import copy
import json

import pytest
import torch
from cases import arguments
from embedding_cases import (
    BATCH,
    decomposed,
    entry,
    every_units,
    logits,
    parameters,
    wide,
)
from optional import needs
from tiny_models import FAMILY_SIZES, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from bert_decomp import export, fuse_, save, unfuse_
from bert_decomp.cli.command import command
from bert_decomp.cli.compress import main
from bert_decomp.exporting.dense import dense
from bert_decomp.models.embedding import LowRankEmbedding
from bert_decomp.models.loading import load_model
from bert_decomp.planning import read_plan


@every_units
@pytest.mark.parametrize("family", FAMILY_SIZES)
def test_the_budget_is_kept_and_the_model_goes_through_files_and_fuses(family, units, tmp_path):
    if (family, units) == ("modernbert", "mixed"):
        pytest.skip("joint matrices have no mixed form")
    model = wide(family)
    student, plan = decomposed(model, units=units, model_fraction=0.3)
    assert type(student.get_input_embeddings()) is LowRankEmbedding
    assert entry(plan).rank == student.get_input_embeddings().rank
    # Factors of a layer without a bias get one, which no budget counts.
    grown = sum(p.numel() for p in student.parameters() if p.ndim == 1)
    grown -= sum(p.numel() for p in model.parameters() if p.ndim == 1)
    without_mean = grown - entry(plan).out_features
    assert parameters(student) <= 0.3 * parameters(model) + max(0, without_mean)
    save(student, None, tmp_path / "saved")
    expected = logits(student)
    for load in (load_model, AutoModelForSequenceClassification.from_pretrained):
        loaded = load(str(tmp_path / "saved")).eval()
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(fuse_(loaded)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(unfuse_(loaded)), expected, rtol=1e-6, atol=1e-6)
    student.save_pretrained(tmp_path / "own")
    assert torch.equal(logits(load_model(str(tmp_path / "own"))), expected)


@pytest.mark.parametrize("units", ["matrices", "structured"])
def test_every_size_of_a_nested_model_has_the_same_embedding(units, tmp_path):
    options = {"nested_fractions": [0.6, 0.3], "embedding_rank": 5, "units": units}
    student, plan = decomposed(wide(), **options)
    assert entry(plan.at(0.3)).rank == 5
    assert type(plan).from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    save(student, None, tmp_path / "nested")
    for fraction in (0.6, 0.3):
        loaded = load_model(str(tmp_path / "nested"), encoder_fraction=fraction)
        assert torch.equal(
            loaded.get_input_embeddings().codes, student.get_input_embeddings().codes
        )
        assert logits(loaded).isfinite().all()


@every_units
def test_int8_and_export_of_what_the_auction_made(units, tmp_path):
    student, _ = decomposed(wide(), units=units, model_fraction=0.3)
    fused = fuse_(copy.deepcopy(student), dtype="int8", calibration=[BATCH])
    expected = logits(student)
    assert (logits(fused) - expected).norm() <= 0.05 * expected.norm()
    save(fused, None, tmp_path / "int8")
    loaded = load_model(str(tmp_path / "int8"))
    assert torch.equal(logits(loaded), logits(fused))
    torch.testing.assert_close(logits(dense(student)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@needs("export")
@pytest.mark.parametrize("units", ["matrices", "structured"])
def test_it_exports_to_onnx(units, tmp_path):
    import onnxruntime

    student, _ = decomposed(wide(), units=units, model_fraction=0.3)
    export(student, tiny_tokenizer(), tmp_path / "m.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    found = session.run(["logits"], {name: value.numpy() for name, value in BATCH.items()})[0]
    torch.testing.assert_close(torch.from_numpy(found), logits(student), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("units", ["matrices", "structured"])
def test_the_main_job_cuts_it_and_says_so(units, data, encoder_folder):
    line = arguments(data, encoder_folder, units=units, model_fraction=0.55, num_train_epochs=1)
    assert command(main, line) == 0
    model = load_model(str(data / "run" / "model"))
    plan = read_plan(data / "run" / "plan.json")
    rank = entry(plan).rank
    assert getattr(model.get_input_embeddings(), "rank", None) == rank
    says = "stays as it is" if rank is None else f"is cut to rank {rank}"
    assert says in (data / "run" / "report.html").read_text()
