"""lm-evaluation-harness, unmodified, runs a local task against the real binary; what it scores is what the server says."""
import json
import os
import subprocess
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
HARNESS = Path(os.environ.get("BITNET_LM_EVAL", HERE.parent / ".venv-lm-eval/bin/lm_eval"))
MODEL = HERE.parent / "golden/public/p1_packed"


def score(server, question, choice):
    """The log-likelihood of a continuation by echo, and whether each of its tokens is the best one."""
    body = {"prompt": question + choice, "max_tokens": 0, "echo": True, "logprobs": 1}
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    logprobs = json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["logprobs"]
    start = logprobs["text_offset"].index(len(question))
    values = logprobs["token_logprobs"][start:]
    best = [max(top.values()) for top in logprobs["top_logprobs"][start:]]
    return sum(values), values == best


def test_log_likelihoods_are_the_servers(server, tmp_path):
    task = (HERE / "lm_eval/local_choice.yaml").read_text().replace("DATA_FILE", str(HERE / "lm_eval/local_choice.jsonl"))
    (tmp_path / "local_choice.yaml").write_text(task)
    arguments = f"model=p1_packed,base_url={server.url}/v1/completions,tokenizer={MODEL},num_concurrent=2,max_retries=1,add_bos_token=True,max_length=4096"
    command = [str(HARNESS), "run", "--model", "local-completions", "--model_args", arguments, "--tasks", "local_choice",
               "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        for choice, told in zip(row["doc"]["choices"], row["filtered_resps"], strict=True):
            likelihood, greedy = score(server, row["doc"]["question"], choice)
            assert abs(float(told[0]) - likelihood) < 1e-6 and (told[1] in (True, "True")) == greedy, (row["doc"], choice, told, likelihood)
