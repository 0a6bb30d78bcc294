"""The tokenizer against the PyPI library `tokenizers`: ids equal for every code point and for generated strings.

Besides the two that the repository has, small tokenizers of other families are trained here, on the repository's text.
TANDEM_THOROUGH=1 compares a million generated strings in place of a hundred thousand."""
import json
import os
import pathlib
import random
import subprocess

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TINY, QWEN3 = "models/tandem-tiny", "build/data/qwen3-tokenizer"
N = 500_000 if os.environ.get("TANDEM_THOROUGH") == "1" else 50_000  # strings for each of the two above
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(**options):
    return pre_tokenizers.ByteLevel(**options)


FAMILIES = {
    "llama3": split(CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL),
    "gpt2": byte_level(add_prefix_space=False),
    "prefix_space": byte_level(add_prefix_space=True),
    "no_pattern": byte_level(add_prefix_space=False, use_regex=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                       byte_level(add_prefix_space=False)]),
    "digit_runs": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False),
                                           byte_level(add_prefix_space=False)]),
    "other_pattern": split(r"[a-z]+|[0-9]{2}|<"),
}
STARTS = [0x20, 0xA0, 0x300, 0x370, 0x400, 0x590, 0x600, 0x900, 0xE00, 0x1100, 0x1160, 0x11A8, 0x1E00, 0x2000, 0x20D0,
          0x2100, 0x3040, 0x30A0, 0x4E00, 0xAC00, 0xFB00, 0xFF00, 0x1D100, 0x1F300, 0x1F9D0, 0x1E900, 0x10A00]
PIECES = [" ", "  ", "\n", "\r\n", "\t", " \n ", "\u3000", "\u200d", "\ufe0f", "\u0301", "\u0323", "\u0345", "'s", "'LL",
          "'\u017f", "don't", "hello", " the", "int main(void) {\n    ", "();", "123", "3.14", "\u0664", "\U0001f469",
          "\U0001f3fd", "\u1100\u1161\u11a8", "\uac00\u11a8", "\x00", "\x85", "\u2028", "<|im_start|>", "<|im_end|>",
          "<think>", "</tool_call>", "<|im_", "a\u030a", "A\u0300\u0315\u0316"]


@pytest.fixture(scope="session", autouse=True)
def built():
    subprocess.run(["make", "-s", "build/tests/text/tokenize_batch", QWEN3 + "/tokenizer.json"], check=True)


def ours(folder, texts, special):
    data = b"".join(b"%d\n%s" % (len(t), t) for t in (t.encode() for t in texts))
    command = ["build/tests/text/tokenize_batch", folder] + (["special"] if special else [])
    lines = subprocess.run(command, input=data, check=True, stdout=subprocess.PIPE).stdout.split(b"\n")
    return [list(map(int, line.split())) for line in lines[: len(texts)]]


def compare(folder, texts, special):
    reference = Tokenizer.from_file(folder + "/tokenizer.json")
    reference.encode_special_tokens = not special
    for i in range(0, len(texts), 20000):
        part = texts[i : i + 20000]
        want = reference.encode_batch_fast(part, add_special_tokens=False)
        for text, expected, found in zip(part, want, ours(folder, part, special)):
            assert found == expected.ids, ascii(text)


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


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, tmp_path_factory):
    """A folder with a tokenizer trained for one pre-tokeniser, with every kind of added token."""
    tok = Tokenizer(models.BPE(ignore_merges=request.param == "llama3"))
    tok.pre_tokenizer = FAMILIES[request.param]
    tok.decoder = decoders.ByteLevel()
    if request.param in ("gpt2", "no_pattern"):
        tok.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tok.train([str(path) for path in sorted(pathlib.Path("src").rglob("*.h"))], trainer)
    tok.add_special_tokens([AddedToken("<|im_start|>", normalized=False, special=True),
                            AddedToken("<|im_", normalized=False, special=True, lstrip=True)])
    tok.add_tokens([AddedToken("<think>", lstrip=True, rstrip=True, normalized=False),
                    AddedToken("</tool_call>", single_word=True, normalized=False),
                    AddedToken("hello", single_word=True, normalized=True),
                    AddedToken("\u00e5", rstrip=True, normalized=True)])
    folder = tmp_path_factory.mktemp(request.param)
    tok.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.mark.parametrize("folder", [TINY, QWEN3])
def test_every_code_point(folder):
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    compare(folder, points, False)
    compare(folder, ["a" + c + "a" for c in points], False)


@pytest.mark.parametrize("folder", [TINY, QWEN3])
@pytest.mark.parametrize("special", [False, True])
def test_generated_strings(folder, special):
    compare(folder, list(generated(7 if special else 8, N // 2)), special)


@pytest.mark.parametrize("special", [False, True])
def test_families(family, special):
    compare(family, list(generated(9 if special else 10, N // 20)), special)
    compare(family, ["a" + chr(c) + "1" for c in range(0x3000)], special)


def test_long_words():
    rng = random.Random(11)
    texts = ["a" * 100_000, " " * 100_001, "\n" * 50_000, "ab" * 60_000, "=" * 70_001, "e\u0301" * 30_000,
             "".join(rng.choice("abcdeinorst") for _ in range(200_000)),
             "".join(rng.choice("a\u0435\u0438\ud55c\u4e2d") for _ in range(100_000))]
    for folder in (TINY, QWEN3):
        compare(folder, texts, False)


@pytest.mark.parametrize("special", [False, True])
def test_command(special):
    """The same ids come out of the program."""
    texts = [t.replace("\0", "") for t in generated(12, 5000)]
    command = [os.environ.get("TANDEM", "build/tandem"), "tokenize", QWEN3, "-0"] + (["--special"] if special else [])
    out = subprocess.run(command, input="\0".join(texts).encode() + b"\0", check=True, stdout=subprocess.PIPE).stdout
    reference = Tokenizer.from_file(QWEN3 + "/tokenizer.json")
    reference.encode_special_tokens = not special
    expected = reference.encode_batch_fast(texts, add_special_tokens=False)
    assert [json.loads(line) for line in out.splitlines()] == [e.ids for e in expected]
