"""Dequantisation against the PyPI package `gguf`: every bit equal, on random blocks and on blocks of its quantiser."""
import subprocess

import gguf
import numpy as np
import pytest

TYPES = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
SCALES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108],
          "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}  # where a block has its f16 scales
N_BLOCKS = 20_000


@pytest.fixture(scope="session", autouse=True)
def built():
    subprocess.run(["make", "-s", "build/tests/format/dequant_main"], check=True)


def ours(name, data):
    command = ["build/tests/format/dequant_main", name]
    return np.frombuffer(subprocess.run(command, input=data, check=True, stdout=subprocess.PIPE).stdout, np.float32)


def assert_same(found, expected):
    expected = np.ascontiguousarray(expected, np.float32).ravel()
    assert found.size == expected.size
    both_nan = np.isnan(found) & np.isnan(expected)
    differ = (found.view(np.uint32) != expected.view(np.uint32)) & ~both_nan
    i = int(np.argmax(differ))
    assert not differ.any(), f"{differ.sum()} differ, first at {i}: found {found[i]!r}, expected {expected[i]!r}"


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "any-bits"])
def test_random_blocks(name, finite):
    """Any bits at all; and with finite scales, so that infinities hide nothing."""
    kind = gguf.GGMLQuantizationType[name]
    _, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (N_BLOCKS, n_bytes), np.uint8)
    if finite:
        for at in SCALES.get(name, []):
            scales = rng.standard_normal(N_BLOCKS) * 10.0 ** rng.integers(-7, 4, N_BLOCKS)  # subnormal ones too
            blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, kind)
    assert_same(ours(name, blocks.tobytes()), expected)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_half(name):
    halves = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(1, -1)
    expected = gguf.quants.dequantize(halves, gguf.GGMLQuantizationType[name])
    assert_same(ours(name, halves.tobytes()), expected)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights(name):
    kind = gguf.GGMLQuantizationType[name]
    weights = np.random.default_rng(2).standard_normal((64, 1024)).astype(np.float32)
    blocks = gguf.quants.quantize(weights, kind)
    found = ours(name, blocks.tobytes())
    assert_same(found, gguf.quants.dequantize(blocks, kind))
    assert np.abs(found - weights.ravel()).max() < 0.5
