"""The engine against Hugging Face's goldens (models/tandem-tiny/golden/README.md says what they are)."""
import json
import os
import pathlib
import shutil
import struct
import subprocess

import numpy as np
import pytest

TANDEM = os.environ.get("TANDEM", "build/tandem")
TINY = pathlib.Path("models/tandem-tiny")
SEQUENCES = ["short", "one", "t37", "t64", "t129", "chat"]


def load(path):
    """A safetensors file as {name: float64 or int array}; bf16 is widened exactly."""
    data = pathlib.Path(path).read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    out = {}
    for name, t in json.loads(data[8 : 8 + n]).items():
        if name == "__metadata__":
            continue
        begin, end = t["data_offsets"]
        raw = data[8 + n + begin : 8 + n + end]
        if t["dtype"] == "BF16":
            a = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype("f8")
        else:
            a = np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "I32": "<i4"}[t["dtype"]])
            a = a.astype("f8") if t["dtype"] != "I32" else a
        out[name] = a.reshape(t["shape"])
    return out


def trace(model, ids, tmp_path, tensors="logits", path="fused", kv_type="bf16", positions=None):
    out = tmp_path / "trace.safetensors"
    subprocess.run(
        [TANDEM, "trace", str(model), "--ids", ",".join(map(str, ids)), "--tensors", tensors, "--path", path,
         "--kv-type", kv_type, *(["--positions", positions] if positions else []), "-o", out],
        check=True, capture_output=True)
    return load(out)


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """tandem-tiny with the 16 norm tensors of the loud variant in place."""
    folder = tmp_path_factory.mktemp("loud")
    for f in TINY.iterdir():
        if f.is_file():
            shutil.copy(f, folder / f.name)
    data = bytearray((TINY / "model.safetensors").read_bytes())
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])
    patch = (TINY / "golden/loud.safetensors").read_bytes()
    pn = struct.unpack("<Q", patch[:8])[0]
    for name, t in json.loads(patch[8 : 8 + pn]).items():
        if name == "__metadata__":
            continue
        begin, end = t["data_offsets"]
        at = 8 + n + header[name]["data_offsets"][0]
        data[at : at + end - begin] = patch[8 + pn + begin : 8 + pn + end]
    (folder / "model.safetensors").write_bytes(data)
    return folder


@pytest.mark.parametrize("variant", ["golden", "loud_golden"])
def test_logits_are_closer_to_f64_than_bf16_is(variant, loud, tmp_path):
    model = loud if variant == "loud_golden" else TINY
    golden = load(TINY / "golden" / f"{variant}.safetensors")
    ours, theirs = [], []
    for name in SEQUENCES:
        exact = golden[f"{name}.logits_f64"]
        got = trace(model, golden[f"{name}.ids"], tmp_path)["logits"][-len(exact) :]
        ours.append(got - exact)
        theirs.append(golden[f"{name}.logits_bf16"] - exact)
    ratio = rms(np.concatenate(ours)) / rms(np.concatenate(theirs))
    print(f"{variant}: error is {ratio:.3f} of Hugging Face bf16's")
    assert 0 < ratio <= 0.5


def test_intermediate_tensors_are_closer_to_f64_than_bf16_is(tmp_path):
    golden = load(TINY / "golden/golden.safetensors")
    got = trace(TINY, golden["trace.ids"], tmp_path, "*", "standard")
    names = {"l0_q_proj": "layers.0.q", "l0_k_proj": "layers.0.k", "l0_q_norm": "layers.0.q_norm",
             "l0_k_norm": "layers.0.k_norm", "l0_q_rope": "layers.0.q_rope", "l0_k_rope": "layers.0.k_rope",
             "final": "final_norm"}
    pairs = [(golden[f"trace.{theirs}_f64"], golden[f"trace.{theirs}_bf16"], got[ours]) for theirs, ours in names.items()]
    for i in range(1, 9):
        pairs.append((golden["trace.hidden_f64"][i], golden["trace.hidden_bf16"][i], got[f"layers.{i - 1}.resid"]))
    assert np.array_equal(got["embed"], golden["trace.hidden_f64"][0])
    for exact, bf16, mine in pairs:
        assert rms(mine.reshape(exact.shape) - exact) <= rms(bf16 - exact)


def test_fused_and_standard_are_bit_equal(tmp_path):
    ids = load(TINY / "golden/golden.safetensors")["t64.ids"]
    assert np.array_equal(trace(TINY, ids, tmp_path)["logits"], trace(TINY, ids, tmp_path, path="standard")["logits"])


def test_greedy_text_equals_float32_up_to_a_tie(tmp_path):
    for case in json.loads((TINY / "golden/greedy.json").read_text()):
        ids = ",".join(map(str, case["prompt_ids"]))
        done = subprocess.run([TANDEM, "run", str(TINY), "--ids", ids, "--greedy", "-n", "64", "--json"], check=True,
                              capture_output=True)
        ours, theirs = json.loads(done.stdout)["tokens"], case["f32_ids"]
        if ours == theirs:
            continue
        first = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
        # A tie: at the first difference the exact logits of the two candidates are closer than our error can tell. The
        # margin is measured with the float32 run's own prefix.
        prefix = case["prompt_ids"] + theirs[:first]
        row = trace(TINY, prefix, tmp_path)["logits"][-1]
        assert abs(row[ours[first]] - row[theirs[first]]) < 0.1, case["prompt"]


@pytest.mark.parametrize("kv_type, most", [("f16", 0.5), ("f32", 0.5), ("q8_0", 1.0)])
def test_kv_types_on_the_goldens(kv_type, most, tmp_path):
    """q8_0 costs more than bf16 K and V do, and less than Hugging Face's bf16; no path of it differs from another."""
    golden = load(TINY / "golden/golden.safetensors")
    exact, theirs = golden["t129.logits_f64"], golden["t129.logits_bf16"]
    got = trace(TINY, golden["t129.ids"], tmp_path, kv_type=kv_type)["logits"]
    plain = trace(TINY, golden["t129.ids"], tmp_path, kv_type=kv_type, path="standard")["logits"]
    bf16 = trace(TINY, golden["t129.ids"], tmp_path)["logits"]
    assert np.array_equal(got, plain)
    assert not np.array_equal(got, bf16)
    got, bf16 = got[-len(exact) :], bf16[-len(exact) :]
    assert 0 < rms(got - exact) <= most * rms(theirs - exact)
    assert (rms(got - exact) > rms(bf16 - exact)) == (kv_type == "q8_0")


@pytest.mark.parametrize("kv_type", ["bf16", "q8_0"])
@pytest.mark.parametrize("threads", [1, 3])
def test_same_bits_at_any_thread_count_and_isa(threads, kv_type):
    def digest(*options):
        done = subprocess.run([TANDEM, "run", str(TINY), "-p", "Tell me a story.", "--think", "off", "--seed", "7", "-n",
                               "40", "--kv-type", kv_type, "--json", *options], check=True, capture_output=True)
        answer = json.loads(done.stdout)
        return answer["tokens"], answer["logits_hash"]

    assert digest("--threads", str(threads)) == digest("--threads", "2") == digest("--fusion", "off")
    assert digest("--isa", "portable") == digest()
