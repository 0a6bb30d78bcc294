"""The oracles T and H against Hugging Face's goldens, and T against NumPy for every family and weight type."""
import json

import gguf
import numpy as np
import pytest

from numpy_oracle import forward
from test_goldens import SEQUENCES, TINY, load, loud, rms, trace  # noqa: F401 (loud is a fixture)
from test_model_files import CONFIG, FAMILIES, make_model, shapes
from test_quant import SCALES

OPS = {"l0_q_proj": "layers.0.q", "l0_k_proj": "layers.0.k", "l0_q_norm": "layers.0.q_norm",
       "l0_k_norm": "layers.0.k_norm", "l0_q_rope": "layers.0.q_rope", "l0_k_rope": "layers.0.k_rope"}


@pytest.fixture(scope="module")
def golden():
    return load(TINY / "golden/golden.safetensors")


def test_t_is_the_float64_forward(golden, tmp_path):
    got = trace(TINY, golden["trace.ids"], tmp_path, "*", "T")
    pairs = [(golden[f"trace.{theirs}_f64"], got[ours]) for theirs, ours in (OPS | {"final": "final_norm"}).items()]
    pairs += [(golden["trace.hidden_f64"][i], got[f"layers.{i - 1}.resid"]) for i in range(1, 9)]
    assert np.array_equal(got["embed"], golden["trace.hidden_f64"][0])
    for exact, mine in pairs:
        assert rms(mine.reshape(exact.shape) - exact) <= 1e-14 * rms(exact)


@pytest.mark.parametrize("variant", ["golden", "loud_golden"])
def test_logits(variant, loud, tmp_path):  # noqa: F811
    model = loud if variant == "loud_golden" else TINY
    values = load(TINY / "golden" / f"{variant}.safetensors")
    errors = {"H": [], "HF": []}
    for name in SEQUENCES:
        exact, bf16 = values[f"{name}.logits_f64"], values[f"{name}.logits_bf16"]
        last = f"{len(values[f'{name}.ids']) - len(exact)}-{len(values[f'{name}.ids']) - 1}"
        t = trace(model, values[f"{name}.ids"], tmp_path, path="T", positions=last)["logits"]
        h = trace(model, values[f"{name}.ids"], tmp_path, path="H", positions=last)["logits"]
        assert np.array_equal(t.astype(np.float32), exact)  # the goldens are rounded to f32
        errors["H"].append(h - exact)
        errors["HF"].append(bf16 - exact)
    ratio = rms(np.concatenate(errors["H"])) / rms(np.concatenate(errors["HF"]))
    print(f"{variant}: H's error is {ratio:.3f} of Hugging Face's")
    assert 0.8 < ratio < 1.25


def ulps(a, b):
    """How many bf16 values apart, element by element."""
    def order(x):
        u = (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.int64)
        return np.where(u < 0x8000, u, 0x8000 - u)

    return np.abs(order(a) - order(b))


def test_h_rounds_where_hugging_face_does(golden, tmp_path):
    """Sums in another order move an element by a bf16 ulp now and then, and the next layers amplify that: the first
    layer is judged by its elements, the others by the size of their error."""
    got = trace(TINY, golden["trace.ids"], tmp_path, "*", "H")
    for theirs, ours in OPS.items():
        apart = ulps(golden[f"trace.{theirs}_bf16"], got[ours].reshape(golden[f"trace.{theirs}_bf16"].shape))
        assert apart.max() <= 1 and np.count_nonzero(apart) <= apart.size // 2000, theirs
    assert np.array_equal(got["embed"], golden["trace.hidden_bf16"][0])
    first = ulps(golden["trace.hidden_bf16"][1], got["layers.0.resid"])
    assert np.count_nonzero(first) <= first.size // 100
    for i in range(1, 9):
        exact, bf16, mine = golden["trace.hidden_f64"][i], golden["trace.hidden_bf16"][i], got[f"layers.{i - 1}.resid"]
        assert 0.9 < rms(mine - exact) / rms(bf16 - exact) < 1.1
        assert np.array_equal(mine.astype(np.float32).view(np.uint32) & 0xFFFF, np.zeros(mine.shape, np.uint32))


def bf16(x):
    u = np.asarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_families(family, dtype, tmp_path):
    config = FAMILIES[family]
    dense = {}

    def convert(tensors):
        for name, w in tensors.items():
            stored = bf16(w) if dtype == "bfloat16" else w.astype(dtype)
            dense[name] = (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else stored
            dense[name] = dense[name].astype(np.float64)
            tensors[name] = stored

    folder, _ = make_model(tmp_path / "m", config, change=convert)
    ids = np.random.default_rng(2).integers(0, 8192, 100)  # more than the chunk that `trace` gives an oracle
    exact = forward(dense, ids, n_layers=2, n_heads=4, n_kv_heads=config["num_key_value_heads"], head_dim=16, eps=1e-6,
                    theta=10000.0)
    got = trace(folder, ids, tmp_path, path="T")["logits"]
    assert rms(got - exact) < 1e-13 * rms(exact)
    assert 1e-4 < rms(trace(folder, ids, tmp_path, path="H")["logits"] - exact) / rms(exact) < 0.1


GGUF_NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
              "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
              "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
              "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def gguf_name(name):
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
           "lm_head.weight": "output.weight"}
    if name in top:
        return top[name]
    layer, part = name.removeprefix("model.layers.").split(".", 1)
    part, kind = part.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def quantised_model(path, name, config):
    """A GGUF file whose matrices are random blocks of one type; returns the weights as the gguf package reads them."""
    rng = np.random.default_rng(5)
    kind = gguf.GGMLQuantizationType[name]
    length, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(128)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    dense = {}
    for tensor, shape in shapes(config).items():
        if len(shape) == 1:
            w = (1 + 0.2 * rng.standard_normal(shape)).astype(np.float32)
            writer.add_tensor(gguf_name(tensor), w)
            dense[tensor] = w.astype(np.float64)
            continue
        n_blocks = shape[0] * shape[1] // length
        blocks = rng.integers(0, 256, (n_blocks, n_bytes), np.uint8)
        for at in SCALES[name]:
            size = 2e-4 if name.endswith("_K") else 0.02 / (2 ** int(name[1]) / 8)
            blocks[:, at : at + 2] = (rng.standard_normal(n_blocks) * size).astype(np.float16).view(np.uint8).reshape(-1, 2)
        blocks = blocks.reshape(shape[0], -1)
        writer.add_tensor(gguf_name(tensor), blocks, raw_dtype=kind)
        dense[tensor] = gguf.quants.dequantize(blocks, kind).astype(np.float64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


@pytest.mark.parametrize("name", list(SCALES))
def test_quantised(name, tmp_path):
    config = CONFIG | {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 32,
                       "num_key_value_heads": 8, "vocab_size": 300, "tie_word_embeddings": False}
    model = tmp_path / "m.gguf"
    dense = quantised_model(model, name, config)
    ids = np.random.default_rng(6).integers(0, 300, 20)
    got = trace(model, ids, tmp_path, "embed,logits", "T")
    assert np.array_equal(got["embed"], dense["model.embed_tokens.weight"][ids])
    eps = float(np.float32(1e-6))  # as the file has it
    exact = forward(dense, ids, n_layers=2, n_heads=8, n_kv_heads=8, head_dim=32, eps=eps, theta=10000.0)
    assert rms(got["logits"] - exact) < 1e-13 * rms(exact)


def test_positions_and_metadata(tmp_path):
    ids = [5, 6, 7, 8, 9]
    whole = trace(TINY, ids, tmp_path, "layers.2.k,final_norm,logits", "H")
    some = trace(TINY, ids, tmp_path, "layers.2.k,final_norm,logits", "H", positions="0,2-3,-1")
    assert some["ids"].tolist() == ids and some["positions"].tolist() == [0, 2, 3, 4]
    for name in ("layers.2.k", "final_norm", "logits"):
        assert np.array_equal(some[name], whole[name][[0, 2, 3, 4]])
    raw = (tmp_path / "trace.safetensors").read_bytes()
    meta = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert meta["path"] == "H" and meta["n_heads"] == "4" and meta["n_kv_heads"] == "2" and meta["head_dim"] == "128"
