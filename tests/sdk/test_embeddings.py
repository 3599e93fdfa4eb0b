"""Embeddings through the official SDK: both encodings, every form of input, errors by class, and lines of batches."""
import json
import math
import shutil
import struct
import time

import openai
import pytest

from conftest import MODEL as CHAT_MODEL

MODEL = "vectors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A golden checkpoint marked as sentence-transformers mark an embedding model."""
    folder = tmp_path_factory.mktemp("model") / MODEL
    shutil.copytree(CHAT_MODEL, folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(kinds.items())]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 256, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}))
    return folder


@pytest.fixture(scope="module")
def client(start, model, tmp_path_factory):
    server = start("--data-dir", str(tmp_path_factory.mktemp("data")), model=model)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60)


def test_both_encodings_are_the_same_vector(client):
    """The SDK asks for base64 unless told otherwise, and decodes it."""
    texts = ["Hello world", "Bonjour", "Hello world"]
    default = client.embeddings.create(model=MODEL, input=texts)
    floats = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    assert default.object == "list" and default.model == MODEL
    assert [d.index for d in default.data] == [0, 1, 2] and {d.object for d in default.data} == {"embedding"}
    assert default.usage == floats.usage and default.usage.prompt_tokens == default.usage.total_tokens > 3
    for one, other in zip(default.data, floats.data):
        narrow = [struct.unpack("<f", struct.pack("<f", value))[0] for value in other.embedding]
        assert len(narrow) == 256 and list(one.embedding) == narrow
        assert math.isclose(sum(value * value for value in narrow), 1, rel_tol=1e-5)
    assert default.data[0].embedding == default.data[2].embedding != default.data[1].embedding
    raw = client.embeddings.create(model=MODEL, input=texts[0], encoding_format="base64").data[0].embedding
    assert isinstance(raw, str)


def test_every_form_of_input(client):
    text = "The quick brown fox"
    root = str(client.base_url).removesuffix("/v1/")
    ids = client.post(f"{root}/tokenize", cast_to=object, body={"prompt": text})["tokens"]
    forms = [text, [text], ids, [ids], [ids, [ids[0]]]]
    answers = [client.embeddings.create(model=MODEL, input=form, user="me") for form in forms]
    assert all(answer.data[0].embedding == answers[0].data[0].embedding for answer in answers)
    assert [answer.usage.prompt_tokens for answer in answers] == [len(ids)] * 4 + [len(ids) + 1]
    many = client.embeddings.create(model=MODEL, input=[str(number) for number in range(300)])
    assert [d.index for d in many.data] == list(range(300))
    assert many.data[7].embedding == client.embeddings.create(model=MODEL, input="7").data[0].embedding


def test_refusals(client):
    for fields, param in [({"input": ""}, "input"), ({"input": []}, "input"), ({"input": ["x", ""]}, "input"), ({"input": [10**6]}, "input"),
                          ({"input": "x", "dimensions": 8}, "dimensions"), ({"input": "x", "encoding_format": "int8"}, "encoding_format")]:
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model=MODEL, **fields)
        assert caught.value.param == param
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input="word " * 5000)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "input"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="x")


def test_it_generates_no_text(client):
    message = [{"role": "user", "content": "Hello"}]
    for ask in (lambda: client.chat.completions.create(model=MODEL, messages=message), lambda: client.completions.create(model=MODEL, prompt="Hello")):
        with pytest.raises(openai.BadRequestError) as caught:
            ask()
        assert caught.value.param == "model" and "/v1/embeddings" in caught.value.message
    assert [m.id for m in client.models.list()] == [MODEL]


def test_lines_of_batches(client):
    def line(custom_id, body):
        return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body})

    lines = [line("a", {"model": MODEL, "input": ["x", "y"], "encoding_format": "base64"}), line("b", {"input": "x"}), line("c", {"input": ""})]
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    end = time.monotonic() + 60
    while batch.status != "completed" and time.monotonic() < end:
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    answers = [json.loads(text) for text in client.files.content(batch.output_file_id).text.splitlines()]
    answers = {answer["custom_id"]: answer["response"]["body"] for answer in answers}
    direct = client.embeddings.create(model=MODEL, input=["x", "y"], encoding_format="base64")
    assert answers["a"]["data"] == [d.model_dump() for d in direct.data] and answers["a"]["usage"]["total_tokens"] == direct.usage.total_tokens
    assert len(answers["b"]["data"][0]["embedding"]) == 256
    failed = json.loads(client.files.content(batch.error_file_id).text)
    assert failed["custom_id"] == "c" and failed["response"]["status_code"] == 400
