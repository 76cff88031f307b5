"""The tasks of the bundled model: deterministic, right, checkable, with a true held-out split."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.model_tasks import (
    CHAT_TASKS,
    COLORS,
    TASKS,
    WORDS,
    Task,
    check,
    generate,
    generate_mixed,
    parse_call,
    system_message,
)
from tools.needle_task import MAX_NEEDLE_TOKENS, MIN_NEEDLE_TOKENS, needle

NAMES = st.sampled_from(sorted(TASKS))
ALL_NAMES = st.sampled_from(sorted((*TASKS, *CHAT_TASKS)))
SEEDS = st.integers(0, 2**32)


def _solve(task: Task) -> str:
    """Work the answer out from the key, independently of the generator."""
    fields = task.key.split(" ")
    match task.name:
        case "echo":
            return task.key
        case "repeat":
            return (fields[0] + " ") * (int(fields[1]) - 1) + fields[0]
        case "spell":
            return " ".join(list(fields[0]))
        case "add":
            return f"{int(fields[0]) + int(fields[1])}"
        case "subtract":
            return f"{int(fields[0]) - int(fields[1])}"
        case "json":
            return f'{{"name": "{fields[0]}", "color": "{fields[1]}", "count": {fields[2]}}}'
        case "reverse":
            return " ".join(fields[::-1])
        case "sort":
            return " ".join(sorted(fields))
    pytest.fail(f"no independent solution for {task.name}")


@given(name=ALL_NAMES, seed=SEEDS)
def test_same_seed_draws_the_same_task(name: str, seed: int) -> None:
    assert generate(name, random.Random(seed)) == generate(name, random.Random(seed))


@given(name=NAMES, seed=SEEDS)
def test_answer_is_right_and_prompt_holds_its_content(name: str, seed: int) -> None:
    task = generate(name, random.Random(seed))
    assert task.name == name
    assert task.answer == _solve(task)
    content = task.key.split(" ")[:1] if name == "spell" else task.key.split(" ")
    assert all(field in task.prompt for field in content)
    assert check(task, task.answer)
    assert check(task, f" {task.answer}\n")


@given(name=NAMES, seed=SEEDS)
def test_a_damaged_answer_is_refused(name: str, seed: int) -> None:
    task = generate(name, random.Random(seed))
    assert not check(task, "")
    assert not check(task, task.answer + "0")
    assert not check(task, task.answer[:-1])


def test_json_is_compared_by_value_not_by_layout() -> None:
    task = generate("json", random.Random(3))
    value = json.loads(task.answer)
    assert check(task, json.dumps(value, indent=2))
    assert not check(task, json.dumps(value | {"count": str(value["count"])}))
    assert not check(task, json.dumps(value | {"count": float(value["count"])}))
    assert not check(task, "[1")


@pytest.mark.parametrize("name", sorted((*TASKS, *CHAT_TASKS)))
def test_splits_share_no_content(name: str) -> None:
    rng = random.Random(name)
    trained = {generate(name, rng, split="train").key for _ in range(100)}
    held_out = {generate(name, rng, split="held_out").key for _ in range(40)}
    assert trained.isdisjoint(held_out)


@given(name=ALL_NAMES, seed=SEEDS)
def test_the_prompt_is_the_last_message_of_the_user(name: str, seed: int) -> None:
    task = generate(name, random.Random(seed))
    users = [message for message in task.messages if message["role"] == "user"]
    assert users[-1]["content"] == task.prompt
    assert bool(task.tools) == name.startswith("tool_")
    assert name in CHAT_TASKS or task.messages == ({"role": "user", "content": task.prompt},)
    json.dumps([task.messages, task.tools])


@given(seed=SEEDS)
def test_a_call_names_a_listed_function_with_exactly_its_parameters(seed: int) -> None:
    task = generate("tool_call", random.Random(seed))
    call = parse_call(task.answer)
    assert call is not None
    listed = {tool["function"]["name"]: tool["function"] for tool in task.tools}
    properties = listed[call["name"]]["parameters"]["properties"]
    assert set(call["arguments"]) == set(properties)
    kinds = {"integer": int, "string": str}
    for name, value in call["arguments"].items():
        assert isinstance(value, kinds[properties[name]["type"]])
        assert str(value) in task.prompt
    assert 1 <= len(listed) <= 4


def test_a_call_is_compared_by_value() -> None:
    task = generate("tool_call", random.Random(1))
    call = parse_call(task.answer)
    assert call is not None
    swapped = {"arguments": call["arguments"], "name": call["name"]}
    assert check(task, f"<tool_call>{json.dumps(swapped, indent=1)}</tool_call>")
    assert not check(task, json.dumps(call))
    assert not check(task, f"<tool_call>{json.dumps(call | {'name': 'other'})}</tool_call>")
    assert not check(task, "<tool_call>{</tool_call>")
    assert not check(task, "")


@given(seed=SEEDS)
def test_the_answer_to_a_result_follows_from_the_messages(seed: int) -> None:
    task = generate("tool_result", random.Random(seed))
    *_, request, call, result = task.messages
    assert [message["role"] for message in (request, call, result)] == ["user", "assistant", "tool"]
    assert result["tool_call_id"] == call["tool_calls"][0]["id"]
    called = call["tool_calls"][0]["function"]
    assert called["name"] in [tool["function"]["name"] for tool in task.tools]
    for value in json.loads(called["arguments"]).values():
        assert str(value) in request["content"]
    returned = json.loads(result["content"])
    assert returned == {"status": "done"} or str(*returned.values()) in task.answer


def test_a_request_that_needs_no_function_is_answered_without() -> None:
    rng = random.Random(6)
    for _ in range(100):
        plain = generate("tool_none", rng)
        assert parse_call(plain.answer) is None
        assert plain.key.split(" ")[0] in TASKS


@given(seed=SEEDS, num_tokens=st.integers(MIN_NEEDLE_TOKENS, MAX_NEEDLE_TOKENS))
def test_a_secret_stands_once_in_the_text(seed: int, num_tokens: int) -> None:
    task = needle(random.Random(seed), num_tokens=num_tokens)
    kind = task.key.split(" ")[0]
    assert task.prompt.count(f"The secret {kind} is {task.answer}.") == 1
    assert task.prompt.count(f"The secret {kind} is ") == 1
    assert task.prompt.endswith(f"\nWhat is the secret {kind}?")


@given(seed=SEEDS)
def test_a_sum_is_held_out_in_both_orders(seed: int) -> None:
    task = generate("add", random.Random(seed))
    left, right = sorted(int(field) for field in task.key.split(" "))
    assert task.key == f"{left} {right}"


def test_every_word_is_spelled_in_training_and_held_out_in_one_wording() -> None:
    rng = random.Random(0)
    drawn = [generate("spell", rng) for _ in range(20_000)]
    held_out = {task.key for task in drawn if task.is_held_out}
    assert sorted(key.split(" ")[0] for key in held_out) == list(WORDS)
    assert {t.key.split(" ")[0] for t in drawn if not t.is_held_out} == set(WORDS)


def test_mixed_draw_follows_the_weights() -> None:
    weights = {"add": 3.0, "json": 1.0}
    drawn = generate_mixed(weights, random.Random(1), num_tasks=400, split="held_out")
    num_sums = sum(task.name == "add" for task in drawn)
    assert len(drawn) == 400
    assert 250 < num_sums < 350
    assert all(task.is_held_out for task in drawn)


def test_unknown_task_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"task: 'divide' is not known; use one of echo"):
        generate("divide", random.Random(0))


def test_word_lists_have_no_repeats_and_sort_as_plain_text() -> None:
    assert list(WORDS) == sorted(set(WORDS))
    assert list(COLORS) == sorted(set(COLORS))
    assert all(word.isascii() and word.islower() for word in WORDS)


@given(seed=SEEDS)
def test_system_message_is_deterministic_text(seed: int) -> None:
    message = system_message(random.Random(seed))
    assert message == system_message(random.Random(seed))
    assert message.strip()


def test_the_task_module_loads_no_torch() -> None:
    code = "import sys, tools.model_tasks; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
