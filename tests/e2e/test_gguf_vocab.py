"""Vocabularies in GGUF metadata, written as converters write them, give the ids of the library `tokenizers` for the
tokenizer.json that they came from: the families qwen2, llama-bpe, smollm, gpt-2 and llama.cpp's "default"."""
import functools
import json
import pathlib
import subprocess

import gguf
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizer_texts import DEFAULT, LLAMA3, SMOLLM, TANDEM, code_points, compare, compare_joined, generated, run_one

QWEN3 = "build/data/qwen3-tokenizer/tokenizer.json"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
LLAMA3_WORDS = ["<|begin_of_text|>", "<|eot_id|>", *SPECIAL]


def train(pre_tokenizer, normalizer=None, ignore_merges=False, special=SPECIAL, added=ADDED):
    tok = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tok.pre_tokenizer = pre_tokenizer
    tok.decoder = decoders.ByteLevel()
    if normalizer:
        tok.normalizer = normalizer
    texts = [path.read_text() for path in sorted(pathlib.Path("src").rglob("*.h"))] + list(generated(1, 2000))
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tok.train_from_iterator(texts, trainer)
    if ignore_merges:  # words that no merges build, as in Llama 3's vocabulary
        root = json.loads(tok.to_str())
        vocab = root["model"]["vocab"]
        for word in ("\u0120misaligned", "zzzzq", "\u0120\u0120\u0120=", "@@@@@@@"):
            vocab.setdefault(word, len(vocab))
        tok = Tokenizer.from_str(json.dumps(root))
    tok.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tok.add_tokens([AddedToken(t, normalized=False, special=False) for t in added])
    return tok


FAMILIES = {
    "qwen2": lambda: Tokenizer.from_file(QWEN3),
    "llama-bpe": lambda: train(LLAMA3, ignore_merges=True, special=LLAMA3_WORDS),
    "smollm": lambda: train(SMOLLM),
    "gpt-2": lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "default": lambda: train(DEFAULT),
}


def write_gguf(path, tok, pre, n_padding=3, bos=None):
    """As llama.cpp's converter does: added tokens by their own types, merges as lines, padding as unused tokens."""
    root = json.loads(tok.to_str())
    by_id = {i: (t, gguf.TokenType.NORMAL) for t, i in root["model"]["vocab"].items()}
    for t in root["added_tokens"]:
        by_id[t["id"]] = (t["content"], gguf.TokenType.CONTROL if t["special"] else gguf.TokenType.USER_DEFINED)
    n = max(by_id) + 1
    for i in range(n + n_padding):
        by_id.setdefault(i, (f"[PAD{i}]", gguf.TokenType.UNUSED))
    writer = gguf.GGUFWriter(path, "llama" if pre == "llama-bpe" else "qwen2")
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([by_id[i][0] for i in range(n + n_padding)])
    writer.add_token_types([by_id[i][1] for i in range(n + n_padding)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in root["model"]["merges"]])
    if bos:
        writer.add_bos_token_id(tok.token_to_id(bos))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    if request.param == "qwen2":
        subprocess.run(["make", "-s", QWEN3], check=True)
    tok = FAMILIES[request.param]()
    path = tmp_path_factory.mktemp("vocab") / (request.param + ".gguf")
    write_gguf(path, tok, request.param, bos="<|begin_of_text|>" if request.param == "llama-bpe" else None)
    return str(path), tok


@pytest.mark.parametrize("special", [False, True])
def test_generated_strings(family, special):
    path, tok = family
    compare(path, tok, generated(21 + special, 5000), special)


def test_code_points(family):
    path, tok = family
    compare_joined(path, tok, [t for i, t in enumerate(code_points()) if i % 16 < 2])


def test_digits_words_and_special_texts(family):
    path, tok = family
    texts = ["1", "12", "123", "1234", "12345678", " 1234", "\u0664\u0665\u0666\u0667", "\u00bd\u2163\u00b2", "don't DON'T 'S'LL",
             "x  y", "x   \n\n  y  ", "\t\tif", " misaligned", "zzzzq", "   =", "@@@@@@@", "<|im_start|>user\n<think>", "[PAD3]",
             "<|begin_of_text|>a<|eot_id|>", "e\u0301\u00e9\u1100\u1161"]
    for special in (False, True):
        compare(path, tok, texts, special)


def test_ignored_merges_matter():
    """The words that no merges build are there, or the test above would show nothing about them."""
    tok = train(LLAMA3, ignore_merges=True)
    assert len(tok.encode("zzzzq", add_special_tokens=False).ids) == 1


def test_decoding(family):
    path, tok = family
    ids = [e.ids for e in tok.encode_batch(list(generated(5, 500)), add_special_tokens=False)]
    lines = "\n".join(" ".join(map(str, i)) for i in ids)
    out = subprocess.run([TANDEM, "tokenize", path, "--decode"], input=lines.encode(), check=True, stdout=subprocess.PIPE)
    assert out.stdout.decode() == "".join(tok.decode(i, skip_special_tokens=False) + "\n" for i in ids)


@functools.cache
def small():
    return train(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC())


def test_qwen2_normalises(tmp_path):
    """GGUF does not state a normaliser; qwen2's is NFC."""
    write_gguf(tmp_path / "m.gguf", small(), "qwen2")
    assert run_one(tmp_path / "m.gguf", "e\u0301", False) == run_one(tmp_path / "m.gguf", "\u00e9", False)
    write_gguf(tmp_path / "g.gguf", small(), "gpt-2")
    assert run_one(tmp_path / "g.gguf", "e\u0301", False) != run_one(tmp_path / "g.gguf", "\u00e9", False)


def test_default_is_not_gpt2(tmp_path):
    """By name, and where no name is given: punctuation stands apart from the space before it."""
    for name, pre in [("default", "default"), ("none", None), ("gpt-2", "gpt-2")]:
        write_gguf(tmp_path / name, small(), pre)
    texts = ["a (b)", "x == y", "don't"]
    ids = {name: [run_one(tmp_path / name, t, False) for t in texts] for name in ("default", "none", "gpt-2")}
    assert ids["default"] == ids["none"]
    assert all(a != b for a, b in zip(ids["default"], ids["gpt-2"]))


@pytest.mark.parametrize("pre, bos, words", [
    ("tekken", None, ["tekken", "qwen2, llama-bpe, smollm, gpt-2 and default"]),
    ("llama-bpe", None, ["bos_token_id"]),
])
def test_refused(pre, bos, words, tmp_path):
    write_gguf(tmp_path / "m.gguf", small(), pre, bos=bos)
    done = subprocess.run([TANDEM, "tokenize", tmp_path / "m.gguf", "-p", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and all(w in done.stderr for w in words), done.stderr
