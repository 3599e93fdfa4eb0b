"""The contract's rows and the traps of real clients, seen through the official SDK and, where it hides them, as raw HTTP."""
import json
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest

MODEL = "p1_packed"
CHAT = [{"role": "user", "content": "Say something."}]
LONG = {"model": MODEL, "messages": CHAT, "max_tokens": 3900, "seed": 5, "extra_body": {"ignore_eos": True, "cache_prompt": False}}


def connect(server, **settings):
    return openai.OpenAI(base_url=f"{server.url}/v1", **{"api_key": "unused", "max_retries": 0, **settings})


@pytest.fixture(scope="session")
def client(server):
    return connect(server)


def raw(server, path, body=None, headers={}, method=None):
    """(status, headers, text), whatever the status."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"content-type": "application/json", **headers}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def events(text):
    return [line[len("data: "):] for line in text.splitlines() if line.startswith("data: ")]


def idle(server):
    """Waits until the engine has nothing left to do: a generous guard, not a measurement."""
    for _ in range(400):
        text = raw(server, "/metrics")[2]
        if all(float(line.split()[-1]) == 0 for line in text.splitlines() if line.startswith(("bitnet_requests_running{", "bitnet_requests_waiting{"))):
            return
        time.sleep(0.05)
    raise AssertionError("the engine is still at work")


# Errors, the framework's included


@pytest.mark.parametrize(
    ("path", "body", "headers", "method", "status"),
    [
        ("/v1/nowhere", {}, {}, "POST", 404),
        ("/v1/models/none", None, {}, "GET", 404),
        ("/v1/chat/completions", None, {}, "GET", 405),
        ("/v1/models", {}, {}, "POST", 405),
        ("/v1/chat/completions", b"{", {}, "POST", 400),
        ("/v1/chat/completions", b"", {}, "POST", 400),
        ("/v1/chat/completions", b"\xff\xfe", {}, "POST", 400),
        ("/v1/completions", b"prompt=x", {"content-type": "application/x-www-form-urlencoded"}, "POST", 415),
        ("/v1/completions", b"{}", {"content-encoding": "br"}, "POST", 415),
        ("/v1/completions", b" " * (5 << 20), {}, "POST", 413),
    ],
)
def test_every_error_has_all_four_keys(server, path, body, headers, method, status):
    code, answer, text = raw(server, path, body, headers, method)
    assert code == status and answer["x-request-id"] and answer["content-type"] == "application/json"
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["code"] is None or isinstance(error["code"], str)
    assert answer["x-should-retry"] == "false"
    if status == 405:
        assert answer["allow"]


def test_the_sdk_reads_the_frameworks_errors(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.post("/nowhere", body={}, cast_to=object)
    assert caught.value.type == "invalid_request_error" and caught.value.code is None and caught.value.request_id
    with pytest.raises(openai.APIStatusError) as caught:
        client.get("/chat/completions", cast_to=object)
    assert caught.value.status_code == 405


def test_a_missing_key_is_told_how(start, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("# people\nteam:secret-1\n")
    server = start("--api-key-file", str(keys))
    status, headers, text = raw(server, "/v1/models")
    assert (status, headers["www-authenticate"]) == (401, "Bearer") and json.loads(text)["error"]["code"] == "invalid_api_key"
    for path in ["/health", "/health/live", "/health/ready", "/health/startup", "/health/generate", "/livez", "/readyz", "/metrics", "/openapi.json", "/docs"]:
        assert raw(server, path)[0] == 200, path
    for path in ["/stats", "/stats/history", "/v1/models", "/models"]:
        assert raw(server, path)[0] == 401, path
    assert connect(server, api_key="secret-1").models.list().data


# Retries


def test_the_sdk_waits_out_the_callers_limit(start):
    server = start("--rate-limit-rpm", "60")
    client = connect(server)
    with pytest.raises(openai.RateLimitError) as caught:
        for _ in range(70):
            answer = client.models.with_raw_response.list()
    for what in ("limit", "remaining", "reset"):
        assert answer.headers[f"x-ratelimit-{what}-requests"]
    assert answer.headers["x-ratelimit-limit-requests"] == "60"
    response = caught.value.response
    assert 1 <= int(response.headers["retry-after"]) <= 60 and int(response.headers["retry-after-ms"]) >= 1
    assert response.headers["x-ratelimit-remaining-requests"] == "0" and response.headers.get("x-should-retry") is None
    patient = connect(server, max_retries=5).models.with_raw_response.list()
    assert patient.retries_taken >= 1 and patient.parse().data


def test_the_sdk_waits_out_the_callers_tokens(start):
    server = start("--rate-limit-tpm", "1200")
    client = connect(server)
    asked = {"model": MODEL, "prompt": "Hi", "max_tokens": 600, "extra_body": {"guided_choice": ["yes"]}}
    first = client.completions.with_raw_response.create(**asked)
    assert first.headers["x-ratelimit-limit-tokens"] == "1200" and int(first.headers["x-ratelimit-remaining-tokens"]) < 620
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(**asked)
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    patient = connect(server, max_retries=5).completions.with_raw_response.create(**asked)
    assert patient.retries_taken >= 1
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{**asked, "max_tokens": 1200})
    assert caught.value.param == "prompt" and caught.value.response.headers["x-should-retry"] == "false"


def test_the_sdk_waits_out_a_full_queue(start):
    server = start("--max-num-seqs", "1", "--max-queue", "1", "--kernel", "scalar")
    client = connect(server)
    first = client.chat.completions.create(stream=True, **LONG)
    next(iter(first))
    second = client.chat.completions.create(stream=True, **{**LONG, "seed": 6})
    refused = None
    for _ in range(20):
        try:
            client.chat.completions.create(**{**LONG, "seed": 7, "max_tokens": 1})
        except openai.InternalServerError as error:
            refused = error
            break
    assert refused is not None, "the queue never filled"
    assert refused.status_code == 503 and refused.code == "server_overloaded" and refused.type == "server_error"
    assert 1 <= int(refused.response.headers["retry-after"]) <= 60
    threading.Timer(0.3, lambda: (first.close(), second.close())).start()
    patient = connect(server, max_retries=8).chat.completions.with_raw_response.create(**{**LONG, "seed": 8, "max_tokens": 1})
    assert patient.parse().usage.completion_tokens == 1


def test_what_cannot_get_better_is_not_retried(server):
    patient = connect(server, max_retries=3)
    with pytest.raises(openai.BadRequestError):
        patient.chat.completions.create(model=MODEL, messages=CHAT, temperature=9)
    assert raw(server, "/v1/chat/completions", {"messages": CHAT, "temperature": 9})[1]["x-should-retry"] == "false"


# Timeouts and cancellation


def test_a_clients_timeout_frees_the_engine(server):
    with pytest.raises(openai.APITimeoutError):
        connect(server, timeout=0.1).chat.completions.create(**LONG)
    idle(server)


def test_a_closed_stream_frees_the_engine(server, client):
    stream = client.chat.completions.create(stream=True, n=3, **LONG)
    next(iter(stream))
    stream.close()
    idle(server)


def test_the_servers_timeout(start):
    server = start("--request-timeout", "1", "--kernel", "scalar", "--max-num-seqs", "8")
    client = connect(server, max_retries=2)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(n=8, **LONG)
    assert caught.value.response.headers["x-should-retry"] == "false" and caught.value.type == "server_error"
    # In mid-stream: one error object and the end, so that nobody takes half an answer for a whole one.
    with pytest.raises(openai.APIError):
        for _ in client.chat.completions.create(n=8, stream=True, **LONG):
            pass
    body = {**{key: LONG[key] for key in ("model", "messages", "max_tokens")}, "n": 8, "seed": 9, "ignore_eos": True, "stream": True}
    text = raw(server, "/v1/chat/completions", body)[2]
    told = events(text)
    assert set(json.loads(told[-1])["error"]) == {"message", "type", "param", "code"}
    assert "[DONE]" not in told and "event:" not in text and sum("error" in json.loads(one) for one in told) == 1
    idle(server)


# Streams as they are on the wire


def test_the_order_of_a_stream(server):
    body = {"messages": CHAT, "max_tokens": 6, "n": 3, "seed": 2, "stream": True, "stream_options": {"include_usage": True}}
    status, headers, text = raw(server, "/v1/chat/completions", body)
    assert status == 200 and headers["content-type"] == "text/event-stream" and headers["cache-control"] == "no-cache"
    assert all(line == "" or line.startswith(("data: ", ":")) for line in text.splitlines())
    told = events(text)
    assert told[-1] == "[DONE]"
    chunks = [json.loads(one) for one in told[:-1]]
    assert {(c["id"], c["created"], c["object"]) for c in chunks} == {(chunks[0]["id"], chunks[0]["created"], "chat.completion.chunk")}
    assert [(c["choices"][0]["index"], c["choices"][0]["delta"]) for c in chunks[:3]] == [(i, {"role": "assistant", "content": ""}) for i in range(3)]
    assert all("role" not in c["choices"][0]["delta"] for c in chunks[3:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] <= 18 and chunks[-1]["system_fingerprint"]
    assert all("usage" in c and c["usage"] is None for c in chunks[:-1])
    for index in range(3):
        own = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert own[-1]["delta"] == {} and own[-1]["finish_reason"] in ("stop", "length")
        assert all(c["finish_reason"] is None for c in own[:-1])
    plain = [json.loads(one) for one in events(raw(server, "/v1/chat/completions", {**body, "stream_options": None})[2])[:-1]]
    assert all("usage" not in c for c in plain)


def test_obfuscation_is_opt_in(server):
    body = {"messages": CHAT, "max_tokens": 4, "seed": 2, "stream": True}
    told = lambda **more: [json.loads(one) for one in events(raw(server, "/v1/chat/completions", {**body, **more})[2])[:-1]]
    assert not any("obfuscation" in chunk for chunk in told())
    assert any(chunk.get("obfuscation") for chunk in told(stream_options={"include_obfuscation": True}))


def test_whole_characters_only(client):
    body = {"model": MODEL, "messages": CHAT, "max_tokens": 200, "temperature": 2, "extra_body": {"ignore_eos": True}}
    for seed in range(3):
        whole = client.chat.completions.create(seed=seed, **body).choices[0].message.content
        pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(seed=seed, stream=True, **body)]
        assert "".join(pieces) == whole


# Fields


def test_routes_without_v1(server):
    client = openai.OpenAI(base_url=server.url, api_key="unused", max_retries=0)
    assert client.models.list().data[0].id == MODEL
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices
    assert client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=1).choices


def test_request_ids(server, client):
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=1, extra_headers={"x-request-id": "mine-1"})
    assert answer._request_id == "mine-1"
    assert client.models.list()._request_id != client.models.list()._request_id
    assert raw(server, "/v1/models", headers={"x-request-id": "not sane"})[1]["x-request-id"] != "not sane"


def test_usage_tells_the_prefix_cache(client):
    messages = [{"role": "user", "content": "A prompt of its own, long enough to fill blocks. " * 12}]
    first, second = (client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2, extra_body={"ignore_eos": True}) for _ in range(2))
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert 0 < cached < second.usage.prompt_tokens and cached % 16 == 0
    assert first.usage.prompt_tokens_details.cached_tokens < cached
    assert client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1, extra_body={"cache_prompt": False}).usage.prompt_tokens_details.cached_tokens == 0


def test_roles_and_parts(client):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "Hi", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
        {"role": "assistant", "content": "Well."},
        {"role": "user", "content": "Go on."},
    ]
    assert client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2).usage.prompt_tokens > 20
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    assert caught.value.param == "messages"


def test_lengths(client):
    body = {"model": MODEL, "messages": CHAT, "extra_body": {"ignore_eos": True}}
    assert client.chat.completions.create(max_completion_tokens=3, max_tokens=9, **body).usage.completion_tokens == 3
    answer = client.completions.create(model=MODEL, prompt="a", extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16 and answer.choices[0].finish_reason == "length"
    answer = client.completions.create(model=MODEL, prompt="a", max_tokens=40, extra_body={"min_tokens": 30})
    assert 30 <= answer.usage.completion_tokens <= 40
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", max_tokens=5000)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"


def test_samplers(client):
    ask = lambda **more: client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=12, seed=4, **more).choices[0].message.content
    greedy = ask(temperature=0)
    assert ask(temperature=0) == greedy and isinstance(greedy, str)
    assert ask(temperature=2, extra_body={"top_k": 1}) == greedy
    assert ask(temperature=2, top_p=0) == greedy
    assert ask(temperature=2, extra_body={"min_p": 1}) == greedy
    ids = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=6, logit_bias={"70": 100}, temperature=0, extra_body={"return_token_ids": True, "ignore_eos": True})
    assert ids.choices[0].token_ids == [70] * 6 and ids.choices[0].prompt_token_ids[0] == 500
    punished = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=6, logit_bias={"70": 3}, frequency_penalty=2, presence_penalty=2, temperature=0, extra_body={"repetition_penalty": 1.5, "ignore_eos": True})
    assert punished.usage.completion_tokens == 6


def test_logprobs_are_of_the_raw_logits(client):
    body = {"model": MODEL, "messages": CHAT, "max_tokens": 4, "logprobs": True, "top_logprobs": 20, "extra_body": {"ignore_eos": True}}
    plain = client.chat.completions.create(temperature=0, **body).choices[0].logprobs.content
    biased = client.chat.completions.create(temperature=0, frequency_penalty=0.001, **body).choices[0].logprobs.content
    hot = client.chat.completions.create(temperature=2, seed=1, **{**body, "max_tokens": 1}).choices[0].logprobs.content
    assert [t.logprob for t in hot[0].top_logprobs] == [t.logprob for t in plain[0].top_logprobs]
    assert [t.logprob for t in biased[0].top_logprobs] == [t.logprob for t in plain[0].top_logprobs]
    for entry in plain:
        assert bytes(entry.bytes).decode(errors="replace") == entry.token and len(entry.top_logprobs) == 20
        assert all(-9999.0 <= t.logprob <= 0 for t in entry.top_logprobs)


def test_completion_logprobs_columns(client):
    choice = client.completions.create(model=MODEL, prompt="Hello", max_tokens=5, logprobs=3, temperature=0, extra_body={"ignore_eos": True}).choices[0]
    columns = choice.logprobs
    assert len(columns.tokens) == len(columns.token_logprobs) == len(columns.top_logprobs) == len(columns.text_offset) == 5
    assert all(len(best) <= 3 for best in columns.top_logprobs) and columns.text_offset[0] == 0


def test_echo_of_several_prompts_with_choices(client):
    answer = client.completions.create(model=MODEL, prompt=["One", "Two"], n=2, echo=True, max_tokens=2, seed=3, logprobs=0)
    assert [choice.text[:3] for choice in answer.choices] == ["One", "One", "Two", "Two"]
    assert all(choice.logprobs.token_logprobs[0] is None for choice in answer.choices)


def test_accepted_and_null_fields(client):
    accepted = {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "modalities": ["text"], "prediction": {"type": "content", "content": "x"}, "parallel_tool_calls": True, "safety_identifier": "s", "reasoning_effort": "low", "verbosity": "low", "brand_new": 1}
    nulls = dict.fromkeys(["temperature", "top_p", "n", "stop", "seed", "logprobs", "tools", "tool_choice", "response_format", "stream", "stream_options"])
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=1, extra_body={**accepted, **nulls})
    assert answer.metadata == {"a": "b"}
    assert client.post("/chat/completions", body={"messages": CHAT, "max_tokens": 1, "model": None}, cast_to=object)["model"] == MODEL


def test_names(start):
    server = start("--model-name", "*")
    assert connect(server).chat.completions.create(model="gpt-anything", messages=CHAT, max_tokens=1).choices
    strict = connect(start("--strict-params", "--max-n", "2"))
    with pytest.raises(openai.BadRequestError) as caught:
        strict.chat.completions.create(model=MODEL, messages=CHAT, extra_body={"brand_new": 1})
    assert caught.value.param == "brand_new" and caught.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError) as caught:
        strict.chat.completions.create(model=MODEL, messages=CHAT, n=3)
    assert caught.value.param == "n"


def test_what_is_not_done_is_400(client):
    for param, change in {"audio": {"audio": {"voice": "a", "format": "wav"}}, "modalities": {"modalities": ["audio"]}, "functions": {"functions": [{"name": "f"}]}, "web_search_options": {"web_search_options": {}}}.items():
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=CHAT, extra_body=change)
        assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", suffix="b")
    assert (caught.value.param, caught.value.code) == ("suffix", "unsupported_parameter")


def test_the_filter_refuses_and_cuts(start, tmp_path_factory):
    rules = tmp_path_factory.mktemp("filter") / "rules.toml"
    rules.write_text('[[rule]]\nid = "r"\ncategory = "c"\nmatch = "literal"\npatterns = ["project aurora"]\ndirection = "input"\naction = "block"\n')
    client = connect(start("--content-filter", str(rules)))
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Tell me about Project Aurora"}])
    assert caught.value.code == "content_filtered" and caught.value.param == "messages"


def test_tokens_and_templates(server):
    tokens = json.loads(raw(server, "/tokenize", {"prompt": "Hello", "add_special_tokens": True})[2])
    assert tokens["count"] == len(tokens["tokens"]) and tokens["tokens"][0] == 500 and tokens["max_model_len"] == 4096
    assert json.loads(raw(server, "/detokenize", {"tokens": tokens["tokens"][1:]})[2])["prompt"] == "Hello"
    assert json.loads(raw(server, "/apply-template", {"messages": CHAT})[2])["prompt"].endswith("Assistant: ")


def test_health_figures_and_description(server):
    assert json.loads(raw(server, "/health")[2])["status"] == "ok"
    assert json.loads(raw(server, "/health/generate")[2])["tokens"] >= 1
    assert isinstance(json.loads(raw(server, "/stats")[2]), dict) and isinstance(json.loads(raw(server, "/stats/history")[2]), dict)
    document = json.loads(raw(server, "/openapi.json")[2])
    assert document["openapi"].startswith("3.") and "/v1/chat/completions" in document["paths"]
    assert "<title>" in raw(server, "/docs")[2]
