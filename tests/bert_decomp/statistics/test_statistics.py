"""Gradient statistics against autograd, and collections that are padded, interrupted or of something else."""

import copy
import os

import pytest
import torch
from tiny_models import FAMILY_SIZES, tiny_batch, tiny_model

import bert_decomp.statistics.collect
import bert_decomp.statistics.layerwise
from bert_decomp.errors import UserError
from bert_decomp.io import memory as machine
from bert_decomp.models.selection import select_linears
from bert_decomp.statistics import (
    CLIP,
    NEEDS,
    Statistics,
    collect_statistics,
    collect_to_file,
    fingerprint,
    fitting_layers,
    token_weights,
)
from bert_decomp.statistics.store import read_tensors, write_tensors

FAMILIES = sorted(set(FAMILY_SIZES) - {"modernbert"})


def collect(model, batches, **options):
    return collect_statistics(
        model, batches, select_linears(model), needs=NEEDS, progress=False, **options
    )


def one_name(model):
    """A layer from the middle of the model."""
    names = list(select_linears(model))
    return names[len(names) // 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_statistics_equal_a_direct_computation_per_example(family):
    """One example at a time, unpadded, in float64, through the weight's own gradient for the Fisher information."""
    model, batch = tiny_model(family), tiny_batch()
    name, found = one_name(model), collect(model, [batch])
    exact, drawn = copy.deepcopy(model).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        scaled = (
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits / 2
        )
    classes = torch.multinomial(scaled.softmax(-1), 1, generator=drawn)[:, 0]
    layer, seen, fisher, gradients, inputs = exact.get_submodule(name), {}, 0, [], []
    layer.register_forward_hook(lambda _m, x, y: (seen.update(x=x[0], y=y), y.retain_grad())[0])
    for row in range(len(classes)):
        length = int(batch["attention_mask"][row].sum())
        exact.zero_grad()
        logits = exact(
            input_ids=batch["input_ids"][row : row + 1, :length],
            attention_mask=batch["attention_mask"][row : row + 1, :length],
        ).logits
        (-(logits / 2).log_softmax(-1)[0, classes[row]]).backward()
        fisher = fisher + layer.weight.grad.square().sum(0)
        gradients.append(seen["y"].grad.flatten(0, 1))
        inputs.append(seen["x"].detach().flatten(0, 1))
    g, x = torch.cat(gradients), torch.cat(inputs)
    norms = g.norm(dim=1)
    clipped = norms.clamp(CLIP[0] * norms.mean(), CLIP[1] * norms.mean())
    g_clipped, weight = g * (clipped / norms)[:, None], clipped.square()
    mean = (x * weight[:, None]).sum(0) / weight.sum()
    covariance = (x * weight[:, None]).T @ x / weight.sum() - torch.outer(mean, mean)
    close = {"rtol": 1e-3, "atol": 1e-7}
    statistics = found.of(name, NEEDS)
    torch.testing.assert_close(statistics.fisher, fisher / len(classes), **close)
    torch.testing.assert_close(
        statistics.gradients.second_moment, g_clipped.T @ g_clipped / len(g), **close
    )
    torch.testing.assert_close(
        torch.tensor(statistics.gradients.energy), norms.square().mean().float(), **close
    )
    torch.testing.assert_close(statistics.gradients.input_mean, mean, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        statistics.gradients.input_covariance, covariance, rtol=1e-3, atol=1e-4
    )


def test_padding_changes_no_gradient_statistics():
    model, batch = tiny_model("bert"), tiny_batch()
    wider = {
        name: torch.nn.functional.pad(value, (0, 6), value=9 if name == "input_ids" else 0)
        if value.ndim == 2
        else value
        for name, value in batch.items()
    }
    one, other = collect(model, [batch]), collect(model, [wider])
    for name in one.gradients:
        for part, value in vars(one.gradients[name]).items():
            torch.testing.assert_close(
                getattr(other.gradients[name], part), value, rtol=1e-3, atol=1e-5
            )
        torch.testing.assert_close(other.fisher[name], one.fisher[name], rtol=1e-3, atol=1e-7)


def test_collecting_leaves_the_model_as_it_was():
    model, batch = tiny_model("bert").train(), tiny_batch()
    model.classifier.weight.requires_grad_(False)
    before = {
        name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()
    }
    collect(model, [batch])
    assert model.training and not any(module._forward_hooks for module in model.modules())
    for name, value in model.named_parameters():
        assert (
            torch.equal(value, before[name][0])
            and value.requires_grad == before[name][1]
            and value.grad is None
        )


def test_an_interrupted_collection_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    model, batches = tiny_model("bert"), [tiny_batch(rows) for rows in (2, 3, 4, 5)]
    monkeypatch.setattr("bert_decomp.statistics.collect.CHECKPOINT_EVERY", 2)
    whole, path = collect(model, batches), tmp_path / "sums.partial"
    broken = [
        *batches[:3],
        {
            "input_ids": batches[3]["input_ids"],
            "attention_mask": batches[3]["attention_mask"][:, :-1],
        },
    ]
    monkeypatch.setattr("bert_decomp.statistics.collect.fingerprint", lambda *_: "same")
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        collect(model, broken, checkpoint=path)
    assert path.is_file()
    resumed = collect(model, batches, checkpoint=path)
    assert not path.exists()
    for name, entry in whole.inputs.items():
        assert torch.equal(resumed.inputs[name].second_moment, entry.second_moment)
    for name, entry in whole.gradients.items():
        assert torch.equal(resumed.gradients[name].second_moment, entry.second_moment)
        assert resumed.gradients[name].energy == entry.energy


def test_files_round_trip_and_stale_ones_are_refused(tmp_path):
    model, batch = tiny_model("bert"), tiny_batch()
    statistics = collect(model, [batch])
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    for name in statistics.source:
        one, other = statistics.of(name, NEEDS), loaded.of(name, NEEDS)
        assert (
            torch.equal(one.fisher, other.fisher) and one.gradients.energy == other.gradients.energy
        )
        assert torch.equal(one.gradients.input_second_moment, other.gradients.input_second_moment)
        assert torch.equal(one.inputs.abs_mean, other.inputs.abs_mean)
    loaded.check(fingerprint(model, [batch]))
    for other_model, other_batch in ((tiny_model("roberta"), batch), (model, tiny_batch(4))):
        with pytest.raises(UserError, match="another model or other data"):
            loaded.check(fingerprint(other_model, [other_batch]))


def test_one_flipped_bit_is_refused_in_one_line(tmp_path):
    path = tmp_path / "s.safetensors"
    collect(tiny_model("bert"), [tiny_batch()]).save(path)
    whole = path.read_bytes()
    for place in (len(whole) // 2, len(whole) - 1, whole.index(b"tokens") + 25):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="is not a file of statistics"):
            Statistics.load(path)


def test_missing_parts_and_unknown_needs_are_named():
    model, batch = tiny_model("bert"), tiny_batch()
    statistics = collect_statistics(model, [batch], select_linears(model), progress=False)
    with pytest.raises(UserError, match="hold no gradients"):
        statistics.of(one_name(model), ("gradients",))
    with pytest.raises(UserError, match="hold no gradients"):
        statistics.energies()
    with pytest.raises(UserError, match="unknown statistics weather"):
        collect_statistics(
            model, [batch], select_linears(model), needs=("weather",), progress=False
        )
    with pytest.raises(UserError, match="no calibration token"):
        collect_statistics(model, [], select_linears(model), progress=False)


@pytest.mark.parametrize("layers_at_once", [1, 2])
@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
def test_a_few_layers_at_a_time_make_the_same_bits(family, layers_at_once, tmp_path):
    model, batches = tiny_model(family), [tiny_batch(rows) for rows in (3, 4)]
    whole, path = collect(model, batches), tmp_path / "s.safetensors"
    collect_to_file(
        path,
        model,
        batches,
        select_linears(model),
        needs=NEEDS,
        layers_at_once=layers_at_once,
        progress=False,
    )
    found = Statistics.load(path)
    found.check(fingerprint(model, batches))
    assert found.source == whole.source and list(tmp_path.iterdir()) == [path]
    for name in whole.source:
        one, other = whole.of(name, ("gradients", "fisher")), found.of(name, NEEDS)
        assert torch.equal(one.fisher, other.fisher)
        for part in ("inputs", "gradients"):
            for key, value in vars(getattr(one, part)).items():
                held = getattr(getattr(other, part), key)
                assert (
                    torch.equal(held, value) if isinstance(value, torch.Tensor) else held == value
                )


def test_as_many_layers_as_fit_are_collected_at_once():
    model = tiny_model("bert")
    modules = select_linears(model)
    held = collect_statistics(model, [tiny_batch()], modules, needs=NEEDS, progress=False)
    real = 8 * (
        sum(entry.second_moment.numel() for entry in held.inputs.values())
        + sum(
            entry.second_moment.numel() + entry.input_second_moment.numel()
            for entry in held.gradients.values()
        )
    )
    assert [fitting_layers(model, modules, NEEDS, limit) for limit in (1, real // 3 - 1)] == [1, 1]
    assert fitting_layers(model, modules, NEEDS, 2 * real) >= 3
    for limit in (real, 2 * real // 3):
        assert fitting_layers(model, modules, NEEDS, limit) * real / 3 <= max(limit, real / 3)


@pytest.mark.parametrize("memory", [None, 2**20, 2**33, 2**36])
def test_layers_fit_into_an_eighth_of_the_memory_and_a_gibibyte_at_least(monkeypatch, memory):
    model = tiny_model("bert")
    modules = select_linears(model)
    monkeypatch.setattr(bert_decomp.statistics.layerwise, "machine_memory", lambda: memory)
    limit = max(2**30, (memory or 0) // 8)
    assert fitting_layers(model, modules, NEEDS) == fitting_layers(model, modules, NEEDS, limit)


@pytest.mark.parametrize("text, wanted", [("4096\n", 4096), ("max\n", None), ("", None)])
def test_a_container_has_the_memory_that_it_was_given(monkeypatch, tmp_path, text, wanted):
    limit = tmp_path / "memory.max"
    limit.write_text(text)
    monkeypatch.setattr(machine, "LIMITS", ("/nowhere", str(limit)))
    assert machine.machine_memory() == (
        wanted or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )


def test_an_interrupted_collection_of_parts_keeps_those_that_are_whole_and_repairs_damaged_ones(
    tmp_path, monkeypatch
):
    model, batches, path = tiny_model("bert"), [tiny_batch()], tmp_path / "s.safetensors"
    work = {"needs": ("gradients",), "layers_at_once": 1, "progress": False}
    real = bert_decomp.statistics.layerwise.collect_statistics
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr("bert_decomp.statistics.layerwise.collect_statistics", counted)
    with pytest.raises(KeyboardInterrupt):
        collect_to_file(path, model, batches, select_linears(model), **work)
    first = tmp_path / "s.part0"
    first.write_bytes(first.read_bytes()[:-8])
    collect_to_file(path, model, batches, select_linears(model), **work)
    # Two and the one that was interrupted; then the damaged first and the third, but not the second.
    assert len(calls) == 5
    whole = real(model, batches, select_linears(model), needs=("gradients",), progress=False)
    assert all(
        torch.equal(entry.second_moment, Statistics.load(path).gradients[name].second_moment)
        for name, entry in whole.gradients.items()
    )
    with pytest.raises(UserError, match="smallest is 1"):
        collect_to_file(path, model, batches, select_linears(model), layers_at_once=0)


def test_files_from_before_tokens_were_kept_with_gradients_are_read(tmp_path):
    model, path = tiny_model("bert"), tmp_path / "s.safetensors"
    statistics = collect_statistics(
        model, [tiny_batch()], select_linears(model), needs=("gradients",), progress=False
    )
    name = one_name(model)
    assert statistics.of(name, ("gradients",)).tokens == int(tiny_batch()["attention_mask"].sum())
    statistics.save(path)
    about, tensors = read_tensors(path)
    write_tensors(
        path, {key: value for key, value in about.items() if key != "gradient_tokens"}, tensors
    )
    assert Statistics.load(path).of(name, ("gradients",)).tokens is None
    write_tensors(
        path, {**about, "gradient_tokens": dict.fromkeys(about["gradient_tokens"], -1)}, tensors
    )
    with pytest.raises(UserError, match="gradients of -1 tokens"):
        Statistics.load(path)
    weights = f"gradients:{name}:token_weights"
    write_tensors(path, about, {key: value for key, value in tensors.items() if key != weights})
    assert Statistics.load(path).of(name, ("gradients",)).gradients.token_weights is None
    write_tensors(path, about, {**tensors, weights: tensors[weights][1:]})
    with pytest.raises(UserError, match="weights of other tokens than its"):
        Statistics.load(path)


def test_kept_weights_of_tokens_are_those_that_a_pass_would_find(tmp_path, monkeypatch):
    model, batches = tiny_model("bert"), [tiny_batch(5, 9), tiny_batch(3, 14)]
    modules = select_linears(model)
    found = token_weights(model, batches, modules, progress=False)
    other = token_weights(model, batches[::-1], modules, progress=False)
    collect_to_file(
        tmp_path / "kept.safetensors",
        model,
        batches,
        modules,
        needs=("gradients",),
        layers_at_once=1,
        progress=False,
    )
    kept = Statistics.load(tmp_path / "kept.safetensors")
    again = token_weights(model, batches[::-1], modules, kept, progress=False)
    # Nothing below runs the model any more.
    monkeypatch.setattr(bert_decomp.statistics.collect, "_Weights", None)
    taken = token_weights(model, batches, modules, kept, progress=False)
    for wanted, given in ((found, taken), (other, again)):
        assert set(wanted) == set(given) == set(modules)
        for name, parts in wanted.items():
            assert len(parts) == len(given[name]) == 2
            assert all(map(torch.equal, parts, given[name]))
