"""Chunks are functions of identity and delta, so any process could make them."""

import json
import subprocess
import sys

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from appliance.api.render import ChunkTemplate, Identity

IDENTITY = Identity(id="cmpl-1", object="text_completion", created=17, model='a "model"')
ELSEWHERE = """
import json, sys
import msgspec
from appliance.api.render import ChunkTemplate, Identity
identity = msgspec.json.decode(sys.stdin.readline(), type=Identity)
template = ChunkTemplate(identity, 3, chat=True, null_usage=True)
texts = json.loads(sys.stdin.readline())
parts = [template.role(None), *map(template.text, texts), template.finish("stop", None)]
names = {name.split(".")[0] for name in sys.modules}
heavy = {"asyncio", "aiohttp", "uvloop", "tokenizers"} & names
print(json.dumps([b"".join(parts).decode(), sorted(heavy)]))
"""


@given(text=st.text(), chat=st.booleans(), null_usage=st.booleans())
def test_a_chunk_says_the_text_and_nothing_else(text: str, chat: bool, null_usage: bool) -> None:
    chunk = ChunkTemplate(IDENTITY, 2, chat=chat, null_usage=null_usage).text(text)
    assert chunk.startswith(b"data: ")
    assert chunk.endswith(b"\n\n")
    assert b"\n" not in chunk[:-2]
    document = json.loads(chunk[len(b"data: ") :])
    (choice,) = document["choices"]
    said = choice["delta"]["content"] if chat else choice["text"]
    assert (said, choice["index"], choice["finish_reason"]) == (text, 2, None)
    assert document["id"] == "cmpl-1"
    assert ("usage" in document) is null_usage


def test_another_process_makes_the_same_bytes_without_a_loop_or_a_tokenizer() -> None:
    texts = ["plain", 'quo"te', "é\n", "\x00", "🙂"]
    given_to_it = msgspec.json.encode(IDENTITY) + b"\n" + json.dumps(texts).encode() + b"\n"
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], input=given_to_it, capture_output=True, check=True
    )
    text, heavy = json.loads(done.stdout)
    template = ChunkTemplate(IDENTITY, 3, chat=True, null_usage=True)
    parts = [template.role(None), *map(template.text, texts), template.finish("stop", None)]
    assert text.encode() == b"".join(parts)
    assert heavy == []
