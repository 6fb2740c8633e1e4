"""What tests of all kinds share: the commands of guide pages, and a student of which nothing is cut."""

import copy
import re
import shlex
from pathlib import Path

from bert_decomp.cli.command import command
from bert_decomp.cli.main import main
from bert_decomp.methods import factored_linear, get_method
from bert_decomp.models.saving import mark_low_rank
from bert_decomp.models.selection import select_linears
from bert_decomp.statistics import LayerStatistics

GUIDES = Path(__file__).resolve().parents[3] / "docs" / "guides"
# What a small run needs besides: less measuring and training.
QUICK = (
    "--measure_batch_sizes 1 --measure_seconds 0.01 --measure_seq_length 7 --num_train_epochs 1 "
    "--teacher_num_train_epochs 1 --disable_tqdm --use_cpu true --save_strategy no --cache_dir cache"
)


def commands(page):
    """The lines that begin with ``lowrank-bert`` in the page's blocks of code, continued ones joined."""
    text = (GUIDES / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks = "\n".join(block for language, block in found if not language)
    lines = blocks.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("lowrank-bert ")]


def run_commands(page):
    """Run them in the current folder; each must succeed."""
    found = commands(page)
    assert found
    for arguments in found:
        quick = QUICK.split() if arguments[0] == "compress" else []
        assert command(main, [*arguments, *quick]) == 0, arguments


def uncut(teacher):
    """A copy of full rank: every encoder matrix is a product of two, and equal to the teacher's."""
    student = copy.deepcopy(teacher)
    for name, layer in select_linears(student).items():
        rank = min(layer.weight.shape)
        student.set_submodule(
            name, factored_linear(layer, get_method("svd"), LayerStatistics(name), rank)
        )
    mark_low_rank(student)
    return student.eval()
