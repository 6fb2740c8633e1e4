"""Every experiment of every suite is one that the main job would accept."""

import pytest

from benchmarks.quality.material import MATERIAL
from benchmarks.quality.suite import STAGES, SUITES, cells, training_options
from bert_decomp.cli.compress import parse
from bert_decomp.config import DecompositionConfig
from bert_decomp.data.task import TASKS
from bert_decomp.distillation.losses import PRESETS


@pytest.mark.slow
@pytest.mark.parametrize("suite", sorted(path.stem for path in SUITES.glob("*.yaml")))
def test_experiments_are_whole_and_their_cells_differ(suite):
    found = cells(suite)
    assert found and len({cell.name for cell, _ in found}) == len(found)
    for cell, config in found:
        assert cell.task in {*TASKS, *MATERIAL} and cell.stage in STAGES
        chosen = config.get("decomposition", {})
        size = {} if "nested_fractions" in chosen else {"encoder_fraction": cell.size}
        DecompositionConfig(config["method"], config["allocation"], **size, **chosen)
        options = training_options(cell.stage, config)
        assert options is None or parse(options).distillation.config().terms


def test_the_ablation_leaves_out_every_term_of_the_preset_once():
    left_out = {
        config["without"]: parse(training_options(cell.stage, config)).distillation.config()
        for cell, config in cells("ablation")
        if "without" in config
    }
    best = PRESETS["best"]
    assert set(left_out) == set(best.terms)
    for name, config in left_out.items():
        assert config.terms == {
            other: weight for other, weight in best.terms.items() if other != name
        }
        assert config.temperature == best.temperature
