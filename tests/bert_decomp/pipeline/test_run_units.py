"""The main job with heads and neurons made fewer: every stage, and the plan it leaves taken up again."""

import json

import pytest
from cases import arguments

from bert_decomp.cli.command import command
from bert_decomp.cli.compress import main
from bert_decomp.models.loading import load_model
from bert_decomp.models.resized import ResizedAttention


@pytest.mark.slow
@pytest.mark.parametrize(
    ("units", "preset", "terms"),
    [
        ("structured", "paper", {"attention_output", "ffn_output", "hidden", "logits", "task"}),
        ("mixed", "best", {"ffn_output", "hidden", "logits", "task"}),
    ],
)
def test_the_whole_job_in_units(units, preset, terms, data, encoder_folder):
    """Without those terms of the preset that compare heads and neurons one by one."""
    options = {"encoder_fraction": 0.4, "rank": None, "distillation_preset": preset, "fused": True}
    options["logging_steps"] = 1
    assert command(main, arguments(data, encoder_folder, units=units, **options)) == 0
    results = json.loads((data / "run" / "results.json").read_text())
    assert results["plan"]["version"] == 2 and results["plan"]["encoder_fraction"] <= 0.4
    log = json.loads((data / "run" / "distillation_log.json").read_text())
    names = {name for entry in log for name in entry if name.startswith("loss_")}
    assert names == {f"loss_{name}" for name in terms}
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
    assert command(main, [*line, "--distillation_terms", "hidden=1,value=1,logits=1"]) == 2
    assert "--distillation_terms: value" in capsys.readouterr().err
    assert not (data / "run").exists()
