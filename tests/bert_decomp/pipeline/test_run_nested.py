"""The main job with several sizes: one folder, of which each size is evaluated."""

import json

import pytest
from cases import arguments

from bert_decomp.cli.command import command
from bert_decomp.cli.compress import main
from bert_decomp.models.folders import nested_fractions
from bert_decomp.models.loading import count_parameters, load_model


@pytest.mark.slow
@pytest.mark.parametrize("units", ["matrices", "structured"])
def test_the_whole_job_in_several_sizes(units, data, encoder_folder):
    line = arguments(data, encoder_folder, fused=True, units=units, distillation_preset="light")
    line += ["--nested_fractions", "0.25", "0.5"]
    assert command(main, line) == 0
    folder = str(data / "run" / "model")
    assert nested_fractions(folder) == (0.5, 0.25)
    results = json.loads((data / "run" / "results.json").read_text())
    assert list(results["metrics"]) == ["teacher", "decomposed", "distilled, 0.25", "distilled"]
    assert results["sizes"] == {"distilled, 0.25": 0.25}
    small = count_parameters(load_model(folder, encoder_fraction=0.25))
    assert results["parameters"]["distilled, 0.25"] == small
    assert small["encoder"] < results["parameters"]["student"]["encoder"]
    assert results["parameters"]["student"] == count_parameters(load_model(folder))
    card = (data / "run" / "model" / "README.md").read_text()
    metric = next(iter(results["metrics"]["distilled"]))
    value = 100 * results["metrics"]["distilled, 0.25"][metric]
    assert f"| `encoder_fraction=0.25` | {value:.1f} | {small['whole']:,} |" in card

    # The plan that it leaves has all sizes.
    again = arguments(
        data,
        encoder_folder,
        "again",
        plan_file=data / "run" / "plan.json",
        distillation_preset="light",
    )
    assert command(main, again) == 0
    assert nested_fractions(str(data / "again" / "model")) == (0.5, 0.25)


def test_a_contradiction_is_one_line(data, encoder_folder, capsys):
    line = [*arguments(data, encoder_folder), "--nested_fractions", "0.5"]
    assert command(main, line) == 2
    assert "--nested_fractions" in capsys.readouterr().err
    assert not (data / "run").exists()
