"""`tandem quantize`: files that the `gguf` package reads, that hold everything, and whose logits stay close."""
import glob
import json
import os
import resource
import signal
import subprocess
import time

import gguf
import numpy
import pytest
from safetensors.numpy import load_file

TANDEM = os.environ.get("TANDEM", "build/tandem")
TINY = "models/tandem-tiny"
IDS = ",".join(str(i * 37 % 600 + 5) for i in range(40))
PROSE = "Once upon a time there was a little girl named Lily. She liked to play in the garden with her dog. One day she found a "
TEXT = "Grüße, 你好! <|im_start|>user\n  3.14159 and ①... <think>"


def tandem(*args, status=0, text=None, **more):
    done = subprocess.run([TANDEM, *args], capture_output=True, text=True, timeout=120, check=False, input=text, **more)
    assert done.returncode == status, (args, done.stdout, done.stderr)
    return done


def quantize(source, path, kind, *args):
    return json.loads(tandem("quantize", source, str(path), "--type", kind, "--json", *args).stdout)


def run_hash(model):
    return json.loads(tandem("run", str(model), "--ids", IDS, "-n", "4", "--greedy", "--json").stdout)["logits_hash"]


def logits(model, tmp_path):
    out = str(tmp_path / "trace.safetensors")
    tandem("trace", str(model), "-p", PROSE, "-o", out)
    return load_file(out)["logits"].astype(numpy.float64)


def kl(p, q):
    def log_softmax(x):
        x = x - x.max(axis=1, keepdims=True)
        return x - numpy.log(numpy.exp(x).sum(axis=1, keepdims=True))
    p, q = log_softmax(p), log_softmax(q)
    return float((numpy.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.fixture(scope="module")
def q4_k_m(tmp_path_factory):
    path = tmp_path_factory.mktemp("q") / "tiny.gguf"
    return path, quantize(TINY, path, "q4_k_m")


def test_unrounded_conversion_is_bit_equal(tmp_path):
    path = tmp_path / "bf16.gguf"
    report = quantize(TINY, path, "bf16")
    assert run_hash(path) == run_hash(TINY)
    assert all(t["relative_error"] == 0 for t in report["tensors"])


@pytest.mark.parametrize("shape", ["tiny-qwen3", "tiny-qwen2", "tiny-llama"])
def test_every_family_goes_through(shape, tmp_path):
    """Biases, q/k norms, a head of its own, and the llama family's rows in GGUF's order."""
    path = tmp_path / "m.gguf"
    source = f"synthetic:{shape}:f32"
    report = quantize(source, path, "f32")
    assert run_hash(path) == run_hash(source)
    assert report["bytes"] == os.path.getsize(path)
    again = tmp_path / "again.gguf"  # and from GGUF to GGUF
    quantize(str(path), again, "f32")
    assert run_hash(again) == run_hash(source)


def test_the_gguf_package_reads_it(q4_k_m):
    path, report = q4_k_m
    reader = gguf.GGUFReader(str(path))
    config = json.load(open(f"{TINY}/config.json", encoding="utf-8"))
    tokenizer = json.load(open(f"{TINY}/tokenizer.json", encoding="utf-8"))

    def value(key):
        return reader.get_field(key).contents()
    assert value("general.architecture") == "qwen3" and value("general.file_type") == 15
    assert value("qwen3.block_count") == config["num_hidden_layers"]
    assert value("qwen3.embedding_length") == config["hidden_size"]
    assert value("qwen3.attention.head_count_kv") == config["num_key_value_heads"]
    assert value("qwen3.attention.key_length") == config["head_dim"]
    assert value("qwen3.rope.freq_base") == config["rope_theta"]
    assert abs(value("qwen3.attention.layer_norm_rms_epsilon") - config["rms_norm_eps"]) < 1e-12
    tokens = value("tokenizer.ggml.tokens")
    assert len(tokens) == config["vocab_size"] == len(value("tokenizer.ggml.token_type"))
    assert all(tokens[i] == t for t, i in tokenizer["model"]["vocab"].items())
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    assert value("tokenizer.ggml.merges") == merges and value("tokenizer.ggml.pre") == "qwen2"
    for token in tokenizer["added_tokens"]:
        assert tokens[token["id"]] == token["content"]
        assert value("tokenizer.ggml.token_type")[token["id"]] == (3 if token["special"] else 4)
    assert tokens[value("tokenizer.ggml.eos_token_id")] == "<|im_end|>"
    assert value("tokenizer.chat_template") == json.load(
        open(f"{TINY}/tokenizer_config.json", encoding="utf-8"))["chat_template"]
    # Every tensor, dequantised by the reference, is the source within the error that was reported.
    source, said = load_file_bf16(f"{TINY}/model.safetensors"), {t["name"]: t for t in report["tensors"]}
    assert {t.name for t in reader.tensors} == set(said)
    for t in reader.tensors:
        assert t.tensor_type.name == said[t.name]["to"]
        got = gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]).astype(numpy.float64)
        expected = source[hf_name(t.name)].astype(numpy.float64)
        error = numpy.sqrt(((got - expected) ** 2).sum() / (expected**2).sum())
        assert got.shape == expected.shape and abs(error - said[t.name]["relative_error"]) < 1e-6


def load_file_bf16(path):
    data = open(path, "rb").read()
    n = int.from_bytes(data[:8], "little")
    out = {}
    for name, t in json.loads(data[8 : 8 + n]).items():
        if name == "__metadata__":
            continue
        raw = numpy.frombuffer(data[8 + n + t["data_offsets"][0] : 8 + n + t["data_offsets"][1]], dtype=numpy.uint16)
        out[name] = (raw.astype(numpy.uint32) << 16).view(numpy.float32).reshape(t["shape"])
    return out


def hf_name(name):
    parts = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
             "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "attn_output": "self_attn.o_proj",
             "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj"}
    bits = name.split(".")
    if bits[0] == "blk":
        return f"model.layers.{bits[1]}.{parts[bits[2]]}.weight"
    return f"{parts[bits[0]]}.weight"


def test_text_is_cut_alike(q4_k_m):
    path, _ = q4_k_m
    for args in ([], ["--special"]):
        assert tandem("tokenize", str(path), *args, text=TEXT).stdout == tandem("tokenize", TINY, *args, text=TEXT).stdout
    messages = '[{"role": "user", "content": "Hello"}]'
    assert tandem("template", str(path), text=messages).stdout == tandem("template", TINY, text=messages).stdout


def test_mixes_and_pure_types(tmp_path):
    def types(kind, *args):
        report = quantize(TINY, tmp_path / "x.gguf", kind, "--force", *args)
        return {t["name"]: t["to"] for t in report["tensors"]}, report["bytes"]
    mixed, size = types("q4_k_m")
    assert mixed["token_embd.weight"] == "Q6_K" and mixed["blk.1.attn_q.weight"] == "Q4_K"
    assert mixed["blk.0.ffn_norm.weight"] == "F32" and mixed["blk.7.ffn_down.weight"] == "Q6_K"
    pure, pure_size = types("q4_k_m", "--pure")
    assert set(pure.values()) == {"Q4_K", "F32"} and pure_size < size
    assert set(types("q8_0")[0].values()) == {"Q8_0", "F32"}


def test_logits_stay_close(tmp_path):
    reference = logits(TINY, tmp_path)
    most = {"q8_0": 0.0008, "q6_k": 0.005, "q5_k_m": 0.013, "q4_k_m": 0.05, "q4_0": 0.07}  # about twice what was seen
    found = {}
    for kind, bound in most.items():
        path = tmp_path / "x.gguf"
        quantize(TINY, path, kind, "--force")
        found[kind] = kl(reference, logits(path, tmp_path))
        assert found[kind] < bound, found
    assert found["q8_0"] < found["q5_k_m"] < found["q4_0"], found


def test_requantising_says_so(q4_k_m, tmp_path):
    path, _ = q4_k_m
    done = tandem("quantize", str(path), str(tmp_path / "y.gguf"), "--type", "q8_0")
    assert "quantised already" in done.stderr and "Q8_0" in done.stdout


def test_refusals(q4_k_m, tmp_path):
    path, _ = q4_k_m
    before = path.read_bytes()
    assert "--force" in tandem("quantize", TINY, str(path), "--type", "q8_0", status=1).stderr
    assert path.read_bytes() == before
    assert "expected one of f32" in tandem("quantize", TINY, "x.gguf", "--type", "q9", status=2).stderr
    assert "--type" in tandem("quantize", TINY, "x.gguf", status=2).stderr
    assert "two arguments" in tandem("quantize", TINY, "--type", "q8_0", status=2).stderr
    assert "is a folder" in tandem("quantize", TINY, str(tmp_path), "--type", "q8_0", status=1).stderr
    assert "cannot write" in tandem("quantize", TINY, "/nonexistent/x.gguf", "--type", "q8_0", status=1).stderr
    assert "no such file" in tandem("quantize", "nowhere", str(tmp_path / "z.gguf"), "--type", "q8_0", status=1).stderr
    assert glob.glob(str(tmp_path / "*")) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk: write() fails in the middle of the data."""
    target = tmp_path / "x.gguf"
    target.write_text("old")
    done = tandem("quantize", TINY, str(target), "--type", "q8_0", "--force", status=1, restore_signals=False,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, 5 << 20)))
    assert "cannot write" in done.stderr and "File too large" in done.stderr
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["x.gguf"]


def test_interruption_leaves_nothing(tmp_path):
    with subprocess.Popen([TANDEM, "quantize", TINY, str(tmp_path / "x.gguf"), "--type", "q2_k", "--threads", "1"],
                          stderr=subprocess.PIPE, text=True) as process:
        end = time.time() + 30
        while not os.listdir(tmp_path) and time.time() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and os.listdir(tmp_path) == [], err
