"""The names at the top of the package: what they are, what importing them costs, and the lines that the README
shows."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
from cases import training_set
from safetensors.torch import load_file, save_file
from tiny_models import tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, TrainingArguments

import bert_decomp
from bert_decomp import DecompositionConfig, UserError, decompose_, distil, fuse_, save


def run(code, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_public_name_is_there_and_has_a_docstring():
    assert set(bert_decomp.__all__) <= set(dir(bert_decomp))
    for name in bert_decomp.__all__:
        value = getattr(bert_decomp, name)
        assert callable(value) and inspect.getdoc(value), name
    with pytest.raises(AttributeError, match="no attribute 'compress'"):
        bert_decomp.compress  # noqa: B018
    assert issubclass(UserError, ValueError)


def test_importing_the_package_or_its_configuration_imports_neither_torch_nor_transformers():
    out = run(
        "import sys, bert_decomp, bert_decomp.config\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    assert out == "[]\n"


# Each child begins with imports of its own; torch, which takes as long, is there already.
FIRST = """
import os, sys
import torch
torch.set_num_threads(1)
folder, *imports = sys.argv[1:]
for number, first in enumerate(imports):
    child = os.fork()
    if not child:
        exec(first)
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForSequenceClassification
        model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/model").eval()
        assert type(model.bert.encoder.layer[0].output.dense).__name__ == "LowRankLinear"
        with torch.no_grad():
            logits = model(**load_file(f"{folder}/batch.safetensors")).logits
        save_file({"logits": logits}, f"{folder}/{number}.safetensors")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, first
"""


@pytest.mark.slow
def test_transformers_loads_the_format_whatever_is_imported_first(tmp_path):
    """To the bit."""
    imports = (
        "import bert_decomp, transformers",
        "import transformers.modeling_utils, bert_decomp",
        "from bert_decomp import save",
    )
    model, batch = tiny_model("bert"), tiny_batch()
    decompose_(model, DecompositionConfig("svd", rank=5), progress=False)
    save(model, None, tmp_path / "model")
    save_file(batch, tmp_path / "batch.safetensors")
    run(FIRST, str(tmp_path), *imports)
    with torch.no_grad():
        expected = model(**batch).logits
    for number, first in enumerate(imports):
        found = load_file(tmp_path / f"{number}.safetensors")["logits"]
        assert torch.equal(found, expected), first


def test_the_lines_of_the_readme(tmp_path):
    model, batches = tiny_model("bert"), [tiny_batch(12)]
    tokenizer = tiny_tokenizer()
    plan = decompose_(model, DecompositionConfig(encoder_fraction=0.4), batches)
    save(model, tokenizer, tmp_path / "compressed")
    with torch.no_grad():
        logits = model(**batches[0]).logits
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compressed").eval()
        torch.testing.assert_close(loaded(**batches[0]).logits, logits)
        torch.testing.assert_close(fuse_(model)(**batches[0]).logits, logits, rtol=1e-4, atol=1e-5)
    assert plan.encoder_fraction <= 0.4


@pytest.mark.parametrize("method", ["svd", "asvd", "fwsvd", "whiten", "kfac", "coupled"])
@pytest.mark.parametrize("options", [{}, {"embedding_rank": 5}, {"anchored": True}])
def test_decompose_collects_what_the_method_needs(method, options):
    """The same model as from statistics that were collected apart."""
    if options.get("anchored") and method in ("svd", "asvd", "fwsvd"):
        pytest.skip("no anchored form")
    model, batches = tiny_model("bert"), [tiny_batch(12)]
    config = DecompositionConfig(method, encoder_fraction=0.4, **options)
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    plan = decompose_(one, config, batches, progress=False)
    statistics = bert_decomp.collect_statistics(
        model, batches, bert_decomp.select_linears(model), needs=config.needs, progress=False
    )
    if "embedding_rank" in options:
        from bert_decomp.statistics import collect_embedding

        statistics.embedding = collect_embedding(model, batches, progress=False)
    reused = decompose_(two, config, batches, statistics=statistics, progress=False)
    assert plan == reused
    for (name, left), right in zip(
        one.state_dict().items(), two.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right), name


@pytest.mark.parametrize(
    "config,given,word",
    [
        (DecompositionConfig(), {}, "needs statistics .*; give calibration batches"),
        (DecompositionConfig("svd", "sensitivity"), {}, "needs the calibration batches"),
        (DecompositionConfig("svd", max_drop=1), {}, "max_drop needs labelled batches"),
        (DecompositionConfig("svd", plan_file="none.json"), {}, "cannot read none.json"),
        (DecompositionConfig("svd", rank=99), {}, "rank 99 reaches break-even"),
    ],
)
def test_what_is_missing_is_said_in_one_line_and_the_model_stays(config, given, word):
    model = tiny_model("bert")
    before = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=word) as error:
        decompose_(model, config, progress=False, **given)
    assert "\n" not in str(error.value) and "--" not in str(error.value)
    assert [type(module) for module in model.modules()] == before


def test_a_drop_is_measured_on_what_was_held_out():
    model, batch = tiny_model("bert"), tiny_batch(24)
    with torch.no_grad():
        labelled = {**batch, "labels": model(**batch).logits.argmax(-1)}
    config = DecompositionConfig(max_drop=30, min_rank=1)
    plan = decompose_(model, config, [batch], held_out=[labelled], progress=False)
    values = bert_decomp.evaluate(model, [labelled], progress=False)
    assert values["accuracy"] >= 0.7 and plan.encoder_fraction < 1


@pytest.mark.parametrize("labelled", [True, False])
def test_distil_brings_the_student_closer_to_its_teacher(tmp_path, labelled):
    teacher, batch = tiny_model("bert"), tiny_batch(12)
    student = copy.deepcopy(teacher)
    decompose_(student, DecompositionConfig("svd", rank=4), progress=False)
    data = training_set() if labelled else training_set().remove_columns("labels")

    def distance():
        with torch.no_grad():
            return (student(**batch).logits - teacher(**batch).logits).square().mean()

    before = distance()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=30,
        learning_rate=3e-3,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=10,
        report_to="none",
    )
    log = distil(student, teacher, data, tiny_tokenizer(), arguments)
    assert distance() < before and not student.training
    assert any("loss_task" in entry for entry in log) is labelled
