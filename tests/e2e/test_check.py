"""`tandem check`: no false alarm on healthy models of every kind, and a report that scripts and people can read."""
import json
import os
import subprocess

import gguf
import numpy as np
import pytest

from test_goldens import loud  # noqa: F401 (a fixture)
from test_model_files import CONFIG, make_model, shapes, write_safetensors

TANDEM = os.environ.get("TANDEM", "build/tandem")


def tandem(*args, timeout=300):
    return subprocess.run([TANDEM, "check", *map(str, args)], capture_output=True, text=True, timeout=timeout)


def report(*args, status=0):
    done = tandem(*args, "--json")
    assert done.returncode == status, done.stdout + done.stderr
    out = json.loads(done.stdout)
    assert out["verdict"] == ("ok" if status == 0 else "fault")
    return out


def stage(out, name):
    return next(s for s in out["stages"] if s["name"] == name)


def test_contract():
    """CLI.md's fields, and the figures that the requirement is stated in."""
    out = report("--stage", "weights,model")
    assert [s["name"] for s in out["stages"]] == ["weights", "ops", "model", "serving"]
    assert [s["verdict"] for s in out["stages"]] == ["ok", "skipped", "ok", "skipped"]
    assert all({"name", "verdict", "checks", "seconds"} <= s.keys() for s in out["stages"])
    assert out["first"] is None and out["diagnosis"] == []
    assert stage(out, "weights")["checks"] > 400
    figures = stage(out, "model")["figures"]
    assert figures["logits_rms_error"] <= 0.5 * figures["logits_rms_error_h"]
    assert figures["kl_mean"] < figures["kl_mean_h"]
    assert figures["top1_agreement"] > 0.97


def test_whole_tiny():
    """All stages of the default model, as a person sees them."""
    done = tandem()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "8 layers" in lines[0] and "fusion on" in lines[0]
    for name in ["weights", "ops", "model", "serving"]:
        assert any(line.split()[:2] == [name, "ok"] for line in lines), done.stdout
    assert lines[-1].startswith("verdict      ok")
    assert done.stderr == ""


def test_thorough():
    """Every number of tokens from 1 to 300, where a check in a hurry takes the telling ones."""
    few, all_of_them = (stage(report("--synthetic", "micro-qwen3", "--stage", "ops", *more), "ops")["summary"]
                        for more in ([], ["--thorough"]))
    assert "32 token counts to 300" in few and "300 token counts to 300" in all_of_them


def test_loud_variant(loud):  # noqa: F811
    """Norm weights far beyond the ordinary are told, and are no fault."""
    out = report(loud, "--stage", "weights,ops,model")
    figures = stage(out, "model")["figures"]
    assert figures["logits_rms_error"] <= 0.5 * figures["logits_rms_error_h"]


FAMILIES = {"qwen3": {}, "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
            "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}}


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_of_each_family(tmp_path, family):
    config = CONFIG | FAMILIES[family]
    folder, _ = make_model(tmp_path / "m", config, dtype=np.float16)
    out = report(folder, "--stage", "weights,model,serving", "--threads", 2)
    assert stage(out, "serving")["figures"]["ways"] > 20


@pytest.mark.parametrize("path", ["off", "norm_qkv,attention"])
def test_other_paths(path):
    report("--synthetic", "tiny-qwen3", "--fusion", path, "--stage", "ops,model", "--threads", 1)


@pytest.mark.parametrize("kv_type", ["q8_0", "f16"])
def test_other_kv_types(kv_type):
    report("--synthetic", "tiny-qwen3", "--kv-type", kv_type)
    out = report("--kv-type", kv_type, "--stage", "model")
    figures = stage(out, "model")["figures"]
    assert figures["kl_mean"] < figures["kl_mean_h"]


def test_portable():
    out = report("--synthetic", "tiny-llama", "--isa", "portable", "--stage", "model,serving")
    assert out["ops"] == "cpu/portable"


def write_gguf(path, kind):
    """A Llama whose matrices are of one GGUF type: quantised by the gguf package where it can, else random blocks."""
    rng = np.random.default_rng(3)
    config = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512, "vocab_size": 320,
              "tie_word_embeddings": False}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
           "lm_head.weight": "output.weight"}
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(256)
    w.add_embedding_length(256)
    w.add_block_count(2)
    w.add_feed_forward_length(512)
    w.add_head_count(4)
    w.add_head_count_kv(2)
    w.add_rope_dimension_count(64)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(320)
    for name, shape in shapes(config).items():
        if name in top:
            new = top[name]
        else:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            new = f"blk.{layer}.{parts[part]}.weight"
        x = (rng.standard_normal(shape) / np.sqrt(shape[-1]) + (len(shape) == 1)).astype(np.float32)
        if len(shape) == 1:
            w.add_tensor(new, x)
        else:
            w.add_tensor(new, gguf.quants.quantize(x, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.mark.parametrize("name", ["F32", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_types(tmp_path, name):
    path = tmp_path / f"{name}.gguf"
    write_gguf(path, gguf.GGMLQuantizationType[name])
    out = report(path, "--stage", "weights,model")
    assert stage(out, "weights")["figures"] == {}
    assert "21 tensors bound once, 0 unread" in stage(out, "weights")["summary"]


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_k_quants(kind):
    out = report("--synthetic", "tiny-qwen2", "--type", kind, "--stage", "model")
    assert any("int8" in note for note in stage(out, "model")["notes"])


def test_mixed_types_are_told():
    notes = stage(report("--synthetic", "tiny-qwen3", "--type", "q4_k_m", "--stage", "model"), "model")["notes"]
    assert any(note.startswith("Q4_K, Q6_K weights: ") for note in notes)


def test_nan_weight_is_a_fault(tmp_path):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = np.nan

    folder, _ = make_model(tmp_path / "m", CONFIG, change=spoil)
    out = report(folder, "--stage", "weights", status=1)
    assert out["first"]["layer"] == 1 and out["first"]["channel"] == 5
    assert out["first"]["tensor"] == "model.layers.1.mlp.up_proj.weight"
    done = tandem(folder, "--stage", "weights")
    assert done.returncode == 1 and "FAULT" in done.stdout and "first fault" in done.stdout


def test_large_k_norm_is_reported_and_is_no_fault(tmp_path):
    def grow(tensors):
        tensors["model.layers.0.self_attn.k_norm.weight"][3] = 96.5

    folder, _ = make_model(tmp_path / "m", CONFIG, change=grow)
    out = report(folder, "--stage", "weights,ops", "--threads", 2)
    assert "k_norm 96.5 (layer 0)" in stage(out, "weights")["summary"]


def test_unread_and_odd_tensors_are_named(tmp_path):
    def add(tensors):
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(64, np.float32)
        tensors["model.layers.1.mlp.gate_proj.weight"][4:9] = 0
        tensors["model.layers.1.self_attn.v_proj.weight"] = tensors["model.layers.0.self_attn.v_proj.weight"]

    folder, _ = make_model(tmp_path / "m", CONFIG, change=add)
    notes = "\n".join(stage(report(folder, "--stage", "weights"), "weights")["notes"])
    assert "model.layers.0.self_attn.q_proj.bias is in the file" in notes
    assert "model.layers.1.mlp.gate_proj.weight: 5 of 96 rows are all zero" in notes
    assert "hold the same bytes" in notes


def test_what_does_not_load(tmp_path):
    def remove(tensors):
        del tensors["model.layers.1.self_attn.k_norm.weight"]

    folder, _ = make_model(tmp_path / "m", CONFIG, change=remove)
    out = report(folder, status=1)
    assert out["first"]["op"] == "model_load" and out["first"]["layer"] == 1
    assert "missing" in out["first"]["message"]
    done = tandem(tmp_path / "nothing")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("tandem: check: ")


def test_usage():
    for args, says in [(["--stage", "weight"], "weight"), (["--stage", ""], "--stage"), (["--type", "q8_0"], "--type"),
                       (["models/tandem-tiny", "--synthetic", "tiny-llama"], "found both"), (["--seed", "x"], "--seed")]:
        done = tandem(*args)
        assert done.returncode == 2 and says in done.stderr, (args, done.stderr)
    done = tandem("--help")
    assert done.returncode == 0 and "--thorough" in done.stdout
