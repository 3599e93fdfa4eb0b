"""The Responses API through the official SDK: whole answers, raw events, the streaming helper, parsing, tools."""
import asyncio
import json

import openai
import pydantic
import pytest

MODEL = "p1_packed"
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Point(pydantic.BaseModel):
    x: int = pydantic.Field(ge=0, le=99)
    color: str = pydantic.Field(pattern="^(red|blue)$")


@pytest.fixture(scope="session")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120)


def create(client, **more):
    return client.responses.create(**{"model": MODEL, "input": "Say something.", "temperature": 0, "max_output_tokens": 24, **more})


def test_a_whole_answer(client):
    answer = create(client, instructions="You are brief.", metadata={"a": "b"}, store=True, user="u1")
    assert answer.id.startswith("resp_") and answer.object == "response" and answer.model == MODEL
    assert answer.status in ("completed", "incomplete") and isinstance(answer.output_text, str)
    assert answer.instructions == "You are brief." and answer.metadata == {"a": "b"} and answer.user == "u1"
    usage = answer.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens and usage.output_tokens <= 24
    assert usage.output_tokens_details.reasoning_tokens == 0 and usage.input_tokens_details.cached_tokens >= 0
    assert answer.previous_response_id is None and answer.tools == [] and answer._request_id


def test_it_is_the_same_generation_as_chat(client):
    answer = create(client, instructions="You are brief.")
    messages = [{"role": "developer", "content": "You are brief."}, {"role": "user", "content": "Say something."}]
    chat = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=24)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.usage.input_tokens == chat.usage.prompt_tokens


def test_a_conversation_goes_on_with_the_output_items(client):
    first = create(client)
    items = [{"role": "user", "content": "Say something."}, *first.output, {"role": "user", "content": "More."}]
    answer = create(client, input=items)
    assert answer.usage.input_tokens > first.usage.input_tokens


def test_raw_events(client):
    whole = create(client)
    events = list(create(client, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:-1] == ["output_text.done", "content_part.done", "output_item.done"]
    assert kinds[-1] == whole.status and set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text and events[-1].response.usage.output_tokens == whole.usage.output_tokens


def test_the_streaming_helper(client):
    with client.responses.stream(model=MODEL, input="Hello", temperature=0, extra_body={"guided_regex": "[a-z]{1,8}"}) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.status == "completed" and final.output_text == snapshots[-1]


def test_stream_that_ends_incomplete(client):
    """The last event is `response.incomplete`, as with OpenAI; the SDK's `get_final_response` accepts `response.completed` alone."""
    with client.responses.stream(model=MODEL, input="Hello", max_output_tokens=3, extra_body={"ignore_eos": True}) as stream:
        last = list(stream)[-1]
        with pytest.raises(RuntimeError, match="response.completed"):
            stream.get_final_response()
    assert last.type == "response.incomplete" and last.response.status == "incomplete"
    assert last.response.incomplete_details.reason == "max_output_tokens" and last.response.usage.output_tokens == 3


def test_async_stream(server):
    async def read():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
        async with client.responses.stream(model=MODEL, input="Hi", extra_body={"guided_regex": "[a-z]{1,8}"}) as stream:
            async for _ in stream:
                pass
            return await stream.get_final_response()

    assert asyncio.run(read()).status == "completed"


def test_parse(client):
    answer = client.responses.parse(model=MODEL, input="A point.", text_format=Point, temperature=1.5, max_output_tokens=400)
    point = answer.output_parsed
    assert isinstance(point, Point) and 0 <= point.x <= 99 and point.color in ("red", "blue")
    assert answer.text.format.type == "json_schema"
    with client.responses.stream(model=MODEL, input="A point.", text_format=Point, max_output_tokens=400) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_response().output_parsed, Point)
    free = create(client, text={"format": {"type": "json_object"}}, max_output_tokens=300, temperature=1)
    if free.status == "completed":
        assert isinstance(json.loads(free.output_text), dict)


def test_tools(client):
    answer = create(client, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_output_tokens=200)
    (call,) = answer.output
    assert call.type == "function_call" and call.name == "get_weather" and call.call_id.startswith("call_") and call.status == "completed"
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo") and answer.status == "completed"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    after = create(client, input=[{"role": "user", "content": "Weather?"}, call, result], tools=[TOOL])
    assert after.usage.input_tokens > answer.usage.input_tokens
    named = create(client, tools=[TOOL], tool_choice={"type": "function", "name": "get_weather"}, max_output_tokens=200)
    assert {item.name for item in named.output if item.type == "function_call"} == {"get_weather"}


def test_streamed_tools(client):
    # Room for many calls: each may be followed by another.
    body = {"model": MODEL, "input": "Weather?", "tools": [TOOL], "tool_choice": "required", "temperature": 1.5, "max_output_tokens": 1500}
    with client.responses.stream(**body) as stream:
        events = list(stream)
        final = stream.get_final_response()
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert len(done) == len(final.output) > 0
    for item, event in zip(final.output, done):
        pieces = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta" and e.item_id == item.id)
        assert pieces == item.arguments == event.arguments and item.parsed_arguments["city"] in ("Rome", "Oslo")


def test_logprobs(client):
    answer = create(client, include=["message.output_text.logprobs"], top_logprobs=3)
    entries = answer.output[0].content[0].logprobs
    assert len(entries) == answer.usage.output_tokens and all(len(e.top_logprobs) == 3 and e.logprob <= 0 for e in entries)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "word " * 9000}, "input"),
    ],
)
def test_errors(client, change, param):
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, **change)
    assert caught.value.param == param


def test_nothing_is_kept(client):
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError):
        client.responses.delete("resp_1")


def test_the_content_filter_and_keys_hold_here_too(start, tmp_path):
    keys, rules = tmp_path / "keys", tmp_path / "filter.toml"
    keys.write_text("one:secret\n")
    rules.write_text('[[rule]]\nid = "r"\ncategory = "c"\nmatch = "literal"\npatterns = ["aurora"]\ndirection = "input"\naction = "block"\nseverity = "high"\n')
    server = start("--api-key-file", str(keys), "--content-filter", str(rules))
    with pytest.raises(openai.AuthenticationError):
        create(openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0))
    with pytest.raises(openai.BadRequestError) as caught:
        create(openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0), input="project aurora")
    assert caught.value.code == "content_filtered" and caught.value.param == "input"
