"""`run --manifest` and `replay`: a record that proves equality, and that says what changed when something did."""
import hashlib
import json
import os
import shutil
import subprocess

import pytest

TANDEM = os.environ.get("TANDEM", "build/tandem")
TINY = "models/tandem-tiny"


def tandem(*args, status=0):
    done = subprocess.run([TANDEM, *args], capture_output=True, text=True, timeout=120, check=False,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == status, (args, done.stdout, done.stderr)
    return done


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "m.json"
    tandem("run", "-p", "Tell me a story.", "-n", "12", "--seed", "5", "--temp", "3", "--logit-bias", "100:-2.5", "--presence-penalty",
           "0.5", "--manifest", str(path))
    return path


def change(path, edit):
    record = json.loads(path.read_text())
    edit(record)
    other = path.with_name("changed.json")
    other.write_text(json.dumps(record))
    return str(other)


def replay(*args, status=0):
    return json.loads(tandem("replay", *args, "--json", status=status).stdout)


def test_manifest_names_everything_by_hash(manifest):
    record = json.loads(manifest.read_text())
    model, text, run = (record["identity"][k] for k in ("model", "text", "run"))
    for entry in model["files"] + text["tokenizer_files"]:
        data = open(os.path.join(TINY, entry["name"]), "rb").read()
        piece = 16 << 20
        digest = hashlib.sha256(b"".join(hashlib.sha256(data[i : i + piece]).digest() for i in range(0, len(data), piece))
                                if "sha256_tree" in entry else data).hexdigest()
        assert entry["bytes"] == len(data) and digest == entry.get("sha256_tree", entry.get("sha256"))
    assert {f["name"] for f in model["files"]} == {"config.json", "generation_config.json", "model.safetensors"}
    template = json.load(open(os.path.join(TINY, "tokenizer_config.json"), encoding="utf-8"))["chat_template"]
    assert text["template_sha256"] == hashlib.sha256(template.encode()).hexdigest()
    assert run["binary_sha256"] == hashlib.sha256(open(TANDEM, "rb").read()).hexdigest()
    assert run["device"].startswith("cpu/") and run["fusion"] == "on"
    assert record["sampling"]["seed"] == {"value": 5, "source": "--seed"}
    assert record["sampling"]["temperature"]["source"] == "--temp"
    assert record["sampling"]["top_k"]["source"] == "generation_config.json"
    assert record["sampling"]["logit_bias"] == [{"id": 100, "bias": -2.5}]
    assert len(record["output"]["ids"]) == 12 and record["output"]["finish_reason"] == "length"


def test_replay_is_equal_however_it_runs(manifest):
    assert replay(str(manifest))["changed"] == []
    other = replay(str(manifest), "--fusion", "off", "--isa", "portable", "--threads", "1")
    assert other["verdict"] == "equal" and other["equal_tokens"] == 12
    assert {c["field"] for c in other["changed"]} >= {"run.fusion", "run.device"}
    assert "equal      12 tokens" in tandem("replay", str(manifest)).stdout


def test_replay_of_stop_texts_end_tokens_and_raw_ids(tmp_path):
    for args in (["-p", "What is the capital of France?", "--think", "off", "--greedy"],
                 ["-p", "What is the capital of France?", "--think", "off", "--greedy", "--stop", "is"],
                 ["--ids", "5,6,7", "-n", "3", "--ignore-eos", "--temp", "1.5"]):
        path = str(tmp_path / "m.json")
        run = json.loads(tandem("run", *args, "--manifest", path, "--json").stdout)
        record = json.load(open(path, encoding="utf-8"))
        assert record["output"] == {"ids": run["tokens"], "finish_reason": run["finish_reason"],
                                    "logits_hash": run["logits_hash"]}
        assert replay(path)["verdict"] == "equal"


def test_first_differing_token_is_named(manifest):
    def edit(record):
        record["output"]["ids"][7] += 1
    was = json.loads(manifest.read_text())
    out = replay(change(manifest, edit), status=1)
    first = out["first_difference"]
    assert out["verdict"] == "different" and out["equal_tokens"] == 7 == first["index"]
    assert first["position"] == len(was["prompt"]["ids"]) + 7
    assert first["expected"]["id"] == first["found"]["id"] + 1 == was["output"]["ids"][7] + 1


def test_seed_and_hash_count(manifest):
    def reseed(record):
        record["sampling"]["seed"]["value"] = 6
    assert replay(change(manifest, reseed), status=1)["first_difference"]

    def rehash(record):
        record["output"]["logits_hash"] = "0" * 16
    out = replay(change(manifest, rehash), status=1)
    assert out["equal_tokens"] == 12 and out["first_difference"] is None and out["verdict"] == "different"


def test_changed_weights_are_named(manifest, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(TINY, copy, ignore=shutil.ignore_patterns("training", "golden"))
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    for i in range(1, 200000, 2):  # the signs of many values of the last tensor
        data[-i] ^= 0x80
    weights.write_bytes(data)
    out = replay(str(manifest), "--model", str(copy), status=1)
    assert [c["field"] for c in out["changed"]] == ["model.files[model.safetensors].sha256_tree"]


def test_moved_model_is_no_change(manifest, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(TINY, copy, ignore=shutil.ignore_patterns("training", "golden"))
    assert replay(str(manifest), "--model", str(copy)) == {**replay(str(manifest)), "changed": []}


def test_broken_manifests(manifest, tmp_path):
    for edit, says in [(lambda r: r.pop("prompt"), "prompt.ids"), (lambda r: r.update(tandem_manifest=2), "of format 1"),
                       (lambda r: r["output"].update(ids=["x"]), "output.ids[0]"),
                       (lambda r: r["sampling"].pop("top_p"), "sampling.top_p.value"),
                       (lambda r: r["prompt"].update(ids=[99999999]), "99999999")]:
        assert says in tandem("replay", change(manifest, edit), status=1).stderr
    assert "cannot open" in tandem("replay", str(tmp_path / "none.json"), status=1).stderr
    assert "expected a manifest" in tandem("replay", status=2).stderr
    assert "cannot write" in tandem("run", "-p", "Hi", "-n", "1", "--manifest", "/nonexistent/x.json", status=1).stderr
