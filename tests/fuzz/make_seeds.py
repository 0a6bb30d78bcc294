#!/usr/bin/env python3
"""Writes a small seed corpus: make_seeds.py FOLDER fills FOLDER/fuzz_NAME.corpus for each fuzz target of that name.

Only the standard library is used, so that a fuzz run needs no Python packages. Each seed is a good file, or one with a
single fault, so that the fuzzer starts on both sides of every check.
"""
import json
import struct
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def gguf_string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf(values=(), tensors=(), version=3, alignment=32, n_data=512):
    """values: (key, type number, packed bytes); tensors: (name, dims, type number, offset)."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    for key, kind, packed in values:
        out += gguf_string(key) + struct.pack("<I", kind) + packed
    for name, dims, kind, offset in tensors:
        out += gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return out + bytes(-len(out) % alignment) + bytes(range(256)) * (n_data // 256)


def gguf_seeds():
    scalars = [(f"v{kind}", kind, struct.pack("<" + code, 1)) for kind, code in enumerate("BbHhIifB")]
    scalars += [("u64", 10, struct.pack("<Q", 1)), ("i64", 11, struct.pack("<q", -1)), ("f64", 12, struct.pack("<d", 2))]
    texts = [("s", 8, gguf_string("qwen3")), ("a", 9, struct.pack("<IQ", 8, 2) + gguf_string("x") + gguf_string(""))]
    arrays = [(f"a{kind}", 9, struct.pack("<IQ", kind, 2) + struct.pack("<2" + code, 1, 0))
              for kind, code in [(0, "B"), (3, "h"), (6, "f"), (7, "B"), (10, "Q"), (12, "d")]]
    aligned = [("general.alignment", 4, struct.pack("<I", 64))]
    split = [("split.count", 2, struct.pack("<H", 3))]
    two = [("a.weight", (32, 2), 8, 0), ("b.weight", (4,), 0, 96)]
    yield from (gguf(), gguf(version=2), gguf(version=1), gguf(version=0x03000000), gguf(scalars), gguf(texts))
    yield from (gguf(arrays), gguf(aligned, two[:1], alignment=64), gguf(split), gguf(scalars + texts + arrays, two))
    yield from (gguf(tensors=[("t", (256,), kind, 0)]) for kind in (1, 2, 3, 6, 7, 10, 11, 12, 13, 14, 16, 30, 39))
    yield gguf(tensors=two + two)
    yield gguf(tensors=[("t", (2, 2, 2, 2), 28, 0)])


def safetensors(header, n_data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(n_data)


def safetensors_seeds():
    def entry(kind, shape, begin, end):
        return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    yield safetensors({}, 0)
    yield safetensors({"__metadata__": {"format": "pt"}, "a": entry("F32", [2, 2], 0, 16)}, 16)
    yield safetensors({"b": entry("BF16", [3], 4, 10), "a": entry("I32", [], 0, 4), "e": entry("U8", [0], 4, 4)}, 10)
    yield safetensors({"a": entry("F64", [1], 0, 8), "b": entry("F16", [1], 4, 6)}, 8)
    yield safetensors({"a": entry("Q9", [2**63], -1, 1)}, 1)
    yield safetensors(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\\u0061":{}}   ', 1)


def config_seeds():
    for path in sorted((REPOSITORY / "models/tandem-tiny").glob("*config.json")):
        yield path.read_bytes()
    yield b'{"a": 1e400, "b": -1, "c": 1.5, "d": 9007199254740993, "e": 99999999999999999999}'
    yield b'{"a": 1, "\\u0061": 2}'
    yield b'{"a": "\\u0000\\ud83d\\ude00\\ud83d", "b": null, "c": true, "d": [], "e": {}}'
    yield b"[" * 3000 + b"]" * 3000


def tokenizer_seeds():
    letters = {c: i for i, c in enumerate("abcdehlo\u0120\u010a0123.,!'s\u00c3\u00a9")}
    merges = ["h e", "l l", "he ll", "hell o", "\u0120 a", "\u00c3 \u00a9"]
    vocab = letters | {m.replace(" ", ""): len(letters) + i for i, m in enumerate(merges)}
    n = len(vocab)
    added = [{"id": n, "content": "<|im_start|>", "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True},
             {"id": n + 1, "content": "<think>", "single_word": True, "lstrip": True, "rstrip": True,
              "normalized": True, "special": False}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    qwen = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+")
    splits = [[{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}, byte_level]
              for p in (qwen, qwen.replace(r"\p{N}|", r"\p{N}{1,3}|"), "[a-z]+|[0-9]")]
    splits += [[{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}], [byte_level]]
    text = b"hello <think> a0123!\n<|im_start|>\xc3\xa9 l'heole\xff"
    for i, split in enumerate(splits):
        root = {"normalizer": {"type": "NFC"} if i % 2 else None, "added_tokens": added,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": split}, "decoder": {"type": "ByteLevel"},
                "model": {"type": "BPE", "vocab": vocab, "merges": merges if i % 2 else [m.split() for m in merges],
                          "ignore_merges": i == 1}}
        config = {"eos_token": "<|im_start|>", "chat_template": "{{ x }}"} if i else {"bos_token": "<think>", "add_bos_token": True}
        yield b"\xff".join([json.dumps(root).encode(), json.dumps(config).encode(), text])


def messages_seeds():
    call = {"role": "assistant", "content": "", "reasoning_content": "r",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5, None, "\u00e9"]}}}]}
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "<|im_end|>"},
            call, {"role": "tool", "content": "t"}, {"role": "tool", "content": "</think>\n"}]
    for i, document in enumerate((talk, {"messages": talk, "tools": [{"type": "function", "function": {"name": "f"}}],
                                         "enable_thinking": False, "add_generation_prompt": True}, talk[:2], [])):
        yield bytes([i]) + json.dumps(document).encode()


def schema_seeds():
    schemas = [
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": -3, "maximum": 40}, "b": {"enum": ["x", 1, None]}},
         "required": ["a"], "additionalProperties": False},
        {"$defs": {"n": {"properties": {"v": {"type": "number", "exclusiveMinimum": 0.5}, "next": {"anyOf": [{"$ref": "#/$defs/n"},
         {"type": "null"}]}}, "required": ["next"]}}, "$ref": "#/$defs/n"},
        {"type": "array", "prefixItems": [{"type": "string", "pattern": "^a[b-d]+$|x", "maxLength": 5}], "items": {"type": "boolean"},
         "minItems": 1, "maxItems": 4},
        {"type": ["string", "null"], "format": "date-time", "minLength": 3},
        {"allOf": [{"properties": {"k": {"const": "a"}}}, {"required": ["k"], "patternProperties": {"^x": {"multipleOf": 7}}}],
         "oneOf": [{"properties": {"k": {"const": "b"}}}, {"additionalProperties": {"type": "integer"}}]},
        {"type": "array", "uniqueItems": True, "items": {"enum": [1, 2, 3]}}, True, {"propertyNames": {"pattern": "^[a-z]*$"}}]
    texts = ['{"a": 12, "b": "x"}', '{"v": 1.5, "next": {"next": null}}', '["abc", true]', '"2024-02-29T10:00:00Z"', '{"k": "a", "xy": 14}',
             "[3, 1]", '{"a": [1, -2.5e3, "\\u00e9"]}', '{"abc": {}}']
    for schema, text in zip(schemas, texts):
        yield json.dumps(schema).encode() + b"\0" + text.encode()


def toolcalls_seeds():
    call = '<tool_call>\n{"name": "f", "arguments": {"x": [1, "}"]}}\n</tool_call>'
    for i, text in enumerate((call, "a " + call + "\n" + call, call[:-5], call.replace("}]", "}"), call.replace('"f"', '"g"'),
                              '<tool_call>{"arguments": {}, "name": "f"}</tool_call> tail', "<tool_call>[]</tool_call>", "<tool<tool_call>")):
        yield bytes([i]) + text.encode()


def body_seeds():
    """A byte for the route, the body, a NUL, and two bytes for each token that the model would say."""
    user = [{"role": "user", "content": "Hi"}]
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {
        "x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"a": {"enum": [1, "b"]}}}}}
    bodies = [
        (0, {"messages": user, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5, "n": 2, "logprobs": True,
             "top_logprobs": 2, "stop": ["a", "b"], "seed": 1, "logit_bias": {"5": 1}, "temperature": 0.5, "top_p": 0.9}),
        (0, {"messages": user, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "stream": True}),
        (0, {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {
            "name": "f", "arguments": '{"x": 1}'}}]}, {"role": "tool", "tool_call_id": "c", "content": "1"}] + user, "tools": [tool],
             "response_format": form, "chat_template_kwargs": {"enable_thinking": False}, "thinking_budget": 3}),
        (1, {"prompt": ["a", "b"], "echo": True, "logprobs": 2, "max_tokens": 2}), (1, {"prompt": [[1, 2], [3]], "stream": True, "n": 2}),
        (2, {"input": "Hi", "text": {"format": {"type": "json_object"}}, "stream": True, "reasoning": {"effort": "none"}}),
        (2, {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]}, {"type": "function_call",
            "call_id": "c", "name": "f", "arguments": "{}"}, {"type": "function_call_output", "call_id": "c", "output": "x"}],
             "tools": [{"type": "function", "name": "f", "parameters": {}}], "instructions": "be"}),
        (3, {"messages": user, "max_tokens": 9, "system": "s", "stream": True, "thinking": {"type": "enabled", "budget_tokens": 1024},
             "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "any"}}),
        (3, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "tool_result", "tool_use_id": "t",
            "content": "r"}]}], "max_tokens": 1, "stop_sequences": ["x"], "output_config": {"format": {"type": "json_schema", "schema": {}}}}),
        (2, {"input": [{"type": "custom_tool_call", "call_id": "c", "name": "p", "namespace": "s", "input": "x"},
                       {"type": "custom_tool_call_output", "call_id": "c", "output": "y"}], "stream": True, "tool_choice": {"type": "custom", "name": "s__p"},
             "reasoning": {"effort": "none"}, "tools": [{"type": "namespace", "name": "s", "tools": [
                 {"type": "custom", "name": "p", "format": {"type": "grammar", "syntax": "lark", "definition": "a"}},
                 {"type": "function", "name": "f", "parameters": {}}]}]}),
        (0, {"messages": user + [{"role": "assistant", "content": "", "reasoning_content": "a"}], "continue_final_message": True, "stream": True}),
        (3, {"messages": user + [{"role": "assistant", "content": "a"}], "max_tokens": 9}),
        (4, {"messages": user}), (5, {"prompt": "abc"}), (6, {"tokens": [1, 2, 3]}), (7, {"messages": user, "add_generation_prompt": True})]
    for route, body in bodies:
        yield bytes([route]) + json.dumps(body).encode() + b"\0" + bytes(range(1, 49))


TARGETS = {"gguf": gguf_seeds, "safetensors": safetensors_seeds, "config": config_seeds, "json_scan": config_seeds,
           "tokenizer": tokenizer_seeds, "messages": messages_seeds,
           "schema": schema_seeds, "toolcalls": toolcalls_seeds, "body": body_seeds}


def main():
    for name, seeds in TARGETS.items():
        folder = Path(sys.argv[1]) / f"fuzz_{name}.corpus"
        folder.mkdir(parents=True, exist_ok=True)
        for i, seed in enumerate(seeds()):
            (folder / f"seed{i:02}").write_bytes(seed)


if __name__ == "__main__":
    main()
