#!/usr/bin/env python3
"""Writes src/text/unicode_tables.c: what `tokenizers` believes about every code point.

The pre-tokeniser's classes (\\p{L}, \\p{N}, \\s), Digits, the word and space tests of added tokens, and NFC come from
three libraries inside `tokenizers`, each with a Unicode version of its own. So the table is not taken from unicodedata
but measured: the library is asked about each code point. Only the values of the combining classes are Python's, and
those are checked against the order that the library sorts marks into.

    .venv/bin/python tools/gen_unicode.py > src/text/unicode_tables.c
"""
import sys
import unicodedata

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

L, N, S, WORD, STRIP, DIGIT, UNSAFE = 1, 2, 4, 8, 16, 32, 64
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
CHARS = [chr(c) for c in CODE_POINTS]
HANGUL = range(0xAC00, 0xD7A4)


def matches(pattern, texts, width):
    """Indices of those texts (each `width` long) that hold a match at their start."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    return {start // width for _, (start, _) in split.pre_tokenize_str("".join(texts)) if start % width == 0}


def added_token_starts(token, texts):
    tok = Tokenizer(models.BPE())
    tok.add_tokens([token])
    return [start for start, _ in tok.encode("".join(texts)).offsets]


def measure_classes():
    flags = [0] * 0x110000
    for bit, pattern in ((L, r"\p{L}"), (N, r"\p{N}"), (S, r"\s")):
        for i in matches(pattern, CHARS, 1):
            flags[CODE_POINTS[i]] |= bit
    # A numeric character stands alone between two letters; any other stays with its neighbours.
    for _, (start, end) in pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str("x".join(CHARS)):
        if start % 2 == 0 and end == start + 1:
            flags[CODE_POINTS[start // 2]] |= DIGIT
    # "c<@> ": a single_word token is found unless c is a word character.
    token = AddedToken("<@>", single_word=True, normalized=False)
    found = {(start - 1) // 5 for start in added_token_starts(token, [c + "<@> " for c in CHARS])}
    for i, c in enumerate(CODE_POINTS):
        if i not in found:
            flags[c] |= WORD
    # "c<@>x": an lstrip token begins at c where c is a space. "x" keeps spaces apart.
    token = AddedToken("<@>", lstrip=True, normalized=False)
    for start in added_token_starts(token, [c + "<@>x" for c in CHARS]):
        if start % 5 == 0:
            flags[CODE_POINTS[start // 5]] |= STRIP
    return flags


def check_contractions():
    """The scanners know the case-insensitive contractions by heart; here is the proof that they know all of them."""
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    single = set("sStTmMdD\u017f")
    for before, after, expected in (("'", "", single), ("'r", "", "eE"), ("'R", "", "eE"), ("'v", "", "eE"),
                                    ("'l", "", "lL"), ("'L", "", "lL"), ("'", "e", "rRvV"), ("'", "l", "lL")):
        texts = [before + c + after for c in CHARS]
        found = {CHARS[i] for i in matches(pattern, texts, len(texts[0]))}
        if after:
            found -= single
        assert found == set(expected), (before, after, found)


def measure_combining(nfd, decompositions):
    """Which characters are sorted as marks. U+0334 has class 1, before every higher one; U+0345 has 240, the highest."""
    low, high = "\u0334", "\u0345"
    classes = {}
    for c, mark in zip(CODE_POINTS, CHARS):
        if c in decompositions or c in HANGUL:
            continue
        if nfd("a" + mark + low) != "a" + mark + low or nfd("a" + high + mark) != "a" + high + mark:
            classes[c] = unicodedata.combining(mark)
    examples = {v: chr(c) for c, v in classes.items()}
    for c, v in classes.items():
        for w, example in examples.items():
            assert (nfd("a" + example + chr(c)) != "a" + example + chr(c)) == (v < w), (hex(c), v, w)
    return classes


def measure_nfc(flags):
    nfd, nfc = normalizers.NFD().normalize_str, normalizers.NFC().normalize_str
    decomposed = {c: nfd(chr(c)) for c in CODE_POINTS}
    decompositions = {c: d for c, d in decomposed.items() if d != chr(c) and c not in HANGUL}
    combining = measure_combining(nfd, decompositions)
    compositions = []
    for c, d in decompositions.items():
        if nfc(chr(c)) == chr(c) and len(d) > 1:
            first = nfc(d[:-1])
            assert len(first) == 1 and nfc(first + d[-1]) == chr(c), hex(c)
            compositions.append((ord(first), ord(d[-1]), c))
    seconds = {second for _, second, _ in compositions} | set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))
    for c in CODE_POINTS:
        first = ord(decomposed[c][0])
        if first in combining or first in seconds or c in combining or nfc(chr(c)) != chr(c):
            flags[c] |= UNSAFE
    return combining, decompositions, sorted(compositions)


def rows(values, per_line):
    for i in range(0, len(values), per_line):
        print("    " + " ".join(f"{v}," for v in values[i : i + per_line]))


def table(declaration, values, per_line):
    print(f"{declaration} = {{")
    rows(values, per_line)
    print("};\n")


def main():
    flags = measure_classes()
    check_contractions()
    combining, decompositions, compositions = measure_nfc(flags)
    pages, index = [], []
    for p in range(0x1100):
        page = tuple(flags[p * 256 : p * 256 + 256])
        if page not in pages:
            pages.append(page)
        index.append(pages.index(page))
    assert len(pages) <= 256 and max(len(d) for d in decompositions.values()) <= 4
    print("// unicode_tables.c: GENERATED by tools/gen_unicode.py, do not edit.")
    print(f"// Measured from tokenizers {tokenizers.__version__}. unicode.h says what each table means.")
    print('#include "text/unicode.h"\n')
    print("// clang-format off")
    table("const uint8_t unicode_page_of[0x1100]", index, 32)
    print(f"const uint8_t unicode_pages[{len(pages)}][256] = {{")
    for page in pages:
        print("    {")
        rows(page, 32)
        print("    },")
    print("};\n")
    print(f"const size_t unicode_n_combining = {len(combining)};")
    table(f"const struct unicode_combining unicode_combining[{len(combining)}]",
          [f"{{{hex(c)}, {v}}}" for c, v in sorted(combining.items())], 8)
    print(f"const size_t unicode_n_decompositions = {len(decompositions)};")
    table(f"const struct unicode_decomposition unicode_decompositions[{len(decompositions)}]",
          [f"{{{hex(c)}, {{{', '.join(hex(ord(x)) for x in d)}}}}}" for c, d in sorted(decompositions.items())], 4)
    print(f"const size_t unicode_n_compositions = {len(compositions)};")
    table(f"const struct unicode_composition unicode_compositions[{len(compositions)}]",
          [f"{{{hex(a)}, {hex(b)}, {hex(c)}}}" for a, b, c in compositions], 6)
    print("// clang-format on")


if __name__ == "__main__":
    sys.exit(main())
