"""Schemas that are made to cost time or memory, with Qwen3's vocabulary: each is refused by name, or it costs little."""
import json
import os
import pathlib
import resource
import subprocess
import sys

import pytest

QWEN3 = "build/data/qwen3-tokenizer"


def nested(n, kind):
    schema = {"type": "null"}
    for _ in range(n):
        schema = {"type": "array", "items": schema} if kind == "array" else {"properties": {"a": schema}} if kind == "object" else \
            {kind: [schema]}
    return schema


def laughs(key, n):
    """Each definition is twice the one before."""
    defs = {"d0": {"type": "integer"}}
    for i in range(1, n):
        defs[f"d{i}"] = {key: [{"$ref": f"#/$defs/d{i - 1}"}, {"$ref": f"#/$defs/d{i - 1}"}]} if key != "properties" else \
            {"properties": {"a": {"$ref": f"#/$defs/d{i - 1}"}, "b": {"$ref": f"#/$defs/d{i - 1}"}}}
    return {"$defs": defs, "$ref": f"#/$defs/d{n - 1}"}


def choices(n, width):
    """The product of n choices of width."""
    return {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": k}}} for k in range(width)]} for i in range(n)]}


def string(**keywords):
    return {"type": "string", **keywords}


BOMBS = {
    "900 arrays": nested(430, "array"), "900 objects": nested(290, "object"), "deep anyOf": nested(290, "anyOf"),
    "deep oneOf": nested(290, "oneOf"), "deep allOf": nested(290, "allOf"),
    "laughing anyOf": laughs("anyOf", 60), "laughing oneOf": laughs("oneOf", 60), "laughing allOf": laughs("allOf", 60),
    "laughing properties": laughs("properties", 60), "laughing prefixItems": laughs("prefixItems", 60),
    "2^30 choices": choices(30, 2), "10^10 choices": choices(10, 10),
    "recursive product": {"type": "object", "properties": {k: {"anyOf": [{"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}}]}
                                                           for k in "abcdefgh"}},
    "ambiguous recursion": {"anyOf": [{"type": "array", "items": {"$ref": "#"}}, {"type": "array", "items": {"$ref": "#"}, "maxItems": 9},
                                      {"type": "array", "items": {"$ref": "#"}, "minItems": 2}, {"type": "null"}]},
    "minItems 10^9": {"type": "array", "minItems": 10**9}, "maxItems 10^12": {"type": "array", "maxItems": 10**12},
    "maxItems of maxItems": {"type": "array", "maxItems": 10**6, "items": {"type": "array", "maxItems": 10**6, "items": string()}},
    "minLength 10^7": string(minLength=10**7), "maxLength 10^18": string(maxLength=10**18),
    "maxLength 10^18 with a pattern": string(maxLength=10**18, pattern="^[a-z]+$"), "maxLength -1": string(maxLength=-1),
    "a pattern of powers": string(pattern="(a{1000}){1000}"), "a pattern of nothing": string(pattern="(((((){900}){900}){900}){900}){900}"),
    "stars in stars": string(pattern="((((((((((a*)*)*)*)*)*)*)*)*)*)*b"), "(a+)+b": string(pattern="^(a+)+b$", minLength=20, maxLength=4000),
    "all of (a?){300}": string(pattern="(a?){300}a{300}"), "2^100 states": string(pattern="(a|b)*a(a|b){100}"),
    "ten thousand alternatives": string(pattern="|".join(f"a{i}" for i in range(10000))),
    "patterns at once": {"allOf": [string(pattern=f"(a|b)*a(a|b){{{i}}}") for i in range(2, 9)]},
    "two long patterns": {"allOf": [string(pattern="(a?b?){200}"), string(pattern="(b?a?){200}")]},
    "a long pattern": string(pattern="^[a1-z]{5555}b$"),
    "5,000 patterns": {"properties": {f"p{i}": string(pattern=f"(a?){{200}}{i}") for i in range(500)}},
    "date-times of every length": {"properties": {f"p{i}": string(format="date-time", maxLength=100 + i) for i in range(200)}},
    "urls of every length": {"properties": {f"p{i}": string(format="uri", maxLength=100 + i) for i in range(60)}},
    "huge anyOf": {"anyOf": [{"type": "array", "items": string()}] * 5000},
    "anyOf of 5,000 objects": {"anyOf": [{"properties": {"kind": {"const": i}, f"p{i}": string()}} for i in range(5000)]},
    "oneOf of 1,000 objects": {"oneOf": [{"properties": {"kind": {"const": i}}, "required": ["kind"]} for i in range(1000)]},
    "enum of 20,000": {"enum": [f"value {i * 7919}" for i in range(20000)]},
    "enum with an enum": {"allOf": [{"enum": list(range(3000))}, {"enum": list(range(2999, 0, -1))}]},
    "equal beginnings": {"enum": ["a" * i for i in range(1500)]},
    "uniqueItems": {"type": "array", "uniqueItems": True, "items": {"enum": list(range(30))}},
    "2,000 properties": {"properties": {f"p{i}": True for i in range(2000)}},
    "512 optional properties": {"properties": {f"p{i}": string() for i in range(512)}},
    "512 optional properties and more": {"properties": {f"p{i}": string() for i in range(512)}, "additionalProperties": True},
    "names that share": {"properties": {"a" * i: True for i in range(512)}, "additionalProperties": {"type": "null"}},
    "multipleOf": {"multipleOf": 999, "type": "integer"}, "multipleOf many": {"properties": {f"p{i}": {"multipleOf": 900 + i} for i in range(99)}},
    "long path": {"$ref": "#/" + "a/" * 100000}, "a chain of references": {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"}
                                                                                for i in range(5000)}, "$ref": "#/$defs/d0"},
    "minimum of 10^400": {"minimum": int("9" * 400)}, "maximum of 300 decimals": {"maximum": 1e-300},
}
MEGABYTES = 64


def run(line, limit=None):
    program = pathlib.Path(os.environ.get("TANDEM", "build/tandem")).parent / "tests/server/schema_texts"
    if not pathlib.Path(QWEN3, "tokenizer.json").exists():
        subprocess.run(["make", "-s", f"{QWEN3}/tokenizer.json"], check=True)
    done = subprocess.run([program, QWEN3], input=(json.dumps(line) + "\n").encode(), capture_output=True, timeout=120,
                          preexec_fn=limit)
    return done


@pytest.fixture(scope="module")
def base_bytes():
    """Address space that the program needs for a schema of no account."""
    low, high = 64 << 20, 4 << 30
    while high - low > 8 << 20:
        middle = (low + high) // 2
        done = run({"schema": {"type": "null"}, "texts": []}, lambda: resource.setrlimit(resource.RLIMIT_AS, (middle, middle)))
        low, high = (low, middle) if done.returncode == 0 and done.stdout.startswith(b"{") else (middle, high)
    return high


def test_bombs_cost_little(base_bytes):
    """64 MiB of address space above what the program takes anyhow; its time is the schema's own."""
    limit = base_bytes + (MEGABYTES << 20)
    lines = "".join(json.dumps({"schema": s, "texts": []}) + "\n" for s in BOMBS.values())
    program = pathlib.Path(os.environ.get("TANDEM", "build/tandem")).parent / "tests/server/schema_texts"
    done = subprocess.run([program, QWEN3, "times"], input=lines.encode(), capture_output=True, timeout=300,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert done.returncode == 0, done.stderr
    answers = [json.loads(a) for a in done.stdout.splitlines()]
    assert len(answers) == len(BOMBS)
    slow, refused = [], 0
    for name, a in zip(BOMBS, answers):
        text = f"{name}: {a['ms']:.0f} ms: {a['refused'] or 'honoured'}"
        print(text[:160])
        refused += bool(a["refused"])
        if a["refused"]:
            assert "memory" not in a["refused"], text
            assert a["refused"].startswith("test: schema") or "the schema" in a["refused"], text
        if a["ms"] > 300:  # of the processor; some 100 on an idle machine
            slow.append(text)
    assert not slow, "\n".join(slow)
    assert refused >= 15


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s", "-q"]))
