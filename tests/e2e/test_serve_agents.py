"""The requests that coding agents and chat front ends send, field by field, beyond what the two official libraries do by
themselves. Names in comments say whose habit a shape is."""
import json

import openai
import pytest

from serving import chat

TOOL = {"type": "function", "function": {"name": "shell", "description": "Runs a command.", "parameters": {
    "type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}, "workdir": {"type": "string"}},
    "required": ["command"], "additionalProperties": False}}}
OTHER = {"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {"path": {"enum": ["a", "b"]}},
                                                                         "required": ["path"]}}}
OFF = {"chat_template_kwargs": {"enable_thinking": False}}
CACHED = {"cache_control": {"type": "ephemeral"}}


# ---- /v1/messages: Claude Code and other programs on Anthropic's library

def claude(**more):
    """What Claude Code sends in its first turn, but for the length."""
    return {"model": "tandem-tiny", "max_tokens": 16, "temperature": 0, "stream": True, "metadata": {"user_id": "user_1_account__session_2"},
            "system": [{"type": "text", "text": "You are a coding agent.", **CACHED}, {"type": "text", "text": "Be brief.", **CACHED}],
            "tools": [{"name": "Bash", "description": "Runs a command.", "input_schema": {
                "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "properties": {
                    "command": {"type": "string", "description": "the command"}, "timeout": {"type": "number"}},
                "required": ["command"], "additionalProperties": False}, **CACHED}],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "<system-reminder>x</system-reminder>"},
                                                      {"type": "text", "text": "hi", **CACHED}]}],
            "thinking": {"type": "adaptive"}, "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "output_config": {"effort": "high"}, **more}


def data_of(lines):
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_claude_code_begins(server):
    status, headers, body = server.request("POST", "/v1/messages?beta=true", claude(), headers={
        "anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
        "x-api-key": "none", "Authorization": "Bearer none", "User-Agent": "claude-cli/2.1.160 (external, cli)", "X-Stainless-Lang": "js"})
    assert status == 200, body
    events = data_of(body.decode().split("\n"))
    assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
    assert server.request("HEAD", "/")[0] == 200  # is anybody there?
    assert server.post("/v1/messages/count_tokens?beta=true", {k: v for k, v in claude().items() if k not in (
        "max_tokens", "stream", "temperature")})["input_tokens"] > 20


def test_claude_code_goes_on(server):
    """Calls, results in every form, thinking with its signature, reminders from the system between the messages."""
    messages = claude()["messages"] + [
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "tandem"},
                                          {"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "I look."},
                                          {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls"}, "caller": {"type": "direct"}},
                                          {"type": "tool_use", "id": "toolu_2", "name": "Bash", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "a.c", **CACHED}]},
                                     {"type": "tool_result", "tool_use_id": "toolu_2", "content": "No such file", "is_error": True}]},
        {"role": "system", "content": "The file a.c was changed."},
        {"role": "system", "content": [{"type": "text", "text": "Todo list is empty.", **CACHED}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_3"}, {"type": "text", "text": "go on"}]}]
    assert server.post("/v1/messages", claude(messages=messages, stream=False))["type"] == "message"
    texts = [m["content"] for m in messages if m["role"] == "system"]
    for text in ("The file a.c was changed.", texts[1]):
        same = [{"role": "user", "content": "x"}, {"role": "system", "content": text}]
        assert server.post("/v1/messages/count_tokens", {"messages": same})["input_tokens"] == server.post("/tokenize", {
            "messages": [same[0], {"role": "system", "content": text if isinstance(text, str) else text[0]["text"]}],
            "enable_thinking": False})["count"]
    status, _, body = server.request("POST", "/v1/messages", claude(messages=[{"role": "ctx", "content": "x"}]))
    assert status == 400 and b"role must be" in body


def test_claude_codes_changing_header_is_no_part_of_the_prompt(server):
    """It names each request, in front of everything: no page of another one would be found again."""
    def ask(n):
        system = [{"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.{n}; cc_entrypoint=cli; cch={n:05};"},
                  {"type": "text", "text": "You are a coding agent. " * 60}]
        return server.post("/v1/messages", claude(system=system, stream=False))["usage"]
    first, second = ask(1), ask(2)
    assert second["cache_read_input_tokens"] >= 300, (first, second)
    plain = {"messages": [{"role": "user", "content": "x"}]}
    count = [server.post("/v1/messages/count_tokens", {**plain, "system": s})["input_tokens"] for s in (
        [{"type": "text", "text": "x-anthropic-billing-header: a"}, {"type": "text", "text": "S"}], [{"type": "text", "text": "S"}], "S")]
    assert len(set(count)) == 1


def test_anthropic_documents_and_images(server):
    def ask(block):
        return server.request("POST", "/v1/messages", claude(stream=False, messages=[{"role": "user", "content": [block, {"type": "text", "text": "?"}]}]))
    text = {"type": "document", "title": "t", "source": {"type": "text", "media_type": "text/plain", "data": "the text"}}
    assert ask(text)[0] == 200
    assert ask({"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "the text"}]}})[0] == 200
    assert ask({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "tool_reference", "tool_name": "Bash"}]})[0] == 200
    for refused in ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
                    {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}},
                    {"type": "document", "source": {"type": "url", "url": "http://127.0.0.1:1/x"}},
                    {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "source": {}}]}):
        status, _, body = ask(refused)
        assert status == 400 and b"reads text only" in body, body


def test_anthropic_tools_of_other_kinds(server):
    mine = claude()["tools"][0]
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
    assert server.post("/v1/messages", claude(stream=False, tools=[mine, {**mine, "name": "B", "type": "custom", "strict": True}]))
    counts = [server.post("/v1/messages/count_tokens", {"messages": claude()["messages"], "tools": tools})["input_tokens"]
              for tools in ([mine], [mine, search], [search, mine])]
    assert len(set(counts)) == 1  # nothing here can search: the model does not hear of it
    status, _, body = server.request("POST", "/v1/messages", claude(tools=[mine, search], tool_choice={"type": "tool", "name": "web_search"}))
    assert status == 400 and b"web_search" in body
    status, _, body = server.request("POST", "/v1/messages", claude(tools=[{"name": "x"}]))
    assert status == 400 and b"input_schema" in body


def test_anthropic_strict_tool(server):
    """The strict field arrives: a schema that is not supported is refused, without it it is not."""
    odd = {"name": "odd", "input_schema": {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?=x)"}}}}
    assert server.post("/v1/messages", claude(stream=False, tools=[odd]))
    status, _, body = server.request("POST", "/v1/messages", claude(tools=[{**odd, "strict": True}]))
    assert status == 400 and b"pattern" in body


# ---- /v1/responses: Codex

def codex(**more):
    return {"model": "tandem-tiny", "instructions": "You are Codex.", "stream": True, "store": False, "temperature": 0,
            "max_output_tokens": 12, "input": [
                {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>x</permissions>"}]},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<environment_context/>"}]},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
            "tools": [{"type": "function", "name": "shell", "description": "Runs a command.", "strict": False,
                       "parameters": TOOL["function"]["parameters"]},
                      {"type": "web_search", "external_web_access": False},
                      {"type": "namespace", "name": "mcp__x", "tools": [{"type": "function", "name": "y", "parameters": {}}]},
                      {"type": "image_generation", "output_format": "png"}],
            "tool_choice": "auto", "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"},
            "include": ["reasoning.encrypted_content"], "prompt_cache_key": "0196", "text": {"verbosity": "low"},
            "client_metadata": {"x-codex-installation-id": "1"}, **more}


def test_codex(server):
    events = data_of(server.events("/v1/responses", codex()))
    assert events[0]["type"] == "response.created" and events[-1]["type"] in ("response.completed", "response.incomplete")
    assert [t["type"] for t in events[0]["response"]["tools"]] == ["function", "web_search", "namespace", "image_generation"]
    history = codex()["input"] + [
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "s"}], "content": None, "encrypted_content": None},
        {"type": "message", "role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "shell", "arguments": "{\"command\":[\"ls\"]}"},
        {"type": "function_call", "id": "fc_2", "call_id": "call_2", "name": "shell", "arguments": "{\"command\":[\"pwd\"]}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "{\"output\":\"a.c\",\"metadata\":{}}"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "/tmp"}]},
        {"type": "local_shell_call", "call_id": "call_3", "status": "completed", "action": {"type": "exec", "command": ["ls", "-l"]}},
        {"type": "local_shell_call_output", "call_id": "call_3", "output": "x"},
        {"type": "custom_tool_call", "call_id": "call_4", "name": "apply_patch", "input": "*** Begin Patch"},
        {"type": "custom_tool_call_output", "call_id": "call_4", "output": "Done"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "q"}},
        {"type": "message", "role": "user", "content": "go on"}]
    assert data_of(server.events("/v1/responses", codex(input=history)))[-1]["type"] in ("response.completed", "response.incomplete")
    status, _, body = server.request("POST", "/v1/responses", codex(tool_choice={"type": "function", "name": "y"}))
    assert status == 400 and b"no tool called" in body
    status, _, body = server.request("POST", "/v1/responses", codex(tools=[{"type": "function"}]))
    assert status == 400 and b"name" in body
    status, _, body = server.request("POST", "/v1/responses", codex(input=[{"role": "user", "content": [
        {"type": "input_text", "text": "?"}, {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]}]))
    assert status == 400 and b"reads text only" in body


PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": {
    "type": "grammar", "syntax": "lark", "definition": "start: begin_patch hunk+ end_patch"}}
SPACE = {"type": "namespace", "name": "mcp__files", "description": "Files.", "tools": [
    {"type": "function", "name": "open", "description": "Opens.", "strict": True, "parameters": {
        "type": "object", "properties": {"path": {"enum": ["a", "b"]}}, "required": ["path"], "additionalProperties": False}},
    {"type": "custom", "name": "note"}]}


def responses(server, stream, **more):
    """The output items of an answer in which a tool is called, whole or from its stream, and the stream's events."""
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    more = {"model": "tandem-tiny", "input": "Change a file.", "reasoning": {"effort": "none"}, "parallel_tool_calls": False,
            "max_output_tokens": 400, "temperature": 0, **more}
    if not stream:
        return client.responses.create(**more).output, []
    events = list(client.responses.create(stream=True, **more))
    assert events[-1].type == "response.completed", events[-1]
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert [d.model_dump(exclude={"id", "call_id"}) for d in done] == [d.model_dump(exclude={"id", "call_id"}) for d in events[-1].response.output]
    return done, events


@pytest.mark.parametrize("stream", [False, True])
def test_custom_tools_take_free_text(server, stream):
    """Codex's apply_patch and exec: the model writes a function's one argument, the client gets its text."""
    (call,), events = responses(server, stream, tools=[{"type": "function", **TOOL["function"]}, PATCH], tool_choice={"type": "custom", "name": "apply_patch"})
    assert (call.type, call.name, call.namespace) == ("custom_tool_call", "apply_patch", None) and call.id.startswith("ctc_") and call.call_id
    assert isinstance(call.input, str) and not call.input.startswith("{")
    if stream:
        kinds = [e.type for e in events]
        assert "response.function_call_arguments.delta" not in kinds
        assert "".join(e.delta for e in events if e.type == "response.custom_tool_call_input.delta") == call.input
        assert [e.input for e in events if e.type == "response.custom_tool_call_input.done"] == [call.input]
        added = next(e.item for e in events if e.type == "response.output_item.added")
        assert (added.type, added.input, added.call_id, added.id) == ("custom_tool_call", "", call.call_id, call.id)


@pytest.mark.parametrize("stream", [False, True])
def test_tools_of_a_namespace_are_called_by_their_names(server, stream):
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "mcp__files__open"}]}
    (call,), events = responses(server, stream, tools=[PATCH, SPACE], tool_choice=allowed)
    assert (call.type, call.name, call.namespace) == ("function_call", "open", "mcp__files")
    assert json.loads(call.arguments)["path"] in ("a", "b")
    if stream:
        assert [e.name for e in events if e.type == "response.function_call_arguments.done"] == ["open"]
    (call,), _ = responses(server, stream, tools=[SPACE], tool_choice={"type": "custom", "name": "mcp__files__note"})
    assert (call.type, call.name, call.namespace) == ("custom_tool_call", "note", "mcp__files")


def test_such_calls_in_a_history_are_as_the_model_wrote_them(server):
    """Equal to those of a function with that name: so the prompt begins as the last one did."""
    def count(*items):
        return server.post("/v1/responses", {"input": [{"role": "user", "content": "x"}, *items], "max_output_tokens": 1, "tools": [PATCH, SPACE]})["usage"]["input_tokens"]
    assert count({"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "*** Begin"}) == count(
        {"type": "function_call", "call_id": "c", "name": "apply_patch", "arguments": "{\"input\": \"*** Begin\"}"})
    assert count({"type": "function_call", "call_id": "c", "name": "open", "namespace": "mcp__files", "arguments": "{}"}) == count(
        {"type": "function_call", "call_id": "c", "name": "mcp__files__open", "arguments": "{}"})
    for wrong, name in (({**SPACE, "tools": [{"type": "function"}]}, "tools[0].tools[0]"), ({"type": "custom"}, "tools[0]"), ({**PATCH, "name": 7}, "tools[0]")):
        status, _, body = server.request("POST", "/v1/responses", {"input": "x", "tools": [wrong]})
        assert status == 400 and json.loads(body)["error"]["param"] == name, body


def test_responses_log_probabilities_are_refused_or_given(server):
    answer = server.post("/v1/responses", {"input": "hi", "top_logprobs": 2, "include": ["message.output_text.logprobs"],
                                           "max_output_tokens": 4, "temperature": 0, "reasoning": {"effort": "none"}})
    tokens = answer["output"][0]["content"][0]["logprobs"]
    assert len(tokens) == 4 and all(len(t["top_logprobs"]) == 2 and t["logprob"] <= 0 and t["bytes"] for t in tokens)
    assert "".join(t["token"] for t in tokens) == answer["output"][0]["content"][0]["text"]


# ---- /v1/chat/completions: Aider, Open WebUI, LangChain, Continue, Cline, LiteLLM

def test_fields_that_clients_always_send(server):
    body = chat("Hello!", model="tandem-tiny", max_completion_tokens=8, store=False, metadata={"a": "b"}, user="u", safety_identifier="s",
                service_tier="auto", reasoning_effort="low", verbosity="low", prompt_cache_key="k", modalities=["text"], frequency_penalty=0,
                presence_penalty=0, logit_bias=None, logprobs=None, top_logprobs=None, n=1, seed=None, stop=None, tools=None, tool_choice=None,
                response_format={"type": "text"}, parallel_tool_calls=True, stream_options=None, web_search_options={}, think=False,
                options={"num_ctx": 8192}, keep_alive="5m", chat_id="1", session_id="2", extra_body={}, drop_params=True)
    answer = server.post("/v1/chat/completions", body)["choices"][0]
    assert answer["finish_reason"] in ("stop", "length") and answer["message"]["content"]
    lines = server.events("/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}})
    assert lines[-1] == "data: [DONE]" and data_of(lines)[-1]["usage"]["completion_tokens"] <= 8


def test_messages_of_every_shape(server):
    call = {"id": "call_1", "type": "function", "function": {"name": "shell", "arguments": "{\"command\": [\"ls\"]}"}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief.", **CACHED}]},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "list "}, {"type": "text", "text": "files"}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "name": "shell", "content": [{"type": "text", "text": "a.c"}]},
        {"role": "assistant", "content": "", "tool_calls": [{**call, "index": 0}]},
        {"role": "tool", "tool_call_id": "call_1", "content": ""},
        {"role": "assistant", "tool_calls": [call]},  # no content at all
        {"role": "tool", "tool_call_id": "call_1", "content": "b.c"},
        {"role": "assistant", "content": [{"type": "text", "text": "Two files."}], "reasoning_content": "Hm.", "tool_calls": []},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": "x", "tool_calls": None, "reasoning": None},
        {"role": "user", "content": "go on"}]
    assert server.post("/v1/chat/completions", {"messages": messages, "tools": [TOOL], "max_tokens": 4, "temperature": 0})
    for part in ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, {"type": "input_audio", "input_audio": {}},
                 {"type": "file", "file": {"file_id": "x"}}):
        status, _, body = server.request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "What is this?"}, part]}]})
        assert status == 400 and b"reads text only" in body and part["type"].encode() in body


def test_tool_choice_in_every_form(server):
    def calls(choice, **more):
        answer = server.post("/v1/chat/completions", chat("Files?", tools=[OTHER], tool_choice=choice, max_tokens=200, temperature=0, **more))
        return [c["function"]["name"] for c in answer["choices"][0]["message"].get("tool_calls") or []]
    for required in ("required", "any", {"type": "required"}, {"type": "any"}):
        assert calls(required), required
    assert calls({"type": "function", "function": {"name": "read"}}) == ["read"]
    assert calls({"type": "function", "name": "read"}) == ["read"]
    assert calls({"type": "none"}) == calls("none") == []
    assert isinstance(calls({"type": "auto"}), list)
    status, _, body = server.request("POST", "/v1/chat/completions", chat("x", tools=[TOOL], tool_choice={"type": "some"}))
    assert status == 400 and b"tool_choice" in body


def test_allowed_tools(server):
    """The prompt names all tools, the answer calls none but these."""
    def allowed(mode, *names):
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [
            {"type": "function", "function": {"name": n}} for n in names]}}
    both = [TOOL, OTHER]
    opens = server.post("/tokenize", {"prompt": "<tool_call>"})["tokens"][0]
    n_prompt = server.post("/v1/chat/completions", chat("Files?", tools=both, max_tokens=1))["usage"]["prompt_tokens"]
    for seed in range(2):
        for mode, bias in (("required", {}), ("auto", {str(opens): 60})):
            answer = server.post("/v1/chat/completions", chat("Files?", tools=both, tool_choice=allowed(mode, "read"), seed=seed, temperature=1,
                                                              top_k=0, top_p=1, max_tokens=300, parallel_tool_calls=False, logit_bias=bias))
            choice = answer["choices"][0]
            assert [c["function"]["name"] for c in choice["message"]["tool_calls"]][:1] == ["read"], choice
            assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])["path"] in ("a", "b")
            assert answer["usage"]["prompt_tokens"] == n_prompt
    flat = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "read"}]}
    answer = server.post("/v1/responses", {"input": "Files?", "reasoning": {"effort": "none"}, "tools": [
        {"type": "function", **t["function"]} for t in both], "tool_choice": flat, "parallel_tool_calls": False})
    assert [o["name"] for o in answer["output"]] == ["read"]
    for wrong in (allowed("auto"), allowed("none", "read"), allowed("auto", "nothing"), {"type": "allowed_tools"},
                  {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function"}]}}):
        status, _, body = server.request("POST", "/v1/chat/completions", chat("x", tools=both, tool_choice=wrong))
        assert status == 400 and json.loads(body)["error"]["param"] == "tool_choice", body


def test_a_schema_beside_json_object(server):
    """llama.cpp's older form of structured output."""
    answer = server.post("/v1/chat/completions", chat("x", max_tokens=100, response_format={"type": "json_object", "schema": {
        "type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}}))
    assert json.loads(answer["choices"][0]["message"]["content"]) in ({"a": 1}, {"a": 2})


def test_a_prompt_that_is_too_long_is_known_as_such(server):
    """Agents shorten their conversation when they read this: by the code, or by the message's first words."""
    long = "word " * 5000
    for path, body in (("/v1/chat/completions", chat(long)), ("/v1/completions", {"prompt": long}), ("/v1/responses", {"input": long})):
        status, _, data = server.request("POST", path, body)
        error = json.loads(data)["error"]
        assert status == 400 and error["code"] == "context_length_exceeded" and error["message"].startswith("prompt is too long: "), error
    status, _, data = server.request("POST", "/v1/messages", claude(messages=[{"role": "user", "content": long}]))
    error = json.loads(data)["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and error["message"].startswith("prompt is too long: ")


# ---- Addresses, as users write them

@pytest.mark.parametrize("path", ["/v1/chat/completions/", "//v1/chat/completions", "/v1//chat/completions", "/chat/completions"])
def test_addresses_that_are_nearly_right(server, path):
    assert server.post(path, chat("Hello!", max_tokens=2))["choices"]


def test_base_url_with_a_slash(server):
    client = openai.OpenAI(base_url=server.url + "//v1/", api_key="none", max_retries=0)
    assert client.models.list().data[0].id == "tandem-tiny"
    assert server.get("/v1/models/")["data"] and server.get("/models")["data"]


def test_wrong_addresses_are_explained(server):
    for path, hint in (("/v1/v1/messages", "/v1/messages"), ("/v1/chat/completions/v1/chat/completions", "/v1/chat/completions"),
                       ("/api/chat", "/v1/chat/completions"), ("/api/generate", "/v1/chat/completions"), ("/v1", "/v1/chat/completions")):
        status, _, body = server.request("POST", path, chat("x"))
        message = json.loads(body)["error"]["message"]
        assert status == 404 and hint in message and path in message, body
    for path in ("/v1/embeddings", "/v1/audio/speech", "/v1/responses/resp_1"):
        assert server.request("POST", path, {})[0] in (404, 405)


def test_wrong_methods_name_the_right_one(server):
    for method, path, right in (("GET", "/v1/chat/completions", "POST"), ("DELETE", "/v1/models", "GET, HEAD"), ("PUT", "/v1/messages", "POST"),
                                ("OPTIONS", "/v1/chat/completions", "POST")):
        status, headers, _ = server.request(method, path)
        assert status == 405 and headers["Allow"] == right, (method, path, headers)
    for path in ("/", "/v1/models", "/live", "/health", "/version", "/metrics"):
        status, headers, body = server.request("HEAD", path)
        assert status == 200 and not body and int(headers["Content-Length"]) > 0, path
