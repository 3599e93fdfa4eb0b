"""schemathesis reads /openapi.json and tries it out: no 5xx, and every answer as described. Bounded; run it longer by hand."""
import json
import os
import subprocess
import urllib.request
from pathlib import Path

TOOL = Path(os.environ.get("BITNET_SCHEMATHESIS", Path(__file__).resolve().parents[1] / ".venv-schemathesis/bin/schemathesis"))
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance,unsupported_method"


def test_the_description_is_true(start, tmp_path):
    # Every name is fine, so that requests get past the model's name.
    server = start("--model-name", "*", "--max-n", "128")
    command = [str(TOOL), "run", f"{server.url}/openapi.json", "--checks", CHECKS, "--phases", "coverage,fuzzing", "--max-examples", "40", "--request-timeout", "120",
               "--max-time", os.environ.get("BITNET_SCHEMATHESIS_SECONDS", "30"), "--seed", "1", "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-8000:]
    with urllib.request.urlopen(f"{server.url}/health", timeout=30) as answer:
        assert json.load(answer)["status"] == "ok"
