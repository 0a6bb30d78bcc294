"""Texts on which tokenizers go wrong, and the comparison of `tandem tokenize` with the library `tokenizers`."""
import json
import os
import random
import subprocess
import unicodedata

from tokenizers import Regex, Tokenizer, pre_tokenizers

TANDEM = os.environ.get("TANDEM", "build/tandem")
THOROUGH = os.environ.get("TANDEM_THOROUGH") == "1"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
STARTS = [0x20, 0xA0, 0x300, 0x370, 0x400, 0x590, 0x600, 0x900, 0xE00, 0x1100, 0x1160, 0x11A8, 0x1E00, 0x2000, 0x20D0,
          0x2100, 0x3040, 0x30A0, 0x4E00, 0xAC00, 0xFB00, 0xFF00, 0x1D100, 0x1F300, 0x1F9D0, 0x1E900, 0x10A00]
PIECES = [" ", "  ", "\n", "\r\n", "\t", " \n ", "\u3000", "\u200d", "\ufe0f", "\u0301", "\u0323", "\u0345", "'s", "'LL",
          "'\u017f", "don't", "hello", " the", "int main(void) {\n    ", "();", "123", "3.14", "\u0664", "\U0001f469",
          "\U0001f3fd", "\u1100\u1161\u11a8", "\uac00\u11a8", "\x00", "\x85", "\u2028", "<|im_start|>", "<|im_end|>",
          "<think>", "</tool_call>", "<|im_", "a\u030a", "A\u0300\u0315\u0316"]


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


LLAMA3 = split(CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL)
# llama.cpp's "default"; its patterns, checked against llama-cpp-python 0.3.36 on the texts of test_gguf_vocab.py.
DEFAULT = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(p), "isolated") for p in (
        r"[\p{P}\$\+<=>\^~\|]+", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)", r"\p{N}+",
        r"[0-9][0-9][0-9]")] + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])


def generated(seed, n):
    rng = random.Random(seed)
    for _ in range(n):
        parts = []
        for _ in range(rng.randrange(1, 12)):
            kind = rng.randrange(4)
            if kind == 0:
                start = rng.choice(STARTS)
                parts += [chr(start + rng.randrange(96)) for _ in range(rng.randrange(1, 8))]
            elif kind == 1:
                c = rng.randrange(0x110000 - 0x800)
                parts.append(chr(c if c < 0xD800 else c + 0x800))
            else:
                parts.append(rng.choice(PIECES))
        yield "".join(parts)


def code_points():
    """Every code point: alone and between letters. Those without a character (unassigned, private use) come in runs of
    32 and one in 64 of them alone, unless all tests are asked for."""
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    if not THOROUGH:
        blank = [c for c in points if unicodedata.category(c) in ("Cn", "Co")]
        runs = ["a" + "".join(blank[i : i + 32]) + "a" for i in range(0, len(blank), 32)]
        points = [c for c in points if unicodedata.category(c) not in ("Cn", "Co")] + blank[::64]
        yield from runs
    for c in points:
        yield c
        yield "a" + c + "a"


def run(model, texts, special):
    """The ids of texts without NUL."""
    command = [TANDEM, "tokenize", model, "-0"] + (["--special"] if special else [])
    data = b"".join(t.encode() + b"\0" for t in texts)
    out = subprocess.run(command, input=data, check=True, stdout=subprocess.PIPE).stdout
    return [json.loads(line) for line in out.splitlines()]


def run_one(model, text, special):
    command = [TANDEM, "tokenize", model] + (["--special"] if special else [])
    out = subprocess.run(command, input=text.encode(), check=True, stdout=subprocess.PIPE).stdout
    return list(map(int, out.split()))


def compare(model, reference, texts, special):
    """`model`: a folder or a GGUF file; `reference`: a tokenizers.Tokenizer."""
    reference.encode_special_tokens = not special
    texts = list(texts)
    plain = [t for t in texts if "\0" not in t]
    for i in range(0, len(plain), 50000):
        part = plain[i : i + 50000]
        want = reference.encode_batch_fast(part, add_special_tokens=False)
        found = run(model, part, special)
        assert len(found) == len(part)
        for text, expected, ids in zip(part, want, found):
            assert ids == expected.ids, ascii(text)
    for text in [t for t in texts if "\0" in t][:8]:
        assert run_one(model, text, special) == reference.encode(text, add_special_tokens=False).ids, ascii(text)


def compare_joined(model, reference, texts, separator="<|im_end|>"):
    """The same, in a third of the time: a special token between texts cuts them before anything else happens."""
    texts = list(texts)
    plain = [t for t in texts if "\0" not in t]
    compare(model, reference, (separator.join(plain[i : i + 200]) for i in range(0, len(plain), 200)), True)
    compare(model, reference, [t for t in texts if "\0" in t] + plain[:200], False)


def reference_of(folder):
    return Tokenizer.from_file(str(folder) + "/tokenizer.json")
