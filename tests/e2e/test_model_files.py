"""What is wrong with a model is said by name; a file that is broken anywhere is refused, never run and never a crash."""
import json
import os
import pathlib
import resource
import shutil
import struct
import subprocess

import numpy as np
import pytest

TANDEM = os.environ.get("TANDEM", "build/tandem")
TINY = pathlib.Path("models/tandem-tiny")

CONFIG = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "vocab_size": 8192,
          "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
          "tie_word_embeddings": True, "eos_token_id": 8168}


def shapes(config):
    c, out = config, {}
    h, d = c["hidden_size"], c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    q, kv, ff = c["num_attention_heads"] * d, c["num_key_value_heads"] * d, c["intermediate_size"]
    out["model.embed_tokens.weight"] = (c["vocab_size"], h)
    out["model.norm.weight"] = (h,)
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = (c["vocab_size"], h)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        out |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,),
                p + "self_attn.q_proj.weight": (q, h), p + "self_attn.k_proj.weight": (kv, h),
                p + "self_attn.v_proj.weight": (kv, h), p + "self_attn.o_proj.weight": (h, q),
                p + "mlp.gate_proj.weight": (ff, h), p + "mlp.up_proj.weight": (ff, h), p + "mlp.down_proj.weight": (h, ff)}
        if c["model_type"] == "qwen3":
            out |= {p + "self_attn.q_norm.weight": (d,), p + "self_attn.k_norm.weight": (d,)}
        if c["model_type"] == "qwen2":
            out |= {p + "self_attn.q_proj.bias": (q,), p + "self_attn.k_proj.bias": (kv,), p + "self_attn.v_proj.bias": (kv,)}
    return out


def write_safetensors(path, tensors):
    header, data = {}, b""
    for name, a in tensors.items():
        raw = a.tobytes()
        kind = {"float32": "F32", "float16": "F16", "int32": "I32", "uint16": "BF16"}[a.dtype.name]
        header[name] = {"dtype": kind, "shape": list(a.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def make_model(folder, config=CONFIG, change=None, dtype=np.float32):
    rng = np.random.default_rng(1)
    tensors = {name: (rng.standard_normal(shape) * (0.1 if len(shape) > 1 else 0.2) + (len(shape) == 1)).astype(dtype)
               for name, shape in shapes(config).items()}
    if change:
        change(tensors)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(TINY / name, folder)
    write_safetensors(folder / "model.safetensors", tensors)
    return folder, tensors


def tandem(*args):
    return subprocess.run([TANDEM, *map(str, args)], capture_output=True, text=True, timeout=60)


def refused(folder, *words):
    for command in (["run", folder, "--ids", "1,2", "-n", "1"], ["inspect", folder]):
        done = tandem(*command)
        assert done.returncode == 1, (command, done.stdout, done.stderr)
        for word in words:
            assert word in done.stderr, done.stderr


FAMILIES = {
    "qwen3": CONFIG,
    "qwen2": CONFIG | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": False},
    "llama": CONFIG | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_random_models_agree_with_the_oracle(family, dtype, tmp_path):
    from numpy_oracle import forward
    from test_goldens import trace

    config = FAMILIES[family]
    folder, tensors = make_model(tmp_path / "m", config, dtype=dtype)
    ids = np.random.default_rng(2).integers(0, 8192, 70)
    exact = forward({k: v.astype(np.float64) for k, v in tensors.items()}, ids, n_layers=2, n_heads=4,
                    n_kv_heads=config["num_key_value_heads"], head_dim=16, eps=1e-6, theta=10000.0)
    got = trace(folder, ids, tmp_path, kv_type="f32")["logits"]
    # f32 and f16 weights multiply unrounded f32 activations: only f32's own rounding is left.
    assert np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2)) < 100 * 2**-24


def test_missing_extra_misshapen_mistyped_nan_inf(tmp_path):
    name = "model.layers.1.self_attn.k_norm.weight"
    matrix = "model.layers.0.mlp.up_proj.weight"
    refused(make_model(tmp_path / "a", change=lambda t: t.pop(name))[0], name, "missing")
    refused(make_model(tmp_path / "b", change=lambda t: t.update({matrix: t[matrix].T.copy()}))[0], matrix, "[96, 64]",
            "[64, 96]")
    refused(make_model(tmp_path / "c", change=lambda t: t.update({matrix: t[matrix].astype(np.int32)}))[0], matrix, "I32")
    extra = tandem("run", make_model(tmp_path / "d", change=lambda t: t.update({"surprise": t[name]}))[0], "--ids", "1",
                   "-n", "1")
    assert extra.returncode == 0 and "surprise" in extra.stderr

    def poison(value):
        def change(tensors):
            tensors[matrix][5, 7] = value
        return change

    for folder, value, word in (("e", np.nan, "NaN"), ("f", -np.inf, "Inf")):
        folder = make_model(tmp_path / folder, change=poison(value))[0]
        done = tandem("run", folder, "--ids", "1", "-n", "1")
        assert done.returncode == 1 and matrix in done.stderr and word in done.stderr and "[5, 7]" in done.stderr
        assert tandem("inspect", folder, "--stats").returncode == 1


def test_a_stored_tied_head_is_skipped_or_named(tmp_path):
    same = make_model(tmp_path / "a", change=lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))[0]
    other = make_model(tmp_path / "b", change=lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))[0]
    plain = make_model(tmp_path / "c")[0]
    run = lambda folder: tandem("run", folder, "--ids", "1,2,3", "-n", "4", "--greedy", "--json")
    hashes = [json.loads(run(f).stdout)["logits_hash"] for f in (same, other, plain)]
    assert len(set(hashes)) == 1
    assert "lm_head" not in run(same).stderr and "lm_head" in run(other).stderr


@pytest.mark.parametrize("change, word", [
    ({"architectures": ["GPT2LMHeadModel"]}, "qwen3"),
    ({"num_attention_heads": 3}, "KV heads"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_hidden_layers": 3}, "model.layers.2"),
    ({"hidden_size": -1}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"head_dim": 15}, "head_dim"),
    ({"head_dim": 32}, "q_proj"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rms_norm_eps": 0}, "psilon"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"use_sliding_window": True}, "sliding"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "dynamic"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"vocab_size": 9000}, "embed_tokens"),
    ({"eos_token_id": [-1]}, "eos_token_id"),
])
def test_bad_configs(change, word, tmp_path):
    folder = make_model(tmp_path / "m")[0]
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    refused(folder, word)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a":1,"a":2}', "{" * 5000, "\x00", "nan", '{"hidden_size":1e999}'])
def test_broken_config_json(text, tmp_path):
    folder = make_model(tmp_path / "m")[0]
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


def test_truncated_weights(tmp_path):
    folder = make_model(tmp_path / "m")[0]
    whole = (folder / "model.safetensors").read_bytes()
    n = struct.unpack("<Q", whole[:8])[0]
    for size in [0, 1, 7, 8, 9, 8 + n // 2, 8 + n - 1, 8 + n, 8 + n + 1, len(whole) - 1]:
        (folder / "model.safetensors").write_bytes(whole[:size])
        refused(folder, "model.safetensors")
    (folder / "model.safetensors").write_bytes(whole + b"x")
    refused(folder, "model.safetensors")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "absent.safetensors", "a/b.safetensors", ""])
def test_shard_names_stay_inside_the_folder(shard, tmp_path):
    folder, tensors = make_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "real.safetensors")
    index = {"metadata": {}, "weight_map": {name: "real.safetensors" for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert tandem("inspect", folder).returncode == 0
    index["weight_map"]["model.norm.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    done = tandem("inspect", folder)
    assert done.returncode == 1 and (shard in done.stderr)


def test_links_are_followed_as_the_hub_cache_needs_it(tmp_path):
    """snapshots/COMMIT/FILE -> ../../blobs/HASH; a shard's name leads nowhere else, its link may."""
    real, tensors = make_model(tmp_path / "m")
    repository = tmp_path / "hub" / "models--me--tiny"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd\n")
    index = {"metadata": {}, "weight_map": {name: "s1.safetensors" for name in tensors}}
    (real / "model.safetensors.index.json").write_text(json.dumps(index))
    (real / "model.safetensors").rename(real / "s1.safetensors")
    for i, path in enumerate(sorted(real.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")}
    run = lambda: subprocess.run([TANDEM, "run", "me/tiny", "--ids", "1", "-n", "1"], capture_output=True, text=True,
                                 env=environment, timeout=60)
    assert run().returncode == 0, run().stderr
    shard = snapshot / "s1.safetensors"
    for target, word in (("../../blobs/gone", "link"), ("/dev/zero", "regular file"), (".", "regular file")):
        shard.unlink()
        shard.symlink_to(target)
        assert run().returncode == 1 and word in run().stderr and "s1.safetensors" in run().stderr, run().stderr
    (snapshot / "model.safetensors").symlink_to("../../blobs/gone")
    assert run().returncode == 1 and "interrupted" in run().stderr


SIZE = 10_000_000  # of a hostile file; the format allows 100 MB


def fill(item, around="{%s}"):
    """JSON of about SIZE bytes: as many different items as fit."""
    count, size = 0, 0
    while size < SIZE:
        count += 4096
        size = len(item % count) * count
    return (around % ",".join(item % i for i in range(count))).encode()


def inspect_in(folder, limit):
    """`inspect` with at most `limit` bytes of memory of its own, mapped files apart."""
    return subprocess.run([TANDEM, "inspect", str(folder)], capture_output=True, text=True, timeout=60,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))


@pytest.mark.parametrize("header, words", [
    (lambda: fill('"%x":0'), ["expected an object"]),
    (lambda: fill('"%x":{}'), ['"dtype" is missing']),
    (lambda: fill('"%x":""', '{"__metadata__":{%s}}'), ["missing"]),
    (lambda: fill('"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'), ["model.embed_tokens.weight", "missing"]),
    (lambda: b'{"a":[' + b"[]," * (SIZE // 3) + b"[]]}", ["expected an object"]),
    (lambda: b'{"a":' + b"[" * SIZE, ["depth"]),
    (lambda: b'{"' + b"x" * SIZE + b'":{}}', ['tensor xxx']),
    (lambda: b'{"a":' + b"1" * SIZE + b"}", ["too big integer"]),
    (lambda: b'{"a":0.' + b"1" * SIZE + b"}", ["expected an object"]),
])
def test_hostile_headers_cost_little_memory(header, words, tmp_path):
    folder = make_model(tmp_path / "m")[0]
    text = header()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    done = inspect_in(folder, 3 * len(text) + 8_000_000)
    assert done.returncode == 1 and all(word in done.stderr for word in words), done.stderr


def test_hostile_index_costs_little_memory(tmp_path):
    folder = make_model(tmp_path / "m")[0]
    (folder / "model.safetensors").rename(folder / "a")
    index = folder / "model.safetensors.index.json"
    for item, word in (('"%x":"a"', "which the index does not list"), ('"%x":0', "is no string"),
                       ('"":{"%x":0}', "duplicate")):
        index.write_bytes(fill(item, '{"weight_map":{%s}}'))
        done = inspect_in(folder, 5 * index.stat().st_size + 8_000_000)  # the file itself is one of the five
        assert done.returncode == 1 and word in done.stderr, done.stderr
    with index.open("wb") as file:
        file.truncate((64 << 20) + 1)
    assert "more than the limit of 67108864" in inspect_in(folder, 8_000_000).stderr


@pytest.mark.parametrize("name, limit", [("config.json", 4 << 20), ("generation_config.json", 4 << 20),
                                         ("tokenizer_config.json", 16 << 20), ("tokenizer.json", 16 << 20)])
def test_small_files_have_small_limits(name, limit, tmp_path):
    folder = make_model(tmp_path / "m")[0]
    (folder / name).write_bytes(b'{"a":"' + b"x" * limit + b'"}')
    done = tandem("run", folder, "-p", "x", "-n", "1")
    assert done.returncode == 1 and name in done.stderr and "limit" in done.stderr, done.stderr
