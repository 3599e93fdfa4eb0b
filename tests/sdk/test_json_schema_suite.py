"""The public JSON-Schema-Test-Suite as a source of schemas: what the server accepts it enforces, what it does not it names."""
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import openai
import pytest

CACHE = Path(__file__).resolve().parents[1] / ".cache"
DRAFTS = {
    "draft2020-12": jsonschema.Draft202012Validator,
    "draft2019-09": jsonschema.Draft201909Validator,
    "draft7": jsonschema.Draft7Validator,
    "draft6": jsonschema.Draft6Validator,
    "draft4": jsonschema.Draft4Validator,
}
PLACE = "'response_format.json_schema.schema"


def groups(draft):
    """(file, description, schema) of every group of a draft's required tests."""
    (suite,) = CACHE.glob(f"jsonschema-*/json/tests/{draft}")
    files = sorted(suite.glob("*.json"))
    assert len(files) >= 30, "tests/run fetches the suite"
    return [(file.stem, group["description"], group["schema"]) for file in files for group in json.loads(file.read_text())]


@pytest.mark.parametrize("draft", DRAFTS)
def test_what_is_accepted_is_enforced_and_the_rest_is_named(server, draft):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120)

    def check(case):
        name, description, schema = case
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        told = f"{draft} {name}: {description}: {json.dumps(schema)}"
        outcomes = []
        for seed, temperature, stop in [(1, 1, None), (2, 2, None), (3, 2, ["1", "a"])]:
            try:
                answer = client.chat.completions.create(
                    model="p1_packed", messages=[{"role": "user", "content": "JSON."}], response_format=form,
                    seed=seed, temperature=temperature, stop=stop, max_tokens=60,
                )
            except openai.BadRequestError as error:
                assert error.param == "response_format" and error.code in ("unsupported_parameter", "invalid_value"), (told, error.message)
                assert PLACE in error.message or f"{PLACE[:-len('.schema')]}" in error.message or "'#" in error.message, (told, error.message)
                return "refused"
            (choice,) = answer.choices
            if choice.finish_reason == "stop":
                DRAFTS[draft](schema).validate(json.loads(choice.message.content))
                outcomes.append("finished")
            else:
                assert choice.finish_reason == "length", told
        return "finished" if outcomes else "cut"

    def safely(case):
        try:
            return check(case)
        except Exception as error:
            return f"{case[0]}: {case[1]}: {json.dumps(case[2])}: {type(error).__name__}: {str(error)[:400]}"

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(safely, groups(draft)))
    counts = {outcome: outcomes.count(outcome) for outcome in ("finished", "cut", "refused")}
    print(draft, counts)
    wrong = [outcome for outcome in outcomes if outcome not in counts]
    assert not wrong, "\n".join(wrong)
    assert counts["finished"] > 30
