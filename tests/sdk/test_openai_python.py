"""The official Python SDK, unmodified, against the real binary."""
import asyncio

import openai
import pytest

CHAT = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Say something."}]
GREEDY = {"model": "p1_packed", "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="session")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def test_models(client):
    models = client.models.list().data
    assert [m.id for m in models] == ["p1_packed"]
    assert models[0].object == "model" and models[0].created > 0 and models[0].owned_by
    assert client.models.retrieve("p1_packed").id == "p1_packed"


def test_model_names_may_hold_a_slash(start):
    server = start("--model-name", "microsoft/bitnet", "--model-name", "gpt-4o")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    assert client.models.retrieve("microsoft/bitnet").id == "microsoft/bitnet"
    answer = client.chat.completions.create(model="gpt-4o", messages=CHAT, max_tokens=4, temperature=0)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_chat(client):
    answer = client.chat.completions.create(messages=CHAT, **GREEDY)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == "p1_packed"
    choice = answer.choices[0]
    assert choice.index == 0 and choice.message.role == "assistant" and isinstance(choice.message.content, str)
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0
    assert answer._request_id


def test_chat_stream_equals_the_whole(client):
    whole = client.chat.completions.create(messages=CHAT, **GREEDY)
    chunks = list(client.chat.completions.create(messages=CHAT, stream=True, stream_options={"include_usage": True}, **GREEDY))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len({c.id for c in chunks}) == 1 and len({c.created for c in chunks}) == 1
    assert [c.choices[0].delta.role for c in chunks if c.choices and c.choices[0].delta.role] == ["assistant"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert chunks[-1].system_fingerprint == whole.system_fingerprint
    finish = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert finish == [whole.choices[0].finish_reason]


def test_stream_helper(client):
    with client.chat.completions.stream(messages=CHAT, n=3, seed=7, model="p1_packed", max_tokens=8) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "chunk"]
    assert [c.index for c in snapshots[-1].choices] == [0, 1, 2]
    assert all(c.message.role == "assistant" and c.finish_reason for c in snapshots[-1].choices)


def test_choices_are_drawn_independently_and_repeatably(client):
    ask = lambda: client.chat.completions.create(messages=CHAT, n=4, seed=11, model="p1_packed", max_tokens=12, extra_body={"ignore_eos": True})
    first, second = ask(), ask()
    texts = [c.message.content for c in first.choices]
    assert texts == [c.message.content for c in second.choices]
    assert len(set(texts)) > 1


def test_logprobs(client):
    answer = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=5, **GREEDY)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 5
        assert entry.logprob == entry.top_logprobs[0].logprob == max(t.logprob for t in entry.top_logprobs)
        assert entry.logprob <= 0


def test_stop_strings_never_leave(client):
    whole = client.chat.completions.create(messages=CHAT, max_tokens=40, model="p1_packed", seed=3, extra_body={"ignore_eos": True})
    text = whole.choices[0].message.content
    stop = text[10:13]
    body = {"messages": CHAT, "max_tokens": 40, "model": "p1_packed", "seed": 3, "stop": [stop], "extra_body": {"ignore_eos": True}}
    cut = client.chat.completions.create(**body)
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    streamed = "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(stream=True, **body))
    assert streamed == cut.choices[0].message.content


def test_completions(client):
    answer = client.completions.create(model="p1_packed", prompt=["One", "Two"], n=2, max_tokens=5, seed=1)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion"
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    tokens = client.completions.create(model="p1_packed", prompt=[500, 69, 198], max_tokens=3, temperature=0)
    assert tokens.usage.prompt_tokens == 3
    arrays = client.completions.create(model="p1_packed", prompt=[[500, 69], [500, 83]], max_tokens=1, temperature=0)
    assert len(arrays.choices) == 2 and arrays.usage.prompt_tokens == 4


def test_completions_echo_with_logprobs(client):
    answer = client.completions.create(model="p1_packed", prompt="Hello world", max_tokens=0, echo=True, logprobs=2)
    choice = answer.choices[0]
    assert choice.text == "Hello world" and answer.usage.completion_tokens == 0
    assert choice.logprobs.token_logprobs[0] is None and all(v <= 0 for v in choice.logprobs.token_logprobs[1:])
    assert len(choice.logprobs.tokens) == answer.usage.prompt_tokens == len(choice.logprobs.text_offset)
    more = client.completions.create(model="p1_packed", prompt="Hello world", max_tokens=2, echo=True, logprobs=2, temperature=0)
    assert len(more.choices[0].logprobs.tokens) == answer.usage.prompt_tokens + more.usage.completion_tokens


def test_best_of(client):
    body = {"model": "p1_packed", "prompt": ["One", "Two"], "seed": 5, "max_tokens": 6, "extra_body": {"ignore_eos": True}}
    every = client.completions.create(n=4, logprobs=0, **body)
    mean = lambda choice: sum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens)
    best = client.completions.create(n=2, best_of=4, **body)
    for prompt in range(2):
        expected = sorted(every.choices[4 * prompt : 4 * prompt + 4], key=mean, reverse=True)[:2]
        assert [c.text for c in best.choices[2 * prompt : 2 * prompt + 2]] == [c.text for c in expected]
    assert [c.index for c in best.choices] == [0, 1, 2, 3] and best.choices[0].logprobs is None
    assert best.usage.completion_tokens == every.usage.completion_tokens == 48


def test_completion_stream(client):
    whole = client.completions.create(prompt="Hello", **GREEDY)
    chunks = list(client.completions.create(prompt="Hello", stream=True, **GREEDY))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert all(c.object == "text_completion" for c in chunks)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ],
)
def test_bad_parameters(client, change, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "p1_packed", "messages": CHAT, **change})
    assert caught.value.param == param and caught.value.code and caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_errors_by_class(client, server, start, tmp_path_factory):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nope", messages=CHAT)
    assert caught.value.code == "model_not_found" and "p1_packed" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="p1_packed", messages=[{"role": "user", "content": "word " * 9000}])
    assert caught.value.code == "context_length_exceeded"
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("team:secret-1\n")
    guarded = start("--api-key-file", str(keys), "--rate-limit-rpm", "3")
    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert caught.value.code == "invalid_api_key"
    good = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="secret-1", max_retries=0)
    with pytest.raises(openai.RateLimitError) as caught:
        for _ in range(5):
            good.chat.completions.create(model="p1_packed", messages=CHAT, max_tokens=1)
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert int(caught.value.response.headers["retry-after-ms"]) > 0


def test_async_client_and_cancellation(server):
    async def scenario():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
        body = {"model": "p1_packed", "messages": CHAT, "extra_body": {"ignore_eos": True}}
        stream = await client.chat.completions.create(max_tokens=3000, stream=True, **body)
        async for _ in stream:
            break
        await stream.close()
        answers = await asyncio.gather(*(client.chat.completions.create(max_tokens=8, seed=i, **body) for i in range(8)))
        assert all(a.usage.completion_tokens == 8 for a in answers)

    asyncio.run(scenario())
