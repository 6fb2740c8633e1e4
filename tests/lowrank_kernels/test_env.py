"""What is known of the processor."""

import pytest

from lowrank_kernels import env


@pytest.mark.parametrize(
    "flags, features",
    [
        ("fpu avx2 sse4_2 avx512_vnni", ["avx2", "avx512_vnni"]),
        ("amx_int8 avx512f avx2", ["avx2", "avx512f", "amx_int8"]),
        ("avx avx22", []),
        (None, []),
    ],
)
def test_features_are_the_processors_flags(monkeypatch, flags, features):
    monkeypatch.setattr(env, "_cpu_field", lambda name: flags if name == "flags" else None)
    assert env.cpu_features() == features


def test_a_processor_has_a_name_where_the_system_tells_none(monkeypatch):
    monkeypatch.setattr(env, "_cpu_field", lambda name: None)
    assert env.cpu_name()
