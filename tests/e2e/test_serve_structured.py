"""Answers of a given form: JSON, JSON Schemas and tool calls, whatever the model would have said."""
import json

import anthropic
import openai
import pytest

from serving import chat

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "size": {"enum": ["small", "big"]},
        "population": {"type": "integer", "minimum": 1},
        "area": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 1, "maxItems": 2},
    },
    "required": ["city", "size", "population", "area", "tags"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a place.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 15}, "days": {"enum": [1, 2, 3]}},
                   "required": ["city", "days"]}}}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}


def check(value):
    assert list(value) == SCHEMA["required"]
    assert isinstance(value["city"], str) and len(value["city"]) <= 20 and value["size"] in ("small", "big")
    assert isinstance(value["population"], int) and value["population"] >= 1
    assert value["area"] is None or isinstance(value["area"], (int, float))
    assert 1 <= len(value["tags"]) <= 2 and all(isinstance(t, str) and len(t) <= 6 for t in value["tags"])


def schema_format(schema=SCHEMA):
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


@pytest.mark.parametrize("temperature,think", [(0, False), (1, False), (5, False), (1, True)])
def test_json_schema(server, temperature, think):
    answer = server.post("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "Describe Paris."}], "temperature": temperature, "top_p": 1, "top_k": 0, "seed": 3,
        "n": 3, "max_tokens": 1500, "chat_template_kwargs": {"enable_thinking": think}, "thinking_budget": 200,
        "response_format": schema_format()})
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop", choice
        check(json.loads(choice["message"]["content"]))


def test_json_object_and_stream(client, server):
    body = chat("Give me JSON.", temperature=1, seed=5, max_tokens=300, response_format={"type": "json_object"})
    answer = server.post("/v1/chat/completions", body)["choices"][0]
    if answer["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["message"]["content"]), dict)
    assert answer["message"]["content"].startswith("{")
    chunks = client.chat.completions.create(model="tandem-tiny", stream=True, response_format=schema_format(), temperature=0,
                                            messages=[{"role": "user", "content": "Describe Rome."}],
                                            extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    check(json.loads("".join(c.choices[0].delta.content or "" for c in chunks)))


def test_responses_and_messages_too(client, server):
    answer = client.responses.create(model="tandem-tiny", input="Describe Rome.", temperature=0, reasoning={"effort": "none"},
                                     text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}})
    check(json.loads(answer.output_text))
    body = {"messages": [{"role": "user", "content": "Describe Rome."}], "max_tokens": 800, "temperature": 0,
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    check(json.loads(server.post("/v1/messages", body)["content"][0]["text"]))


def test_what_is_not_supported_is_refused_by_name(client):
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="tandem-tiny", messages=[{"role": "user", "content": "x"}],
                                       response_format=schema_format({"type": "object", "properties": {
                                           "a": {"type": "string", "pattern": "^(?!x)"}}}))
    assert "pattern" in e.value.body["message"] and "schema.a" in e.value.body["message"]
    assert e.value.body["param"] == "response_format"


def arguments_of(call):
    value = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert set(value) == {"city", "days"} and len(value["city"]) <= 15 and value["days"] in (1, 2, 3)
    else:
        assert call.function.name == "get_time" and value == {}
    return value


OFF = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize("stream", [False, True])
def test_named_tool(client, stream):
    asked = dict(model="tandem-tiny", messages=[{"role": "user", "content": "Weather?"}], tools=[WEATHER, TIME], temperature=0,
                 tool_choice={"type": "function", "function": {"name": "get_weather"}}, extra_body=OFF)
    if not stream:
        choice = client.chat.completions.create(**asked).choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert len(choice.message.tool_calls) == 1 and choice.message.tool_calls[0].id.startswith("call_")
        arguments_of(choice.message.tool_calls[0])
        return
    chunks = [c.choices[0] for c in client.chat.completions.create(stream=True, **asked)]
    deltas = [d for c in chunks for d in c.delta.tool_calls or []]
    assert [d.index for d in deltas] == [0] * len(deltas) and deltas[0].id and deltas[0].function.name == "get_weather"
    assert not any(d.id or d.function.name for d in deltas[1:]) and len(deltas) > 3
    assert set(json.loads("".join(d.function.arguments for d in deltas))) == {"city", "days"}
    assert chunks[-1].finish_reason == "tool_calls" and not any(c.delta.content for c in chunks)


def test_required_tools_in_parallel(client):
    for seed in range(2):
        choice = client.chat.completions.create(
            model="tandem-tiny", messages=[{"role": "user", "content": "Weather and time?"}], tools=[WEATHER, TIME], temperature=2,
            seed=seed, tool_choice="required", max_tokens=120, extra_body=OFF).choices[0]
        for call in choice.message.tool_calls if choice.finish_reason == "tool_calls" else choice.message.tool_calls[:1]:
            arguments_of(call)
        assert len({c.id for c in choice.message.tool_calls}) == len(choice.message.tool_calls)
    one = client.chat.completions.create(
        model="tandem-tiny", messages=[{"role": "user", "content": "Weather and time?"}], tools=[WEATHER, TIME], temperature=2,
        seed=1, tool_choice="required", parallel_tool_calls=False, extra_body=OFF).choices[0]
    assert len(one.message.tool_calls) == 1 and one.finish_reason == "tool_calls"


def test_auto_and_none(client):
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(model="tandem-tiny", messages=[{"role": "user", "content": "Hello!"}],
                                                tools=[WEATHER], temperature=0, tool_choice=choice, max_tokens=40, extra_body=OFF)
        assert not answer.choices[0].message.tool_calls and answer.choices[0].message.content
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tandem-tiny", messages=[{"role": "user", "content": "x"}], tool_choice="required")
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="tandem-tiny", messages=[{"role": "user", "content": "x"}], tools=[TIME],
                                       tool_choice={"type": "function", "function": {"name": "nothing"}})
    assert "nothing" in e.value.body["message"]


def test_a_strict_tool_is_written_by_its_schema(server):
    """The model is made to open a call by a bias; what follows is the schema's."""
    tool = json.loads(json.dumps(WEATHER))
    tool["function"]["strict"] = True
    open_call = server.post("/tokenize", {"prompt": "<tool_call>"})["tokens"]
    assert len(open_call) == 1
    answer = server.post("/v1/chat/completions", chat(
        "Weather?", tools=[tool], max_tokens=120, logit_bias={str(open_call[0]): 60}))["choices"][0]
    calls = answer["message"].get("tool_calls")
    assert calls and set(json.loads(calls[0]["function"]["arguments"])) == {"city", "days"}


def test_tool_loop_reuses_pages(client):
    messages = [{"role": "system", "content": "You help. " * 40}, {"role": "user", "content": "Weather?"}]
    asked = dict(model="tandem-tiny", tools=[WEATHER], temperature=0, extra_body=OFF)
    first = client.chat.completions.create(messages=messages, tool_choice="required", parallel_tool_calls=False, **asked)
    call = first.choices[0].message.tool_calls[0]
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    second = client.chat.completions.create(messages=messages, max_tokens=20, **asked)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 40


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_tools(server, stream):
    claude = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60)
    asked = dict(model="tandem-tiny", max_tokens=300, messages=[{"role": "user", "content": "Weather?"}], extra_body={"temperature": 0},
                 tools=[{"name": "get_weather", "description": "d", "input_schema": WEATHER["function"]["parameters"]}],
                 tool_choice={"type": "tool", "name": "get_weather"})
    if stream:
        with claude.messages.stream(**asked) as s:
            message = s.get_final_message()
    else:
        message = claude.messages.create(**asked)
    assert message.stop_reason == "tool_use" and [b.type for b in message.content] == ["tool_use"]
    assert set(message.content[0].input) == {"city", "days"} and message.content[0].id.startswith("toolu_")


@pytest.mark.parametrize("stream", [False, True])
def test_responses_tools(client, stream):
    asked = dict(model="tandem-tiny", input="Weather?", temperature=0, reasoning={"effort": "none"},
                 tools=[{"type": "function", **WEATHER["function"]}], tool_choice={"type": "function", "name": "get_weather"})
    if stream:
        events = list(client.responses.create(stream=True, **asked))
        fragments = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
        done = [e for e in events if e.type == "response.function_call_arguments.done"]
        assert len(done) == 1 and done[0].arguments == fragments
        answer = events[-1].response
    else:
        answer = client.responses.create(**asked)
    assert [o.type for o in answer.output] == ["function_call"]
    assert set(json.loads(answer.output[0].arguments)) == {"city", "days"}
