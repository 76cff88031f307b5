"""What a bystander feels while streams run: small requests, and one with a very long prompt."""

import http.client
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tools.control_kit import quantile

PROBES_PER_SECOND = 50
WORDS = ("spell", "ocean", "letter", "repeat", "after", "me", "green", "seven", "plus", "window")
CONFIG, POSITIONS = "config.json", "max_position_embeddings"


class Probe:
    """A thread that asks for /version again and again. The answer takes one turn of the server's
    loop, so its time bounds the loop's lag from above."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self._stopped = False
        self.times: list[tuple[float, float]] = []
        """(when asked, seconds)."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped:
            begun = time.monotonic()
            try:
                self._connection.request("GET", "/version")
                self._connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                return  # the server has ended
            took = time.monotonic() - begun
            self.times.append((begun, took))
            time.sleep(max(0.0, 1 / PROBES_PER_SECOND - took))

    def figures(self) -> dict[str, float]:
        """Stop; milliseconds."""
        self._stopped = True
        self._thread.join()
        took = [1e3 * seconds for _, seconds in self.times]
        return {
            "count": len(took),
            "p50": quantile(took, 0.5),
            "p99": quantile(took, 0.99),
            "max": max(took),
        }


class LongPrompt:
    """A request with a text of about so many tokens, which asks for one token."""

    def __init__(self, port: int, num_tokens: int, *, tokenizer: Path) -> None:
        words = " ".join(WORDS[at * at % len(WORDS)] for at in range(1000)) + " "
        per_part = len(Tokenizer.from_file(str(tokenizer)).encode(words).ids)
        text = words * (num_tokens // per_part)
        self._port = port
        self._body = json.dumps({"prompt": text, "max_tokens": 1, "ignore_eos": True}).encode()
        self._answer: dict[str, Any] = {}
        self._begun = self._ended = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._delay = 0.0

    def post_after(self, seconds: float) -> None:
        """Post it in that time."""
        self._delay = seconds
        self._thread.start()

    def _run(self) -> None:
        time.sleep(self._delay)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        self._begun = time.monotonic()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", self._body, headers)
        self._answer = json.loads(connection.getresponse().read())
        self._ended = time.monotonic()

    def figures(self) -> dict[str, Any]:
        """What came of it. Waits for it."""
        self._thread.join(60)
        usage = self._answer.get("usage", {})
        return {
            "prompt_tokens": usage.get("prompt_tokens"),
            "seconds": self._ended - self._begun,
            "error": self._answer.get("error"),
        }


@contextmanager
def long_model(model: Path, *, positions: int) -> Iterator[Path]:
    """A copy of a checkpoint that says it was built for so many positions; for the paced engine
    alone."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / model.name
        copy.mkdir()
        for file in model.iterdir():
            if file.is_file() and file.name != CONFIG:
                os.symlink(file, copy / file.name)
        config = json.loads((model / CONFIG).read_text())
        (copy / CONFIG).write_text(json.dumps({**config, POSITIONS: positions}))
        yield copy
