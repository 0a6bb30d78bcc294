"""The tokenizer against the PyPI library `tokenizers`: ids equal for every code point and for generated strings.

Besides the two that the repository has, small tokenizers of other families are trained here, on the repository's text.
TANDEM_THOROUGH=1 compares a million generated strings in place of a hundred thousand."""
import pathlib
import random
import subprocess
import unicodedata

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizer_texts import (LLAMA3, SMOLLM, TANDEM, THOROUGH, code_points, compare, compare_joined, generated,
                             reference_of, run, split)

TINY, QWEN3 = "models/tandem-tiny", "build/data/qwen3-tokenizer"
N = 500_000 if THOROUGH else 50_000  # strings for each of the two above


def byte_level(**options):
    return pre_tokenizers.ByteLevel(**options)


FAMILIES = {
    "llama3": LLAMA3,
    "gpt2": byte_level(add_prefix_space=False),
    "prefix_space": byte_level(add_prefix_space=True),
    "no_pattern": byte_level(add_prefix_space=False, use_regex=False),
    "smollm": SMOLLM,
    "digit_runs": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False),
                                           byte_level(add_prefix_space=False)]),
    "other_pattern": split(r"[a-z]+|[0-9]{2}|<"),
}


@pytest.fixture(scope="session", autouse=True)
def built():
    subprocess.run(["make", "-s", QWEN3 + "/tokenizer.json"], check=True)


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
    compare_joined(folder, reference_of(folder), code_points())


@pytest.mark.parametrize("folder", [TINY, QWEN3])
@pytest.mark.parametrize("special", [False, True])
def test_generated_strings(folder, special):
    compare(folder, reference_of(folder), generated(7 if special else 8, N // 2), special)


@pytest.mark.parametrize("special", [False, True])
def test_families(family, special):
    compare(family, reference_of(family), generated(9 if special else 10, N // 20), special)
    compare(family, reference_of(family), ["a" + chr(c) + "1" for c in range(0x3000)], special)


def test_long_words():
    rng = random.Random(11)
    texts = ["a" * 100_000, " " * 100_001, "\n" * 50_000, "ab" * 60_000, "=" * 70_001, "e\u0301" * 30_000,
             "".join(rng.choice("abcdeinorst") for _ in range(200_000)),
             "".join(rng.choice("a\u0435\u0438\ud55c\u4e2d") for _ in range(100_000))]
    for folder in (TINY, QWEN3):
        compare(folder, reference_of(folder), texts, False)


@pytest.mark.parametrize("folder", [TINY, QWEN3])
def test_decoding(folder):
    """What was encoded comes back, normalised, through --decode."""
    texts = [t.replace("\0", "").replace("\n", " ") for t in generated(13, 2000)]
    ids = run(folder, texts, True)
    lines = "\n".join(" ".join(map(str, i)) for i in ids) + "\n"
    command = [TANDEM, "tokenize", folder, "--decode"]
    out = subprocess.run(command, input=lines.encode(), check=True, stdout=subprocess.PIPE).stdout.decode()
    reference = reference_of(folder)
    assert out == "".join(reference.decode(i, skip_special_tokens=False) + "\n" for i in ids)
    assert out == "".join(unicodedata.normalize("NFC", t) + "\n" for t in texts)
