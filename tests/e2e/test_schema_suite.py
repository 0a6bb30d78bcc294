"""The official JSON-Schema-Test-Suite (draft 2020-12): every schema is honoured or refused by a keyword's name.

What is written is always valid. The other way round, docs/SERVING.md lists what valid texts are not written; `written`
below says the same, and everything else that is valid must be written.
"""
import itertools
import json
import os
import pathlib
import random
import re
import subprocess

import jsonschema
import pytest

SUITE = pathlib.Path(".venv/json-schema-test-suite/draft2020-12")
HONOURED = {"type", "enum", "const", "$ref", "allOf", "anyOf", "oneOf", "properties", "required", "additionalProperties", "propertyNames",
            "minProperties", "maxProperties", "items", "patternProperties", "prefixItems", "minItems", "maxItems", "minLength",
            "uniqueItems", "maxLength", "pattern", "format", "minimum", "maximum", "multipleOf", "exclusiveMinimum", "exclusiveMaximum",
            "not", "if", "dependentRequired", "dependentSchemas", "contains"}
# Rewritten as alternatives: what of their valid values is written is the unit tests' matter.
LOGIC = re.compile(r'"(not|if|dependentRequired|dependentSchemas|contains)":')
FORMATS = ["date", "time", "date-time", "duration", "uuid", "email", "hostname", "ipv4", "ipv6", "uri"]
IMPLIED = {"object": ["properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
                      "maxProperties"],
           "array": ["items", "prefixItems", "minItems", "maxItems", "uniqueItems"],
           "string": ["minLength", "maxLength", "pattern"],
           "number": ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"]}


def run(lines):
    program = pathlib.Path(os.environ.get("TANDEM", "build/tandem")).parent / "tests/server/schema_texts"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    done = subprocess.run([program], input=text.encode(), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert len(answers) == len(lines)
    return answers


def plain(value):
    """As tandem writes numbers: a whole one without a point."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e18:
        return int(value)
    if isinstance(value, list):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def orders(value):
    """The value with the members of its objects in every order."""
    if isinstance(value, list):
        return [list(v) for v in itertools.product(*(orders(v) for v in value))]
    if not isinstance(value, dict):
        return [value]
    found = []
    for keys in itertools.permutations(value):
        found += [dict(zip(keys, v)) for v in itertools.product(*(orders(value[k]) for k in keys))]
    return found[:5000]


def texts(value):
    """A constant is written as the schema writes it, 2.0 or 2: both are tried."""
    return sorted({json.dumps(v, ensure_ascii=False) for v in orders(plain(value)) + orders(value) + orders(pointed(value))})


def pointed(value):
    if isinstance(value, list):
        return [pointed(v) for v in value]
    if isinstance(value, dict):
        return {k: pointed(v) for k, v in value.items()}
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e15 else value


class Written:
    """Which valid values are written: the narrowing that docs/SERVING.md lists."""

    def __init__(self, root):
        self.root = root

    def resolve(self, ref):
        at = self.root
        for step in [s for s in ref[1:].split("/")[1:]]:
            step = re.sub("%([0-9A-Fa-f]{2})", lambda m: chr(int(m[1], 16)), step).replace("~1", "/").replace("~0", "~")
            at = at[int(step)] if isinstance(at, list) else at[step]
        return at

    def ways(self, schemas):
        """Every choice of alternatives, as flat lists of schemas without references and combinations."""
        if not schemas:
            return [[]]
        first, rest = schemas[0], schemas[1:]
        if first is True:
            return self.ways(rest)
        if first is False:
            return []
        more = ([self.resolve(first["$ref"])] if "$ref" in first else []) + first.get("allOf", [])
        own = {k: v for k, v in first.items() if k not in ("$ref", "allOf", "anyOf", "oneOf")}
        unions = [first[k] for k in ("anyOf", "oneOf") if k in first]
        return [[own] + way for choice in itertools.product(*unions) for way in self.ways(more + list(choice) + rest)]

    def of(self, value, schemas):
        return any(self.of_way(value, way) for way in self.ways(schemas))

    def of_way(self, value, way):
        if not all(jsonschema.Draft202012Validator(s).is_valid(value) for s in way if "$ref" not in json.dumps(s)):
            return False
        implied = {t for s in way for t, keys in IMPLIED.items() if any(k in s for k in keys)}
        implied |= {"string" for s in way if s.get("format") in FORMATS}
        if any("enum" in s or "const" in s for s in way):
            return True
        if isinstance(value, str) and any(s.get("format") in FORMATS for s in way):
            return False  # some of what is valid: test_formats_are_never_broken
        if implied and not any("type" in s for s in way):
            if not any(jsonschema.Draft202012Validator({"type": t}).is_valid(value) for t in implied):
                return False
        if isinstance(value, float) or isinstance(value, int) and not isinstance(value, bool):
            return abs(value) < 1e18 and "e" not in repr(value)
        if isinstance(value, list):
            return all(self.of(v, [s["prefixItems"][i] if i < len(s.get("prefixItems", [])) else s.get("items", True) for s in way])
                       for i, v in enumerate(value))
        return self.object(value, way) if isinstance(value, dict) else True

    def object(self, value, way):
        names = {n for s in way for n in [*s.get("properties", {}), *s.get("required", [])]}
        listed = any(s.get("required") or "properties" in s and (not s["properties"] or any(v is not False for v in s["properties"].values()))
                     for s in way)
        patterns = [p for s in way for p in s.get("patternProperties", {})]
        opened = any(s.get("additionalProperties") not in (None, False) for s in way)
        for key, v in value.items():
            if key not in names and (patterns and not any(re.search(p, key) for p in patterns) or
                                     not patterns and listed and not opened):
                return False
            schemas = []
            for s in way:
                own = [s["properties"][key]] if key in s.get("properties", {}) else []
                own += [v for p, v in s.get("patternProperties", {}).items() if re.search(p, key)]
                schemas += own or [s.get("additionalProperties", True)]
            if not self.of(v, schemas):
                return False
        return True


def cases(folder):
    for path in sorted(folder.glob("*.json")):
        for group in json.loads(path.read_text()):
            for test in group["tests"]:
                yield path.stem, group["description"], group["schema"], test


def test_core_keywords_are_honoured_or_refused_by_name():
    all_cases = list(cases(SUITE))
    answers = run([{"schema": schema, "texts": texts(test["data"])} for _, _, schema, test in all_cases])
    faults, honoured, refused, keywords, logic = [], 0, {}, set(), [0, 0]
    for (stem, description, schema, test), answer in zip(all_cases, answers):
        name = f"{stem}: {description}: {test['description']}"
        if isinstance(answer, str):
            refused.setdefault(stem, set()).add((description, answer))
            keyword = re.match(r"test: schema[^:]*: ([^:]+): .", answer)
            finite = answer.startswith("nothing can satisfy the schema")
            if not finite and (not keyword or keyword[1] not in json.dumps(schema)):
                faults.append(f"{name}: refused without a name: {answer}")
            if LOGIC.search(json.dumps(schema)):
                continue
            if test["valid"] and ("nothing can satisfy" in answer) and Written(schema).of(test["data"], [schema]):
                faults.append(f"{name}: refused as if nothing were valid")
            continue
        honoured += 1
        keywords |= set(re.findall(r'"([^"]+)":', json.dumps(schema))) & HONOURED
        accepted = any(answer)
        if accepted and not test["valid"]:
            faults.append(f"{name}: writes {json.dumps(test['data'])}, which is invalid")
        if LOGIC.search(json.dumps(schema)):
            logic[0] += test["valid"] and accepted
            logic[1] += test["valid"]
        elif test["valid"] and not accepted and Written(schema).of(plain(test["data"]), [schema]):
            faults.append(f"{name}: never writes {json.dumps(test['data'])}, which is valid")
    for stem, why in sorted(refused.items()):
        print(stem, len(why), sorted(why)[0])
    print(f"{honoured} of {len(all_cases)} cases honoured; with not, if and their like {logic[0]} of {logic[1]} valid ones are written")
    assert not faults, "\n".join(faults)
    assert honoured > 650 and keywords == HONOURED, (honoured, HONOURED - keywords)


def random_value(rng, depth=0):
    kind = rng.randrange(6 if depth > 1 else 9)
    if kind < 6:
        return [None, rng.random() < 0.5, rng.randrange(-2, 5), rng.choice([0.5, 1.5, 2.5]), rng.choice(["", "a", "b", "ab"]), rng.randrange(3)][kind]
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {k: random_value(rng, depth + 1) for k in rng.sample("abc", rng.randrange(4))}


def random_schema(rng, depth=0):
    """A schema of the keywords that exclude and combine; most have a type, as people write them."""
    some = lambda: random_schema(rng, depth + 1)  # noqa: E731
    if depth > 2 or rng.random() < 0.1:
        return rng.choice([True, False, {"type": rng.choice(["integer", "string", "object", "null", "boolean", "number", "array"])},
                           {"const": random_value(rng, 2)}, {"enum": [random_value(rng, 2) for _ in range(rng.randrange(1, 4))]},
                           {"minimum": rng.randrange(4)}, {"maxLength": 1}, {"required": ["a"]}, {"maxItems": 1}])
    makers = {
        "type": lambda: rng.sample(["integer", "string", "object", "array", "null", "boolean"], rng.randrange(1, 4)),
        "properties": lambda: {k: some() for k in rng.sample("abc", rng.randrange(1, 3))},
        "required": lambda: rng.sample("abc", rng.randrange(1, 3)), "items": some, "contains": some, "not": some, "if": some, "then": some,
        "else": some, "minContains": lambda: rng.randrange(3), "maxContains": lambda: rng.randrange(1, 3), "minItems": lambda: rng.randrange(3),
        "maxItems": lambda: rng.randrange(1, 4), "minimum": lambda: rng.randrange(4), "exclusiveMaximum": lambda: rng.randrange(4),
        "dependentRequired": lambda: {rng.choice("abc"): rng.sample("abc", 1)}, "dependentSchemas": lambda: {rng.choice("abc"): some()},
        "oneOf": lambda: [some() for _ in range(rng.randrange(1, 4))], "anyOf": lambda: [some() for _ in range(rng.randrange(1, 3))],
        "allOf": lambda: [some() for _ in range(rng.randrange(1, 3))], "enum": lambda: [random_value(rng) for _ in range(rng.randrange(1, 4))],
        "additionalProperties": some, "uniqueItems": lambda: True, "minLength": lambda: rng.randrange(3)}
    return {k: makers[k]() for k in rng.sample(sorted(makers), rng.randrange(1, 5))}


def test_random_schemas_are_never_broken():
    """Against the jsonschema package: what is written is valid."""
    rng = random.Random(int(os.environ.get("TANDEM_SEED", "1")))
    lines = []
    for _ in range(int(os.environ.get("TANDEM_RANDOM_SCHEMAS", "1500"))):
        values = [random_value(rng) for _ in range(30)]
        lines.append({"schema": random_schema(rng), "texts": [json.dumps(v) for v in values]})
    answers, faults, honoured, valid, written = run(lines), [], 0, 0, 0
    for line, answer in zip(lines, answers):
        if isinstance(answer, str):
            assert ": " in answer or "nothing can satisfy" in answer, answer
            continue
        honoured += 1
        validator = jsonschema.Draft202012Validator(line["schema"])
        for text, accepted in zip(line["texts"], answer):
            good = validator.is_valid(json.loads(text))
            valid += good
            written += good and accepted
            if accepted and not good:
                faults.append(f"{json.dumps(line['schema'])} writes {text}")
    print(f"{honoured} of {len(lines)} schemas honoured; {written} of {valid} valid values are written")
    assert not faults, "\n".join(faults[:10])
    assert honoured > len(lines) / 4 and written > valid / 10


@pytest.mark.parametrize("format", FORMATS)
def test_formats_are_never_broken(format):
    """A format narrows: what is written is valid, and of what is valid some is written."""
    known = [c for c in cases(SUITE / "optional/format") if isinstance(c[2], dict) and c[2].get("format") == format]
    answers = run([{"schema": schema, "texts": texts(test["data"])} for _, _, schema, test in known])
    accepted = 0
    for (_, _, _, test), answer in zip(known, answers):
        assert isinstance(answer, list), answer
        assert test["valid"] or not any(answer), test
        accepted += any(answer)
    print(f"{accepted} of {sum(t['valid'] for *_, t in known)} valid ones are written")
    assert accepted >= 2
