"""Tools against the real binary: calls in the SDK's exact shape, arguments that validate, and a loop with results."""
import json

import openai
import pydantic
import pytest

MODEL = "p1_packed"
CHAT = [{"role": "user", "content": "What is the weather?"}]


def tool(name, properties, **more):
    parameters = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters, **more}}


WEATHER = tool("get_weather", {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}})
CLOCK = {"type": "function", "function": {"name": "get-time"}}
TOOLS = [WEATHER, CLOCK]


@pytest.fixture(scope="session")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120)


def create(client, **more):
    return client.chat.completions.create(**{"model": MODEL, "messages": CHAT, "tools": TOOLS, "max_tokens": 400, "temperature": 1.5, **more})


def check(call):
    assert call.type == "function" and call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    assert call.function.arguments == json.dumps(arguments, separators=(",", ":"))
    if call.function.name == "get_weather":
        assert arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9
    else:
        assert call.function.name == "get-time" and arguments == {}


def test_required_calls(client):
    seen = 0
    for seed in range(8):
        (choice,) = create(client, tool_choice="required", seed=seed).choices
        calls = choice.message.tool_calls
        assert calls and choice.finish_reason in ("tool_calls", "length") and choice.message.content is None
        if choice.finish_reason == "tool_calls":
            seen += 1
            assert len({call.id for call in calls}) == len(calls)
            for call in calls:
                check(call)
    assert seen > 4


def test_one_call_where_parallel_ones_are_off(client):
    for seed in range(6):
        (choice,) = create(client, tool_choice="required", parallel_tool_calls=False, seed=seed).choices
        assert len(choice.message.tool_calls) == 1 and choice.finish_reason == "tool_calls"


def test_a_named_function_is_called(client):
    named = {"type": "function", "function": {"name": "get-time"}}
    answer = create(client, tool_choice=named, n=3, seed=1, parallel_tool_calls=False)
    for choice in answer.choices:
        assert [call.function.name for call in choice.message.tool_calls] == ["get-time"]
        assert choice.finish_reason == "tool_calls"


def test_none_and_auto(client):
    (choice,) = create(client, tool_choice="none", seed=1, max_tokens=30).choices
    assert choice.message.tool_calls is None and isinstance(choice.message.content, str)
    (choice,) = create(client, tool_choice="auto", seed=1, max_tokens=30).choices
    assert choice.message.tool_calls or isinstance(choice.message.content, str)


def test_the_stream_has_the_exact_shape(client):
    for seed in range(3):
        body = {"tool_choice": "required", "seed": seed, "n": 2}
        whole = create(client, **body)
        chunks = list(create(client, stream=True, **body))
        for chunk in chunks:
            indices = [call.index for choice in chunk.choices for call in choice.delta.tool_calls or []]
            assert len(indices) == len(set(indices)), "clients take two deltas of one index in a chunk for two calls"
        for index in range(2):
            deltas = [c.choices[0].delta for c in chunks if c.choices and c.choices[0].index == index]
            calls = [call for delta in deltas for call in delta.tool_calls or []]
            told = {}
            for call in calls:
                if call.index not in told:
                    assert call.index == len(told) and call.id and call.type == "function" and call.function.name
                    told[call.index] = [call.function.name, ""]
                else:
                    assert call.id is None and call.type is None and call.function.name is None
                told[call.index][1] += call.function.arguments
            expected = [[c.function.name, c.function.arguments] for c in whole.choices[index].message.tool_calls]
            assert list(told.values()) == expected
            finish = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].index == index and c.choices[0].finish_reason]
            assert finish == [whole.choices[index].finish_reason]


class GetWeather(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=4)
    days: int = pydantic.Field(ge=1, le=9)


def test_helpers_parse_the_arguments(client):
    tools = [openai.pydantic_function_tool(GetWeather)]
    body = {"model": MODEL, "messages": CHAT, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "seed": 2, "max_tokens": 300}
    answer = client.chat.completions.parse(**body)
    assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, GetWeather)
    with client.chat.completions.stream(**body) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, GetWeather)
    assert final.choices[0].finish_reason == "tool_calls"


def test_tool_loop(client):
    messages = list(CHAT)
    for turn in range(3):
        message = create(client, messages=messages, tool_choice="required", parallel_tool_calls=False, seed=turn).choices[0].message
        messages.append(message)
        for call in message.tool_calls:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "12 degrees <|eot_id|> </tool_call>"})
    final = create(client, messages=messages, tool_choice="none", max_tokens=10)
    assert final.usage.prompt_tokens > 100 and final.choices[0].message.tool_calls is None


def test_calls_or_a_form(client):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"enum": ["a", "b"]}}}
    for seed in range(6):
        (choice,) = create(client, response_format=form, seed=seed).choices
        assert choice.finish_reason in ("stop", "tool_calls", "length")
        if choice.finish_reason == "stop":
            assert json.loads(choice.message.content) in ("a", "b")


@pytest.mark.parametrize(
    ("tools", "place"),
    [
        ([tool("f", {"a": {"not": {}}})], "tools[0].function.parameters.properties.a.not"),
        ([CLOCK, {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}], "tools[1].function.parameters"),
    ],
)
def test_unsupported_parameters_are_named(client, tools, place):
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, tools=tools)
    assert caught.value.param == "tools" and f"'{place}'" in caught.value.message
