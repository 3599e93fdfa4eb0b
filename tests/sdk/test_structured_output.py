"""Structured output against the real binary: a random model at high temperature, so that only the grammar makes it valid."""
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Optional

import jsonschema
import openai
import pydantic
import pytest

CHAT = [{"role": "user", "content": "Answer in JSON."}]
MODEL = "p1_packed"


@pytest.fixture(scope="session")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120)


def random_schema(rng, depth=0):
    """A schema of supported features whose values are short, so that most answers end."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format"]
    if depth < 3:
        kinds += ["object", "array", "anyOf", "tuple", "map"] * 2
    match rng.choice(kinds):
        case "string":
            low = rng.randint(0, 2)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 4)}
        case "integer":
            low = rng.randint(-1000, 1000)
            return {"type": "integer", "minimum": low, "exclusiveMaximum": low + rng.randint(1, 500)}
        case "number":
            low = rng.randint(-50, 50)
            return {"type": "number", "minimum": low, "maximum": low + rng.randint(1, 9)}
        case "enum":
            return {"enum": rng.sample(["a", "b\"", "ä\n", 1, 2.5, None, True, [1], {"x": "y"}], rng.randint(1, 4))}
        case "const":
            return {"const": rng.choice(["x", 7, False, {"k": [1, "2"]}])}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-z]{1,4}$", "^(ab|cd)-[0-9]{2}$", "^\\d\\w?$"])}
        case "format":
            return {"type": "string", "format": rng.choice(["date", "uuid", "ipv4", "time"])}
        case "object":
            names = rng.sample(["name", "a b", "q\"", "ключ", "n1", "n2"], rng.randint(1, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth + 1) for name in names},
                "required": rng.sample(names, rng.randint(0, len(names))),
                "additionalProperties": False,
            }
        case "map":
            return {"type": "object", "patternProperties": {"^k[0-9]$": random_schema(rng, depth + 1)}, "additionalProperties": False, "maxProperties": 2}
        case "array":
            low = rng.randint(0, 2)
            return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": low, "maxItems": low + rng.randint(0, 2)}
        case "tuple":
            return {"type": "array", "prefixItems": [random_schema(rng, depth + 1) for _ in range(2)], "items": False, "minItems": 2}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
        case simple:
            return {"type": simple}


def ask(client, schema, **more):
    body = {"model": MODEL, "messages": CHAT, "max_tokens": 400, **more}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    return client.chat.completions.create(response_format=form, **body).choices


def test_random_schemas_always_validate(client):
    rng = random.Random(5)
    cases = [(random_schema(rng), seed) for seed in range(200)]
    settings = [{"temperature": 1, "n": 2}, {"temperature": 2}, {"temperature": 2, "stop": ['"', "1"]}, {"temperature": 1.5, "max_tokens": 5}]

    def check(case):
        schema, seed = case
        finished = []
        for more in settings:
            for choice in ask(client, schema, seed=seed, **more):
                finished.append(choice.finish_reason == "stop")
                if finished[-1]:
                    value = json.loads(choice.message.content)
                    jsonschema.Draft202012Validator(schema).validate(value)
                else:
                    assert choice.finish_reason == "length"
        return finished

    with ThreadPoolExecutor(4) as pool:
        finished = list(pool.map(check, cases))
    assert sum(map(any, finished)) > 190, "most schemas should see an answer end"
    assert not all(map(all, finished)), "stop strings and limits should have cut some"


def test_a_stop_string_or_a_limit_is_a_cut_not_an_end(client):
    schema = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["a", "b"], "additionalProperties": False}
    (choice,) = ask(client, schema, stop=['"b"'])
    assert (choice.message.content, choice.finish_reason) == ('{"a":1,', "length")
    (choice,) = ask(client, schema, max_tokens=3)
    assert choice.finish_reason == "length"
    (choice,) = ask(client, schema, extra_body={"ignore_eos": True, "min_tokens": 300})
    assert (choice.message.content, choice.finish_reason) == ('{"a":1,"b":2}', "stop")


def test_same_seed_same_answer_alone_and_in_a_crowd(client):
    schema = {"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 3, "maxItems": 6}
    alone = ask(client, schema, seed=3, temperature=2)[0].message.content
    with ThreadPoolExecutor(4) as pool:
        crowd = pool.map(lambda _: ask(client, schema, seed=3, temperature=2, extra_body={"cache_prompt": False}), range(6))
        assert {choices[0].message.content for choices in crowd} == {alone}


def test_json_object_streams(client):
    body = {"model": MODEL, "messages": CHAT, "seed": 4, "max_tokens": 300, "response_format": {"type": "json_object"}}
    whole = client.chat.completions.create(**body).choices[0]
    chunks = list(client.chat.completions.create(stream=True, **body))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.message.content
    assert whole.message.content.startswith("{")


def test_guided_extensions(client):
    create = lambda **extra: client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=100, seed=1, temperature=2, extra_body=extra).choices[0].message.content
    assert re.fullmatch("[a-f]{3}-[0-9]{2,4}", create(guided_regex="[a-f]{3}-[0-9]{2,4}"))
    assert create(guided_choice=["positive", "negative"]) in ("positive", "negative")
    assert json.loads(create(guided_json={"enum": [1, 2]})) in (1, 2)
    assert create(guided_grammar='start: "<" /[ab]/ ">"') in ("<a>", "<b>")
    assert create(structured_outputs={"choice": ["yes"]}) == "yes"
    text = client.completions.create(model=MODEL, prompt="Is it?", max_tokens=20, extra_body={"guided_choice": ["yes", "no"]})
    assert text.choices[0].text in ("yes", "no") and text.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"properties": {"a": {"not": {}}}}, "response_format.json_schema.schema.properties.a.not"),
        ({"type": "array", "uniqueItems": True}, "response_format.json_schema.schema.uniqueItems"),
        ({"$ref": "https://example.com/s"}, "response_format.json_schema.schema.$ref"),
        ({"type": "string", "description": "x" * 70000}, "response_format.json_schema.schema"),
    ],
)
def test_unsupported_schemas_are_named(client, schema, place):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, schema)
    assert caught.value.param == "response_format" and caught.value.code == "unsupported_parameter"
    assert f"'{place}'" in caught.value.message


class Step(pydantic.BaseModel):
    kind: Literal["add", "multiply"]
    value: int = pydantic.Field(ge=0, le=99)


class Plan(pydantic.BaseModel):
    steps: list[Step] = pydantic.Field(min_length=1, max_length=2)
    note: Optional[Literal["fine", "odd"]]


def test_parse_gives_pydantic_models(client):
    for seed in range(3):
        answer = client.chat.completions.parse(model=MODEL, messages=CHAT, response_format=Plan, seed=seed, temperature=2, max_tokens=300)
        assert isinstance(answer.choices[0].message.parsed, Plan)


def test_stream_helper_parses(client):
    with client.chat.completions.stream(model=MODEL, messages=CHAT, response_format=Plan, seed=8, max_tokens=300) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Plan)


def test_a_cut_answer_raises_in_parse(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=CHAT, response_format=Plan, max_tokens=3)
