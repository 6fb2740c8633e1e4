"""The folder for the ``kernels`` library is loaded beside the installed package, and its operators are right.

``kernels`` itself is in no environment of the project, for it brings twenty packages, and transformers behaves
differently beside it. Where it is installed, the same is asked of what it loads.
"""

import importlib.util
import json
import sys

import kernel_cases
import pytest
import torch
from kernel_cases import DEVICE, FUSED, Sizes, arguments, assert_no_worse, call, exact, gradients
from torch import nn

import lowrank_kernels
from lowrank_kernels.tools import hub_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "kernels"
    assert hub_folder.main([str(folder)]) == 0
    return folder


def by_hand(folder):
    """As ``kernels`` imports a variant: under its id, from ``__init__.py``."""
    variant = folder / "build" / f"torch-{DEVICE.type}"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_kernels(folder):
    return pytest.importorskip("kernels").get_local_kernel(folder, backend=DEVICE.type)


@pytest.fixture(scope="module", params=[by_hand, by_kernels])
def copy(request, folder):
    # A library of operators cannot be defined twice under one name.
    if request.param is by_hand and importlib.util.find_spec("kernels") is not None:
        pytest.skip("kernels loads the folder")
    return request.param(folder)


@pytest.mark.parametrize("operator", FUSED)
def test_its_operators_are_right_beside_the_installed_ones(operator, copy, monkeypatch):
    tensors = arguments(operator, Sizes(rows=9, inner=34, outer=47, rank=11, neurons=41))
    unfused, truth = call(operator, tensors, "torch"), call(operator, exact(tensors), "torch")
    assert copy is not lowrank_kernels
    monkeypatch.setattr(kernel_cases, "lowrank_kernels", copy)
    assert_no_worse(call(operator, tensors, "triton"), unfused, truth)


def test_its_gradients_are_those_of_the_installed_package(copy, monkeypatch):
    tensors = arguments("linear", Sizes(rows=9, inner=34, outer=47, rank=11))
    wanted = gradients("linear", tensors, "triton", [0, 1, 2, 3], "gelu")
    monkeypatch.setattr(kernel_cases, "lowrank_kernels", copy)
    found = gradients("linear", tensors, "triton", [0, 1, 2, 3], "gelu")
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_its_layer_is_put_into_a_model(folder):
    kernels = pytest.importorskip("kernels")

    @kernels.use_kernel_forward_from_hub("LowRankLinear")
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            _, self.down, self.up, self.bias = arguments("linear", Sizes())

        def forward(self, x):
            raise AssertionError("replaced")

    model = nn.Sequential(Plain()).eval()
    layer = kernels.LocalLayerRepository(folder, layer_name="LowRankLinear")
    mapping = {"LowRankLinear": {DEVICE.type: layer}}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        model = kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device=DEVICE.type)
    x, one = arguments("linear", Sizes())[0], model[0]
    wanted = lowrank_kernels.lowrank_linear(x, one.down, one.up, one.bias)
    assert torch.equal(model(x), wanted)


def test_a_layer_has_no_state_of_its_own():
    """What ``kernels`` asks of a layer."""
    from lowrank_kernels.layers import LowRankLinear

    assert LowRankLinear.__init__ is nn.Module.__init__
    assert set(dir(LowRankLinear)) - set(dir(nn.Module)) <= {"can_torch_compile", "has_backward"}


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    assert hub_folder.main([str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
