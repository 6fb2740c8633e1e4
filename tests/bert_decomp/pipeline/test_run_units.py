"""The main job with heads and neurons made fewer: every stage, and the plan it leaves taken up again."""

import json

import pytest
from cases import arguments

from bert_decomp.cli.command import command
from bert_decomp.cli.compress import main
from bert_decomp.distillation.losses import PRESETS
from bert_decomp.models.loading import load_model
from bert_decomp.models.resized import ResizedAttention


@pytest.mark.slow
@pytest.mark.parametrize(
    ("units", "preset", "left_out"),
    [("structured", "paper", {"attention_scores"}), ("mixed", "best", set())],
)
def test_the_whole_job_in_units(units, preset, left_out, data, encoder_folder):
    """With all terms of the preset but the one that has no counterpart."""
    options = {"encoder_fraction": 0.4, "rank": None, "distillation_preset": preset, "fused": True}
    options["logging_steps"] = 1
    assert command(main, arguments(data, encoder_folder, units=units, **options)) == 0
    results = json.loads((data / "run" / "results.json").read_text())
    assert results["plan"]["version"] == 2 and results["plan"]["encoder_fraction"] <= 0.4
    log = json.loads((data / "run" / "distillation_log.json").read_text())
    names = {name for entry in log for name in entry if name.startswith("loss_")}
    assert left_out <= set(PRESETS[preset].terms)
    assert names == {f"loss_{name}" for name in set(PRESETS[preset].terms) - left_out}
    assert set(results["metrics"]) == {"teacher", "decomposed", "distilled"}
    assert "Layers" in (data / "run" / "report.html").read_text()
    model = load_model(str(data / "run" / "model"))
    assert any(isinstance(module, ResizedAttention) for module in model.modules())

    options |= {"encoder_fraction": None, "plan_file": data / "run" / "plan.json"}
    assert command(main, arguments(data, encoder_folder, "again", **options)) == 0
    again = json.loads((data / "again" / "results.json").read_text())
    assert again["plan"]["layers"] == results["plan"]["layers"]


def test_a_contradiction_is_one_line(data, encoder_folder, capsys):
    line = arguments(data, encoder_folder, units="mixed", method="svd", encoder_fraction=0.4)
    assert command(main, line) == 2
    assert "leave method and allocation out" in capsys.readouterr().err
    line = arguments(data, encoder_folder, units="mixed", encoder_fraction=0.4, rank=None)
    assert (
        command(main, [*line, "--distillation_terms", "hidden=1,attention_scores=1,logits=1"]) == 2
    )
    assert "--distillation_terms: attention_scores" in capsys.readouterr().err
    assert not (data / "run").exists()
