"""What users send: schemas made by Pydantic, the strict schemas of OpenAI's client. Whatever the model would say, at any
temperature, what comes out is valid by jsonschema and by Pydantic, unless it ran out of tokens."""
import datetime
import enum
import json
import uuid
from typing import Annotated, Literal, Optional, Union

import jsonschema
import openai
import pydantic
import pytest
from pydantic import BaseModel, Field

from serving import Server

OFF = {"chat_template_kwargs": {"enable_thinking": False}}


class Colour(enum.Enum):
    red = "red"
    green = "green"


class Address(BaseModel):
    """Where somebody lives."""
    street: Annotated[str, Field(max_length=12, description="without the number")]
    zip: Annotated[str, Field(pattern=r"^\d{5}(-\d{4})?$")]
    country: Literal["FR", "DE", "IT"] = "FR"


class Person(BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: Annotated[str, Field(min_length=1, max_length=10, pattern=r"^[A-Z][a-z]*$")]
    age: Annotated[int, Field(ge=0, le=120)]
    height: Annotated[float, Field(gt=0.5, lt=2.5)]
    email: Annotated[str, Field(json_schema_extra={"format": "email"}, max_length=40)]
    nick: Optional[Annotated[str, Field(max_length=5)]] = None
    home: Address
    work: Optional[Address]
    colours: Annotated[set[Colour], Field(min_length=1)]


class Times(BaseModel):
    at: datetime.datetime
    day: datetime.date
    id: uuid.UUID
    flag: bool


class Tree(BaseModel):
    value: Annotated[int, Field(ge=-3, le=3)]
    children: Annotated[list["Tree"], Field(max_length=2)]


class Chain(BaseModel):
    n: Annotated[int, Field(multiple_of=5, ge=0, le=100)]
    next: Optional["Chain"]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(gt=0, lt=10)]


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: Annotated[list[Annotated[str, Field(max_length=4)]], Field(max_length=3)]


class Zoo(BaseModel):
    pets: Annotated[list[Annotated[Union[Cat, Dog], Field(discriminator="kind")]], Field(min_length=1, max_length=3)]
    pair: tuple[int, Annotated[str, Field(max_length=3)]]
    counts: Annotated[dict[Annotated[str, Field(pattern="^[a-z]{1,4}$")], Annotated[int, Field(ge=0, le=9)]], Field(max_length=3)]
    either: Union[Annotated[int, Field(ge=1, le=5)], bool, None]
    price: Annotated[float, Field(ge=0, le=100)]


MODELS = [Person, Times, Tree, Chain, Zoo]


def ask(server, schema, **fields):
    return server.post("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "Make one up."}], "top_p": 1, "top_k": 0, "max_tokens": 300, **OFF,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}, **fields})


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_pydantic(server, model):
    schema = model.model_json_schema()
    whole = 0
    for temperature, seed in [(0, 0), (1, 1), (5, 2), (50, 3)]:
        answer = ask(server, schema, temperature=temperature, seed=seed, n=1 if temperature == 0 else 4)
        for choice in answer["choices"]:
            assert choice["finish_reason"] in ("stop", "length")
            if choice["finish_reason"] == "length":
                continue
            text = choice["message"]["content"]
            jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator,
                                format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
            model.model_validate_json(text)
            whole += 1
    assert whole >= 4, whole


def test_parse_of_openais_client(client):
    """chat.completions.parse makes the strict schema itself: every property required, none besides."""
    for seed, model in enumerate((Cat, Person, Dog)):
        parsed = client.chat.completions.parse(model="tandem-tiny", messages=[{"role": "user", "content": "Who?"}], temperature=1, seed=seed,
                                               response_format=model, max_tokens=1000, extra_body=OFF)
        assert isinstance(parsed.choices[0].message.parsed, model)
    parsed = client.responses.parse(model="tandem-tiny", input="When?", text_format=Times, temperature=1, reasoning={"effort": "none"})
    assert isinstance(parsed.output_parsed, Times)


def test_a_pydantic_tool(client):
    tool = openai.pydantic_function_tool(Person)
    for seed in range(2):
        parsed = client.chat.completions.parse(model="tandem-tiny", messages=[{"role": "user", "content": "Who?"}], tools=[tool],
                                               tool_choice="required", parallel_tool_calls=False, temperature=1.5, seed=seed, max_tokens=800,
                                               extra_body=OFF)
        call = parsed.choices[0].message.tool_calls[0]
        assert isinstance(call.function.parsed_arguments, Person)


def test_the_same_bits_from_a_cold_and_a_warm_automaton(server):
    """What others asked before does not change what is written."""
    schema = {**Dog.model_json_schema(), "title": "first"}
    first = [ask(server, schema, temperature=2, seed=s)["choices"][0]["message"]["content"] for s in range(2)]
    again = [ask(server, schema, temperature=2, seed=s)["choices"][0]["message"]["content"] for s in range(2)]
    fresh = Server()
    try:
        cold = [ask(fresh, schema, temperature=2, seed=s)["choices"][0]["message"]["content"] for s in (1, 0)][::-1]
    finally:
        assert fresh.stop() == 0
    assert first == again == cold
