"""Answer prompts with OpenVINO GenAI, told what to do by `tools.bench_peers` through two pipes.

Runs in the peer's own virtual environment, so it imports nothing of this project. One JSON object
per line: {"prompts": [[ids]], "max_tokens": n} in, {"texts", "tokens", "wall", "cpu"} out. All
prompts of a line are one batch of the continuous batching pipeline: paged KV, scheduled by the
library.

    python tools/peer_openvino.py MODEL.gguf [PROPERTY=VALUE ...]
"""

import importlib
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

MAX_BATCH_TOKENS = 2048
MAX_SEQUENCES = 64
CACHE_GIB = 1


def open_pipeline(path: str, properties: Sequence[str]) -> tuple[Any, Any]:
    """The library and a pipeline on one thread."""
    genai = importlib.import_module("openvino_genai")
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = MAX_BATCH_TOKENS
    scheduler.max_num_seqs = MAX_SEQUENCES
    scheduler.cache_size = CACHE_GIB
    scheduler.enable_prefix_caching = False
    named = {"INFERENCE_NUM_THREADS": 1, **dict(each.split("=", 1) for each in properties)}
    return genai, genai.ContinuousBatchingPipeline(path, scheduler, "CPU", named)


def answer(genai: Any, pipeline: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Generate for all prompts at once; greedy, without end."""
    config = genai.GenerationConfig()
    config.max_new_tokens = request["max_tokens"]
    config.ignore_eos = True
    config.do_sample = False
    config.apply_chat_template = False
    arrays = importlib.import_module("numpy")
    tensor = importlib.import_module("openvino").Tensor
    inputs = [tensor(arrays.array([ids], dtype=arrays.int64)) for ids in request["prompts"]]
    wall, cpu = time.perf_counter(), time.process_time()
    results = pipeline.generate(inputs, [config] * len(inputs))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    ids = [list(result.m_generation_ids[0]) for result in results]
    texts = [pipeline.get_tokenizer().decode(each) for each in ids]
    return {"texts": texts, "tokens": sum(map(len, ids)), "wall": wall, "cpu": cpu}


def main() -> None:
    """Open, say so, answer until the pipe ends."""
    genai, pipeline = open_pipeline(sys.argv[1], sys.argv[2:])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(genai, pipeline, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
