"""Anthropic's /v1/messages and OpenAI's /v1/responses, through their own libraries."""
import anthropic
import openai
import pytest

from serving import PATIENCE

PARIS = "The capital of France is Paris."
QUESTION = "What is the capital of France?"
COLD = {"temperature": 0}  # the library does not know the field any more


# ---- Anthropic

@pytest.fixture(scope="module")
def claude(server):
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60 * PATIENCE)


def message(claude, content=QUESTION, **more):
    return claude.messages.create(model="tandem-tiny", max_tokens=more.pop("max_tokens", 200), extra_body=COLD,
                                  messages=[{"role": "user", "content": content}], **more)


def test_message(claude):
    answer = message(claude)
    assert [b.type for b in answer.content] == ["text"] and answer.content[0].text == PARIS
    assert answer.stop_reason == "end_turn" and answer.role == "assistant"
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens > 10 and answer.usage.output_tokens > 5
    assert message(claude, [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
                   ).content[0].text == PARIS


def test_message_ends(claude):
    answer = message(claude, max_tokens=3)
    assert answer.stop_reason == "max_tokens" and answer.content[0].text == "The capital of"
    answer = message(claude, stop_sequences=["is Pa"])
    assert answer.stop_reason == "stop_sequence" and answer.stop_sequence == "is Pa"
    assert answer.content[0].text == "The capital of France "


def test_message_stream(claude):
    with claude.messages.stream(model="tandem-tiny", max_tokens=200, extra_body=COLD,
                                thinking={"type": "enabled", "budget_tokens": 1024},
                                messages=[{"role": "user", "content": QUESTION}]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert [b.type for b in final.content] == ["thinking", "text"]
    assert final.content[0].thinking and final.content[1].text == PARIS and final.stop_reason == "end_turn"
    whole = message(claude, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [b.model_dump(exclude={"signature"}) for b in whole.content] == \
        [b.model_dump(exclude={"signature"}, include=set(w.model_dump()) - {"signature"}) for b, w in
         zip(final.content, whole.content)]
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_thinking_budget(claude):
    answer = message(claude, thinking={"type": "enabled", "budget_tokens": 4})
    assert len(answer.content[0].thinking.split()) <= 4 and answer.content[1].text


def test_system_and_history(server, claude):
    system = [{"type": "text", "text": "You are a helpful assistant. " * 30}]
    first = message(claude, system=system)
    history = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": first.content},
               {"role": "user", "content": "And of Spain?"}]
    second = claude.messages.create(model="tandem-tiny", max_tokens=50, extra_body=COLD, system=system, messages=history)
    assert second.usage.cache_read_input_tokens >= 128


def test_count_tokens(claude):
    count = claude.messages.count_tokens(model="tandem-tiny", messages=[{"role": "user", "content": QUESTION}])
    used = message(claude).usage
    assert count.input_tokens == used.input_tokens + used.cache_read_input_tokens


def test_tool_history_is_rendered_like_openais(server, claude):
    tools = [{"name": "weather", "description": "d", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]
    n = claude.messages.count_tokens(model="tandem-tiny", tools=tools, messages=[
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": [{"type": "text", "text": "I look."},
                                          {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "sunny"}]}]).input_tokens
    same = server.post("/tokenize", {
        "tools": [{"type": "function", "function": {"name": "weather", "description": "d",
                                                    "parameters": tools[0]["input_schema"]}}],
        "enable_thinking": False,
        "messages": [{"role": "user", "content": "Weather?"},
                     {"role": "assistant", "content": "I look.", "tool_calls": [
                         {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}]},
                     {"role": "tool", "tool_call_id": "t1", "content": "sunny"}]})["count"]
    assert n == same


def test_anthropic_errors(claude):
    with pytest.raises(anthropic.NotFoundError) as e:
        claude.messages.create(model="claude", max_tokens=5, messages=[{"role": "user", "content": "x"}])
    assert e.value.body["type"] == "error" and e.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError):
        message(claude, [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}])
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(model="tandem-tiny", max_tokens=5, messages=[])


# ---- Responses

@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60 * PATIENCE)


OFF = {"reasoning": {"effort": "none"}}


def test_response(client):
    answer = client.responses.create(model="tandem-tiny", input=QUESTION, temperature=0, **OFF)
    assert answer.output_text == PARIS and answer.status == "completed" and answer.object == "response"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    answer = client.responses.create(model="tandem-tiny", input=QUESTION, temperature=0, max_output_tokens=3, **OFF)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"


def test_response_stream(client):
    events = list(client.responses.create(model="tandem-tiny", input=QUESTION, temperature=0, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type for e in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert kinds.index("response.reasoning_text.delta") < kinds.index("response.output_text.delta")
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == PARIS
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 2
    final = events[-1].response
    assert final.output_text == PARIS and [o.type for o in final.output] == ["reasoning", "message"]
    with client.responses.stream(model="tandem-tiny", input=QUESTION, temperature=0, **OFF) as stream:
        assert stream.get_final_response().output_text == PARIS


def test_response_history(client):
    items = [{"role": "user", "content": QUESTION}]
    first = client.responses.create(model="tandem-tiny", instructions="Be brief. " * 60, input=items, temperature=0)
    items += first.output + [{"role": "user", "content": [{"type": "input_text", "text": "And of Spain?"}]}]
    second = client.responses.create(model="tandem-tiny", instructions="Be brief. " * 60, input=items, temperature=0)
    assert second.usage.input_tokens_details.cached_tokens >= 96
    items += [{"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
              {"type": "function_call_output", "call_id": "c1", "output": "done"}]
    assert client.responses.create(model="tandem-tiny", input=items, temperature=0, max_output_tokens=5).output


def test_response_errors(client):
    with pytest.raises(openai.BadRequestError) as e:
        client.responses.create(model="tandem-tiny", input=QUESTION, previous_response_id="resp_1")
    assert e.value.body["param"] == "previous_response_id"
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="tandem-tiny", input=[{"type": "computer_call", "x": 1}])
