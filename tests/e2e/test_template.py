"""Chat templates against Jinja2 in Hugging Face's environment, on generated conversations."""

import json
import math
import os
import pathlib
import random
import re
import struct
import subprocess

import jinja2
import jinja2.sandbox
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
TINY = "models/tandem-tiny"
CONFIG = json.loads((DATA / "qwen3-tokenizer" / "tokenizer_config.json").read_text())
TEMPLATES = {path.stem: path.read_text() for path in sorted((DATA / "templates").glob("*.jinja"))}
TEMPLATES["qwen3"] = CONFIG["chat_template"]
KINDS = {"qwen3-strings": "qwen3", "chatml-default": "chatml"}  # a file's kind, where its name is another


def environment():
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
    return env


PIECES = ["", "\n", "\n\n", " ", "Hello", "how are you?", "<think>", "</think>", "<think>\nhm\n</think>\n\n", "\t", "é",
          "日本語", "😀", "\u2028", "\x00", "\x7f", "\\", '"', "<|im_end|>", "<tool_response>", "</tool_response>",
          "\r\n", "\u0301", "{{ x }}", "<tool_call>", "\u00a0", "&<>'"]


def text(rng):
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(6)))


def number(rng):
    return rng.choice([lambda: rng.randrange(-100, 100), lambda: rng.getrandbits(200), lambda: -rng.getrandbits(70),
                       lambda: rng.uniform(-1, 1) * 10 ** rng.randrange(-320, 308), lambda: float(rng.randrange(1000)),
                       lambda: -0.0, lambda: 1e16, lambda: 1e-5, lambda: 123456789012345680.0, lambda: 5e-324,
                       lambda: 2.0 ** rng.randrange(-1074, 1023), lambda: float("inf"), lambda: 0.0001])()


def value(rng, depth=0):
    pick = rng.randrange(7 if depth < 4 else 4)
    if pick == 0:
        return text(rng)
    if pick == 1:
        return number(rng)
    if pick == 2:
        return rng.choice([None, True, False])
    if pick == 3:
        return rng.choice([{}, [], ""])
    if pick == 4:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {text(rng) + str(i): value(rng, depth + 1) for i in range(rng.randrange(4))}


def call(rng):
    arguments = rng.choice([lambda: value(rng), lambda: json.dumps(value(rng)).replace("Infinity", "1e999"),
                            lambda: {"city": text(rng), "n": number(rng)}])()
    flat = {"name": "f" + text(rng), "arguments": arguments}
    return rng.choice([flat, {"type": "function", "function": flat, "id": "call_1"}])


def conversation(rng, tools_allowed):
    messages = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": text(rng)})
    for _ in range(rng.randrange(1, 7)):
        role = rng.choice(["user", "assistant", "assistant", "tool", "tool", "system"] if tools_allowed
                          else ["user", "assistant"])
        message = {"role": role, "content": text(rng)}
        if role == "user" and rng.random() < 0.3:
            message["content"] = "<tool_response>" + text(rng) + rng.choice(["</tool_response>", ""])
        if role == "assistant" and tools_allowed:
            if rng.random() < 0.4:
                message["reasoning_content"] = rng.choice([None, text(rng)])
            if rng.random() < 0.4:
                message["tool_calls"] = [call(rng) for _ in range(rng.randrange(4))]
        if role == "tool" and rng.random() < 0.3:
            message["tool_call_id"] = "call_1"
        messages.append(message)
    document = {"messages": messages}
    if tools_allowed and rng.random() < 0.4:
        document["tools"] = [{"type": "function", "function": {"name": "f", "parameters": value(rng)}, "x": value(rng)}
                             for _ in range(rng.randrange(3))]
    if rng.random() < 0.6:
        document["enable_thinking"] = rng.choice([True, False])
    if rng.random() < 0.6:
        document["add_generation_prompt"] = rng.choice([True, False])
    return document


def to_json(document, rng):
    """The document as its sender would write it: with or without escapes, on one line or many."""
    out = json.dumps(document, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
    # json.dumps has no other spelling for it; no string of this test holds the word so.
    return re.sub(r'(?<=[ \[])(-?)Infinity(?=[,\]}\n])', r"\g<1>1e400", out)


def template(kind, documents, *options):
    """The program on documents, the model's own template replaced by `kind`."""
    command = [os.environ.get("TANDEM", "build/tandem"), "template", TINY, "--template", kind, *options]
    data = b"\0".join(d.encode() for d in documents)
    return subprocess.run(command, input=data, capture_output=True, check=False)


def render(kind, document):
    done = template(kind, [document])
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    return done.stdout.decode()


def refused(kind, document, word):
    done = template(kind, [document])
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.startswith(b"tandem: template: ") and word in done.stderr.decode(), done.stderr


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_equals_jinja(name):
    rng = random.Random(20250429)
    kind = KINDS.get(name, name)
    jinja = environment().from_string(TEMPLATES[name])
    documents, expected = [], []
    for _ in range(5000):
        document = conversation(rng, kind.startswith("qwen") and kind != "qwen2")
        documents.append(to_json(document, rng))
        expected.append(jinja.render(**{"add_generation_prompt": True, **document}))
    done = template(kind, documents, "-0")
    assert done.returncode == 0, done.stderr
    got, at = done.stdout.decode(), 0
    for document, want in zip(documents, expected):
        assert got[at : at + len(want) + 1] == want + "\0", document
        at += len(want) + 1
    assert at == len(got)


def test_floats_are_pythons():
    rng = random.Random(1)
    values = [2.0**e for e in range(-1074, 1024)] + [float(f"1e{e}") for e in range(-323, 309)]
    values += [m / 10**k for m in (1, 15, 123, 99999) for k in range(12)] + [-v for v in values[::50]]
    while len(values) < 50000:
        v = struct.unpack("<d", rng.randbytes(8))[0]
        if math.isfinite(v):
            values.append(v)
    tools = [{"v": values}]
    document = json.dumps({"messages": [{"role": "user", "content": "x"}], "tools": tools})
    assert json.dumps(tools[0]) in render("qwen3", document)


def test_long_integers_and_key_order():
    tool = '{"z": 123456789012345678901234567890123456789, "a": -18446744073709551616, "m": -0, "0": 1E400, "b": 1.50}'
    document = '{"messages": [{"role": "user", "content": "x"}], "tools": [' + tool + "]}"
    assert json.dumps(json.loads(tool)) in render("qwen3", document)


@pytest.mark.parametrize("document, word", [
    ("[]", "no messages"),
    ('{"messages": [], "tools": []}', "no messages"),
    ('[{"role": "developer", "content": "x"}]', "developer"),
    ('[{"role": "user", "content": [{"type": "text", "text": "x"}]}]', "array"),
    ('[{"role": "user", "content": 5}]', "integer"),
    ('[{"role": "user"}]', "content"),
    ('[{"role": "user", "role": "user", "content": "x"}]', "duplicate key"),
    ('[{"role": "user", "\\u0072ole": "user", "content": "x"}]', "duplicate key"),
    ('[{"role": "user", "content": "\\ud800"}]', "surrogate"),
    ('[{"role": "user", "content": "\\udc00\\ud800"}]', "surrogate"),
    ('[{"role": "user", "content": "x"}] x', "after the end"),
    ('{"messages": [{"role": "user", "content": "x"}], "temperature": 1}', "temperature"),
    ('{"messages": [{"role": "user", "content": "x"}], "tools": ' + "[" * 3000 + "]" * 3000 + "}", "deep"),
    ("[" * 100000, "deep"),
    ("[NaN]", "not a JSON value"),
    ('[{"role": "user", "content": "x", "tool_calls": [1]}]', "only an assistant"),
    ('[{"role": "assistant", "tool_calls": [1]}]', "tool_calls[0]"),
    ('[{"role": "assistant", "tool_calls": [{"name": "f"}]}]', "arguments"),
    ('[{"role": "assistant", "tool_calls": [{"arguments": {}}]}]', "name"),
    ('[{"role": "assistant", "tool_calls": [{"function": "f"}]}]', "function"),
    ('[{"role": "assistant", "tool_calls": {"name": "f"}}]', "array"),
    ('[{"role": "assistant", "tool_calls": [{"type": "custom", "name": "f", "arguments": {}}]}]', "custom"),
    ('[{"role": "assistant", "content": "x", "reasoning_content": 1}]', "reasoning_content"),
    ('{"messages": [{"role": "user", "content": "x"}], "tools": [1]}', "tools[0]"),
    ('{"messages": [{"role": "user", "content": "x"}], "tools": {}}', "tools"),
    ('{"messages": [{"role": "user", "content": "x"}], "enable_thinking": "no"}', "enable_thinking"),
    ('{"tools": []}', "no messages"),
    ('[{"content": "x"}]', "role"),
    ("7", "array"),
    ("", "value was expected"),
    ('[{"role": "user", "content": "x\n"}]', "control character"),
    ("[01]", "expected"),
])
def test_refuses(document, word):
    refused("qwen3", document, word)


@pytest.mark.parametrize("kind", ["qwen2", "smollm2", "chatml"])
@pytest.mark.parametrize("document, word", [
    ('{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', "no rule for tools"),
    ('[{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}]', "no rule for tool_calls"),
    ('[{"role": "wizard", "content": "x"}]', "wizard"),
])
def test_plain_templates_refuse_tools(kind, document, word):
    refused(kind, document, word)


def test_null_content_is_empty():
    document = '[{"role": "user", "content": null}]'
    assert render("qwen3", document) == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("document, end", [
    ('{"messages": [{"role": "user", "content": "x"}], "enable_thinking": null}', "<|im_start|>assistant\n"),
    ('{"messages": [{"role": "user", "content": "x"}], "enable_thinking": false}',
     "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ('{"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": false}', "x<|im_end|>\n"),
])
def test_switches(document, end):
    assert render("qwen3", document).endswith(end)


def test_a_bad_document_is_named_and_ends_the_command():
    good = '[{"role": "user", "content": "x"}]'
    done = template("chatml", [good, good, '[{"role": "user"}]', good], "-0")
    assert done.returncode == 1 and b"document 3: " in done.stderr
    assert done.stdout == ("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n\0" * 2).encode()


@pytest.mark.parametrize("data, texts", [(b"", 0), (b"[%s]\0", 1), (b"[%s]", 1), (b"[%s]\0[%s]", 2), (b"[%s]\0[%s]\0", 2)])
def test_a_final_nul_is_optional(data, texts):
    data = data.replace(b"%s", b'{"role": "user", "content": "x"}')
    command = [os.environ.get("TANDEM", "build/tandem"), "template", TINY, "-0", "--template", "chatml"]
    assert subprocess.run(command, input=data, capture_output=True, check=True).stdout.count(b"\0") == texts


def test_unknown_templates_list_the_known(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((ROOT / TINY / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    command = [os.environ.get("TANDEM", "build/tandem"), "template", str(tmp_path)]
    document = b'[{"role": "user", "content": "x"}]'
    done = subprocess.run(command, input=document, capture_output=True, check=False)
    assert done.returncode == 1 and b"--template" in done.stderr and b"smollm2" in done.stderr
    assert subprocess.run(command + ["--template", "chatml"], input=document, check=False).returncode == 0
    wrong = subprocess.run(command + ["--template", "x"], input=document, capture_output=True, check=False)
    assert wrong.returncode == 2 and b"smollm2" in wrong.stderr
