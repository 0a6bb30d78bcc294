"""An answer whose beginning the request gives: continue_final_message, and Anthropic's assistant message at the end."""
import json
import pathlib

import jinja2
import jinja2.sandbox
import openai
import pytest

from serving import PATIENCE

QUESTION = {"role": "user", "content": "What is the capital of France?"}
TEMPLATE = json.loads(pathlib.Path("models/tandem-tiny/tokenizer_config.json").read_text())["chat_template"]


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


def hugging_face(messages):
    """What transformers' apply_chat_template gives with continue_final_message=True."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
    whole, last = env.from_string(TEMPLATE).render(messages=messages, add_generation_prompt=False), messages[-1]["content"]
    at = whole.rindex(last.strip())
    if whole[at:at + len(last.lstrip())] == last:
        return whole[:at + len(last.lstrip())]
    return whole[:at + len(last.strip())]


@pytest.mark.parametrize("messages", [
    [QUESTION, said("The capital")],
    [QUESTION, said("The capital of ")],
    [QUESTION, said("Paris.", reasoning_content="I know that."), QUESTION, said("As I said: ")],
    [{"role": "system", "content": "Be brief."}, QUESTION, said("It", reasoning_content="An easy one.")],
    [QUESTION, said("<think>\nHm.\n</think>\n\nThe")]], ids=range(5))
def test_prompts_are_hugging_faces(server, messages):
    expected = hugging_face(messages)
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert server.post("/apply-template", body)["prompt"] == expected
    assert server.post("/tokenize", body)["tokens"] == server.post("/tokenize", {"prompt": expected})["tokens"]


def test_goes_on_where_the_message_ends(server):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60 * PATIENCE)
    messages = [QUESTION, said("The capital of")]

    def ask(**more):
        return client.chat.completions.create(model="tandem-tiny", messages=messages, temperature=0, extra_body={"continue_final_message": True}, **more)
    answer = ask()
    prompt = server.post("/apply-template", {"messages": messages, "continue_final_message": True})["prompt"]
    plain = server.post("/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 50})
    assert answer.choices[0].message.content == plain["choices"][0]["text"] == " France is Paris."
    assert answer.usage.prompt_tokens == plain["usage"]["prompt_tokens"] and answer.usage.completion_tokens == plain["usage"]["completion_tokens"]
    assert getattr(answer.choices[0].message, "reasoning_content", None) is None
    assert "".join(c.choices[0].delta.content or "" for c in ask(stream=True)) == " France is Paris."


def test_a_thinking_goes_on(server):
    """A message that has come no further than its thinking is continued there."""
    body = {"messages": [QUESTION, said("", reasoning_content="The user asks")], "continue_final_message": True, "temperature": 0, "max_tokens": 200}
    whole = server.post("/v1/chat/completions", body)["choices"][0]
    assert whole["message"]["reasoning_content"] and whole["message"]["content"] == "The capital of France is Paris."
    events = [json.loads(line[6:]) for line in server.events("/v1/chat/completions", {**body, "stream": True}) if line.startswith("data: {")]
    deltas = [e["choices"][0]["delta"] for e in events]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == whole["message"]["reasoning_content"]
    assert "".join(d.get("content", "") for d in deltas) == whole["message"]["content"]


def test_anthropics_last_message_is_the_answers_beginning(server):
    body = {"model": "tandem-tiny", "max_tokens": 50, "temperature": 0, "messages": [QUESTION, said("The capital of")]}
    answer = server.post("/v1/messages", body)
    assert [b["text"] for b in answer["content"]] == [" France is Paris."] and answer["stop_reason"] == "end_turn"
    usage = answer["usage"]
    blocks = {**body, "messages": [QUESTION, said([{"type": "text", "text": "The capital"}, {"type": "text", "text": " of"}])]}
    assert server.post("/v1/messages", blocks)["content"] == answer["content"]
    counted = server.post("/v1/messages/count_tokens", {"messages": body["messages"]})["input_tokens"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]
    call = said([{"type": "tool_use", "id": "t", "name": "f", "input": {}}])  # is no beginning of an answer
    assert server.post("/v1/messages", {**body, "messages": [QUESTION, call]})["usage"]["input_tokens"] > 0


@pytest.mark.parametrize("field, body", [
    ("messages", {"messages": [QUESTION]}),
    ("messages", {"messages": [QUESTION, said("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": "{}"}}])]}),
    ("messages", {"messages": [QUESTION, said("{")], "response_format": {"type": "json_object"}}),
    ("continue_final_message", {"messages": [QUESTION, said("x")], "add_generation_prompt": True}),
    ("continue_final_message", {"messages": [QUESTION, said("x")], "continue_final_message": "yes"})], ids=range(5))
def test_refuses_what_cannot_go_on(server, field, body):
    status, _, data = server.request("POST", "/v1/chat/completions", {"max_tokens": 2, "continue_final_message": True, **body})
    assert status == 400 and json.loads(data)["error"]["param"] == field, data
