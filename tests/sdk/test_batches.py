"""Files and batches through the official SDK, and `bitnet batch`: answers like those over HTTP, each once, whatever happens."""
import json
import subprocess
import time

import openai
import pytest

from conftest import BINARY, MODEL as MODEL_PATH, Server

MODEL = "p1_packed"
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 16}


def sdk(server, key="unused"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def line(custom_id, body, url="/v1/chat/completions", **more):
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more})


def chat(text, **more):
    return {**GREEDY, "messages": [{"role": "user", "content": text}], **more}


def upload(client, lines):
    return client.files.create(file=("in.jsonl", "\n".join(lines).encode() + b"\n"), purpose="batch")


def finished(client, batch, limit=120):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        batch = client.batches.retrieve(batch.id)
        if batch.status in ("completed", "failed", "cancelled"):
            return batch
        time.sleep(0.1)
    raise AssertionError(f"still {batch.status}: {batch.request_counts}")


def run(client, lines, endpoint="/v1/chat/completions", **more):
    batch = client.batches.create(input_file_id=upload(client, lines).id, endpoint=endpoint, completion_window="24h", **more)
    assert batch.object == "batch" and batch.id.startswith("batch_")
    return finished(client, batch)


def read(client, file_id):
    if file_id is None:
        return {}
    answers = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    assert len({answer["custom_id"] for answer in answers}) == len(answers)
    return {answer["custom_id"]: answer for answer in answers}


@pytest.fixture(scope="module")
def client(start, tmp_path_factory):
    return sdk(start("--data-dir", str(tmp_path_factory.mktemp("data"))))


def test_files(client):
    file = upload(client, ["{}"])
    assert file.id.startswith("file-") and file.object == "file" and file.bytes == 3 and file.purpose == "batch" and file.filename == "in.jsonl"
    assert client.files.retrieve(file.id) == file
    assert file.id in [f.id for f in client.files.list()] and client.files.content(file.id).text == "{}\n"
    other = upload(client, ["{}", "{}"])
    page = client.files.list(limit=1)
    assert [f.id for f in page.data] == [other.id] and page.has_more and file.id in [f.id for f in page]
    assert [f.id for f in client.files.list(limit=1, order="asc").data] != [other.id]
    for one in (file, other):
        assert client.files.delete(one.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    for bad in ("../version", "file-" + "0" * 32, "%2e%2e"):
        with pytest.raises(openai.NotFoundError):
            client.files.content(bad)
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=b"x", purpose="assistants")
    assert caught.value.param == "purpose"


def test_answers_are_those_of_http(client):
    lines = [line(f"c{i}", chat(f"Question {i}?")) for i in range(6)] + [line("bad", chat("x", temperature=3)), line("stream", chat("x", stream=True))]
    batch = run(client, lines, metadata={"job": "one"})
    assert batch.status == "completed" and batch.metadata == {"job": "one"} and batch.errors is None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (8, 6, 2) and batch.completed_at >= batch.in_progress_at >= batch.created_at
    answers, errors = read(client, batch.output_file_id), read(client, batch.error_file_id)
    assert set(answers) == {f"c{i}" for i in range(6)} and set(errors) == {"bad", "stream"}
    for i in range(6):
        answer = answers[f"c{i}"]
        assert answer["id"].startswith("batch_req_") and answer["error"] is None
        response = answer["response"]
        direct = client.chat.completions.create(**chat(f"Question {i}?"))
        assert response["status_code"] == 200 and response["request_id"].startswith("req-")
        assert response["body"]["choices"][0]["message"]["content"] == direct.choices[0].message.content
        assert response["body"]["object"] == "chat.completion"
    for custom_id, param in (("bad", "temperature"), ("stream", "stream")):
        response = errors[custom_id]["response"]
        assert response["status_code"] == 400 and response["body"]["error"]["param"] == param
    taken = [answer["response"]["body"]["usage"] for answer in answers.values()]
    usage = batch.to_dict()["usage"]  # the 1.x SDK has no type for it
    assert usage["input_tokens"] == sum(one["prompt_tokens"] for one in taken) > 0
    assert usage["output_tokens"] == sum(one["completion_tokens"] for one in taken) > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert set(usage["input_tokens_details"]) == {"cached_tokens"} and set(usage["output_tokens_details"]) == {"reasoning_tokens"}
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    assert batch.id in [b.id for b in client.batches.list(limit=2)]


@pytest.mark.parametrize(
    ("endpoint", "body", "status"),
    [
        ("/v1/completions", {**GREEDY, "prompt": "Once"}, 200),
        ("/v1/responses", {"model": MODEL, "input": "Hi", "max_output_tokens": 8}, 200),
        ("/v1/embeddings", {"model": MODEL, "input": "Hi"}, 400),
    ],
)
def test_other_endpoints(client, endpoint, body, status):
    batch = run(client, [line("a", body, endpoint)], endpoint)
    answers = {**read(client, batch.output_file_id), **read(client, batch.error_file_id)}
    assert batch.status == "completed" and answers["a"]["response"]["status_code"] == status


def test_bad_files_fail_and_say_where(client):
    lines = [line("a", chat("x")), "not json", line("a", chat("x")), line("b", {"prompt": "x"}, "/v1/completions"), line("c", chat("x"), method="GET")]
    batch = run(client, lines)
    assert batch.status == "failed" and batch.failed_at and batch.output_file_id is None
    assert [(e.line, e.code) for e in batch.errors.data] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "mismatched_url"),
        (5, "invalid_method"),
    ]
    assert run(client, [""]).errors.data[0].code == "empty_file"
    for change, param in (({"endpoint": "/v1/other"}, "endpoint"), ({"completion_window": "1h"}, "completion_window")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.batches.create(**{"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h", **change})
        assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id="file-1", endpoint="/v1/completions", completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_1")


def test_cancel(client):
    slow = {**GREEDY, "max_tokens": 200, "ignore_eos": True}
    file = upload(client, [line(f"c{i}", {**slow, "messages": [{"role": "user", "content": str(i)}]}) for i in range(300)])
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    with pytest.raises(openai.BadRequestError):
        client.files.delete(file.id)
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = finished(client, batch)
    assert batch.status == "cancelled" and batch.cancelled_at and batch.request_counts.completed < 300
    assert len(read(client, batch.output_file_id)) == batch.request_counts.completed
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(batch.id)


def test_keys_separate_tenants_and_limits_hold(start, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one:first\ntwo:second\n")
    server = start("--api-key-file", str(keys), "--data-dir", str(tmp_path / "data"), "--max-file-bytes", "1000", "--max-data-bytes", "2500")
    one, two = sdk(server, "first"), sdk(server, "second")
    file = upload(one, ["x" * 900])
    for call in (two.files.retrieve, two.files.content, two.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)
    assert two.files.list().data == [] and one.files.list().data == [file]
    with pytest.raises(openai.NotFoundError):
        two.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    with pytest.raises(openai.AuthenticationError):
        sdk(server, "third").files.list()
    with pytest.raises(openai.APIStatusError) as caught:
        upload(one, ["x" * 1001])
    assert caught.value.status_code == 413
    upload(two, ["x" * 900])
    with pytest.raises(openai.BadRequestError) as caught:
        upload(two, ["x" * 900])
    assert "--max-data-bytes" in caught.value.message
    assert len(list((tmp_path / "data" / "files").iterdir())) == 4


def test_without_a_directory_they_are_off(server):
    with pytest.raises(openai.NotFoundError) as caught:
        sdk(server).files.list()
    assert "--data-dir" in caught.value.message


def test_a_killed_server_goes_on_where_it_was(tmp_path):
    args = ("--data-dir", str(tmp_path))
    body = {**GREEDY, "max_tokens": 60, "ignore_eos": True}
    lines = [line(f"c{i}", {**body, "messages": [{"role": "user", "content": f"Number {i}"}]}) for i in range(120)]
    server = Server(*args)
    try:
        client = sdk(server)
        batch = client.batches.create(input_file_id=upload(client, lines).id, endpoint="/v1/chat/completions", completion_window="24h")
        end = time.monotonic() + 60
        while client.batches.retrieve(batch.id).request_counts.completed < 10:
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        server.stop()
    (early,) = [path for path in (tmp_path / "files").glob("*.data") if b"batch_req_" in path.read_bytes()]
    whole = early.read_bytes()
    answered = [json.loads(text) for text in whole.splitlines(keepends=True) if text.endswith(b"\n")]
    assert 10 <= len(answered) < 120
    with early.open("ab") as file:
        file.write(b'{"id": "batch_req_half')
    server = Server(*args)
    try:
        client = sdk(server)
        batch = finished(client, batch)
        assert batch.status == "completed" and batch.request_counts.completed == batch.request_counts.total == 120
        answers = read(client, batch.output_file_id)
        assert set(answers) == {f"c{i}" for i in range(120)}
        assert all(answers[line["custom_id"]] == line for line in answered), "nothing is answered twice"
    finally:
        server.stop()


def test_answers_that_find_no_room_end_the_batch_and_stay(start, tmp_path):
    client = sdk(start("--data-dir", str(tmp_path), "--max-data-bytes", "6000"))
    batch = run(client, [line(f"c{i}", chat(f"Q{i}")) for i in range(15)])
    assert batch.status == "failed" and "--max-data-bytes" in batch.errors.data[0].message
    answers = read(client, batch.output_file_id)
    assert 0 < len(answers) == batch.request_counts.completed < 15
    client.files.delete(batch.output_file_id)
    assert run(client, [line("again", chat("x"))]).status == "completed"


def test_interactive_requests_come_first(client):
    body = {**GREEDY, "max_tokens": 100, "ignore_eos": True}
    file = upload(client, [line(f"c{i}", {**body, "messages": [{"role": "user", "content": f"Many {i}"}]}) for i in range(200)])
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    for i in range(10):
        client.chat.completions.create(**chat(f"Now {i}"))
    assert client.batches.retrieve(batch.id).status in ("validating", "in_progress")
    client.batches.cancel(batch.id)
    finished(client, batch)


def offline(source, target, *more):
    command = [str(BINARY), "batch", "-m", str(MODEL_PATH), "-i", str(source), "-o", str(target), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_line(client, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [line(f"c{i}", chat(f"Question {i}?")) for i in range(5)] + [line("r", {"input": "Hi", "max_output_tokens": 4}, "/v1/responses"), line("bad", chat("x", top_p=7))]
    source.write_text("\n".join(lines))
    first = offline(source, target)
    assert first.returncode == 0 and first.stdout == "" and "7 answered (1 with an error)" in first.stderr, first.stderr
    answers = {a["custom_id"]: a for a in map(json.loads, target.read_text().splitlines())}
    assert len(answers) == 7 and answers["bad"]["response"]["status_code"] == 400
    direct = client.chat.completions.create(**chat("Question 3?"))
    assert answers["c3"]["response"]["body"]["choices"][0]["message"]["content"] == direct.choices[0].message.content
    kept = target.read_bytes().splitlines(keepends=True)[:3]
    target.write_bytes(b"".join(kept) + b'{"id": "half')
    second = offline(source, target)
    assert second.returncode == 0 and "3 were there already" in second.stderr, second.stderr
    assert target.read_bytes().splitlines(keepends=True)[:3] == kept and len(target.read_text().splitlines()) == 7
    source.write_text(lines[0] + "\nnonsense\n")
    broken = offline(source, tmp_path / "other.jsonl")
    assert broken.returncode == 65 and "line 2" in broken.stderr and not (tmp_path / "other.jsonl").exists()
    assert offline(tmp_path / "none", target).returncode == 66
    assert offline(source, source).returncode == 64


def test_embeddings_of_a_chat_model(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input="Hello")
    assert caught.value.param == "model" and "embedding" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input="Hello", dimensions=3)
    assert caught.value.param == "dimensions"
