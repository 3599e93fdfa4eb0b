"""Starts the real binary on a free port, with a golden checkpoint, for the SDK tests."""
import os
import subprocess
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("BITNET_BIN", ROOT / "target/release/bitnet"))
MODEL = ROOT / "tests/golden/public/p1_packed"


class Server:
    """`bitnet serve` with ARGS; `url` is its address."""

    def __init__(self, *args, model=MODEL):
        assert BINARY.is_file(), f"{BINARY} is missing: tests/run builds it"
        command = [str(BINARY), "serve", "--port", "0", "-m", str(model), *args]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.url = None
        for line in self.process.stdout:
            if line.startswith("listening on "):
                self.url = line.split()[-1]
                break
        assert self.url, "the server ended before it listened"
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def start():
    """Starts servers that live until the session ends."""
    servers = []

    def begin(*args, **kwargs):
        servers.append(Server(*args, **kwargs))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(start):
    return start()
