"""transformers against the oracles, tensor by tensor, by way of tools/hf_trace.py and `tandem diff` (`make test-hf`)."""
import subprocess
import sys

import numpy as np
import pytest

from test_diff import BUGS, diff, patched, run_trace
from test_goldens import TANDEM, TINY, load, rms
from test_model_files import FAMILIES, make_model

IDS = [int(i) for i in load(TINY / "golden/golden.safetensors")["t64.ids"]]


def hf_trace(model, out, *options, ids=IDS):
    done = subprocess.run([sys.executable, "tools/hf_trace.py", model, "--ids", ",".join(map(str, ids)), "-o", out, *options],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def names(path):
    return set(load(path)) - {"ids", "positions"}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return hf_trace(TINY, tmp_path_factory.mktemp("hf") / "hf.safetensors")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    return {path: run_trace(TINY, folder / path, path, IDS) for path in ("T", "H", "standard")}


def test_the_same_names_and_shapes(hf, ours):
    x, y = load(hf), load(ours["standard"])
    assert {k: v.shape for k, v in x.items()} == {k: v.shape for k, v in y.items()}


@pytest.mark.parametrize("path", ["T", "H", "standard"])
def test_transformers_is_within_rounding(hf, ours, path):
    answer = diff(hf, ours[path])
    assert answer["verdict"] == "rounding" and answer["only_in_a"] == answer["only_in_b"] == 0
    if path == "H":  # the same rounding points: before one ulp here and there has spread, almost all is equal
        for t in answer["tensors"]:
            share = t["different"] / (t["rows"] * t["columns"])
            if t["layer"] == 0:
                print(f"{t['name']}: {t['different']} of {t['rows'] * t['columns']} differ")
                assert share < 0.02, t["name"]


def test_every_op_of_h(hf, ours):
    """The error of H and of transformers against T is the same, tensor by tensor."""
    t, h, theirs = load(ours["T"]), load(ours["H"]), load(hf)
    ratios = {n: rms(h[n] - t[n]) / rms(theirs[n] - t[n]) for n in names(hf) if n != "embed"}
    print("H's error over transformers':", min(ratios.values()), "to", max(ratios.values()))
    assert 0.8 < min(ratios.values()) and max(ratios.values()) < 1.25


@pytest.mark.parametrize("options", [("--attention", "sdpa"), ("--dtype", "f32"), ("--dtype", "f16")])
def test_other_arithmetic(ours, tmp_path, options):
    other = hf_trace(TINY, tmp_path / "x", *options)
    assert diff(ours["T"], other)["verdict"] == "rounding"


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    """Random weights: a wrong bias, head mapping or tied head would show."""
    folder, _ = make_model(tmp_path / "m", FAMILIES[family])
    ids = [int(i) for i in np.random.default_rng(3).integers(0, 8192, 40)]
    f32 = hf_trace(folder, tmp_path / "f32", "--dtype", "f32", ids=ids)
    exact = run_trace(folder, tmp_path / "T", "T", ids)
    answer = diff(exact, f32)
    assert answer["verdict"] == "rounding" and answer["precision"] == "f32" and answer["only_in_a"] == 0
    bf16 = hf_trace(folder, tmp_path / "bf16", ids=ids)
    h = run_trace(folder, tmp_path / "H", "H", ids)
    first = {t["name"]: t["different"] / (t["rows"] * t["columns"]) for t in diff(bf16, h)["tensors"]}
    for name in ("embed", "attn_norm", "q", "k", "v", "q_rope", "k_rope"):
        name = name if name == "embed" else f"layers.0.{name}"
        print(f"{family} {name}: {100 * first[name]:.3f}% differ")
        assert first[name] < 0.005, name


@pytest.mark.parametrize("bug", ["theta", "one head", "gate and up"])
def test_another_engines_bug_is_found(ours, bug, tmp_path):
    change, tensor, op, where = BUGS[bug]
    wrong = hf_trace(patched(tmp_path / "m", **change), tmp_path / "wrong")
    first = diff(ours["standard"], wrong)["first"]
    assert (first["tensor"], first["op"]) == (tensor, op) and where in first["extent"]


def test_prompt_and_positions(tmp_path):
    options = ("-p", "<|im_start|>user\nHello", "-o")
    subprocess.run([sys.executable, "tools/hf_trace.py", TINY, *options, tmp_path / "a", "--positions", "0,-2--1", "--tensors",
                    "layers.*.q,logits"], check=True, capture_output=True)
    subprocess.run([TANDEM, "trace", TINY, *options, tmp_path / "b", "--tensors", "layers.*.q,logits", "--path", "H"], check=True,
                   capture_output=True)
    x, y = load(tmp_path / "a"), load(tmp_path / "b")
    assert np.array_equal(x["ids"], y["ids"]) and len(names(tmp_path / "a")) == 9
    assert x["positions"].tolist() == [0, len(x["ids"]) - 2, len(x["ids"]) - 1]
    assert all(t["rows"] == 3 for t in diff(tmp_path / "a", tmp_path / "b")["tensors"])
