"""Ranges, contradictions and defaults of the fields that are not the prompt."""

import msgspec
import pytest

from appliance.api.errors import ApiError
from appliance.api.schemas import ChatBody, CompletionBody
from appliance.api.validate import Limits, Plan, Streaming, check_model, check_total, plan_of
from appliance.core.payload import Sampling
from appliance.core.types import Slo

LIMITS = Limits(max_model_len=128, vocab_size=1000, max_sequences=8, eos_token_ids=(2,))


def chat(**fields) -> Plan:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return plan_of(msgspec.convert(body, ChatBody), Slo(), LIMITS, scope="")


def completion(**fields) -> Plan:
    body = msgspec.convert({"prompt": "hi", **fields}, CompletionBody)
    return plan_of(body, Slo(), LIMITS, scope="")


def test_defaults_are_those_of_the_openai_api():
    plan = chat()
    assert plan.sampling == Sampling(temperature=1.0, eos_token_ids=(2,))
    assert (plan.n, plan.max_tokens, plan.seed, plan.streaming) == (1, None, None, None)
    assert (plan.salt, plan.priority, plan.logprobs) == ("", 0, None)


def test_all_sampling_fields_arrive():
    plan = chat(
        temperature=0,
        top_p=0.5,
        top_k=7,
        min_p=0.1,
        seed=5,
        n=3,
        stop=["a", "b"],
        stop_token_ids=[4],
        min_tokens=2,
        max_tokens=9,
        ignore_eos=True,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        logprobs=True,
        top_logprobs=4,
        cache_salt="pepper",
        priority=-3,
    )
    assert plan.sampling == Sampling(
        temperature=0.0,
        top_p=0.5,
        top_k=7,
        min_p=0.1,
        stop=("a", "b"),
        stop_token_ids=(4,),
        eos_token_ids=(2,),
        min_tokens=2,
        ignore_eos=True,
        skip_special_tokens=False,
        include_stop=True,
        logprobs=4,
    )
    assert (plan.n, plan.seed, plan.max_tokens) == (3, 5, 9)
    assert (plan.salt, plan.priority, plan.logprobs) == ("pepper", -3, 4)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": -1}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -4}, "max_completion_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "x" * 2000}, "stop"),
        ({"stop_token_ids": [1000]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 300}, "stop_token_ids"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 3, "logprobs": False}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {}, "stream": False}, "stream_options"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"priority": 2**40}, "priority"),
    ],
)
def test_a_value_out_of_range_names_the_field_and_the_fix(fields, param):
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400
    assert caught.value.body.param == param
    assert param in caught.value.body.message


def test_a_completion_has_its_own_logprobs():
    assert completion(logprobs=0).logprobs == 0
    assert completion(logprobs=5).sampling.logprobs == 5
    with pytest.raises(ApiError) as caught:
        completion(logprobs=21)
    assert caught.value.body.param == "logprobs"


def test_filters_that_keep_everything_are_off():
    assert chat(top_k=-1).sampling.top_k == 0
    assert chat(top_k=5000).sampling.top_k == 0


def test_top_p_zero_keeps_the_single_best_token():
    sampling = chat(top_p=0).sampling
    assert (sampling.top_p, sampling.top_k) == (1.0, 1)


def test_equal_limits_under_both_names_are_one_limit():
    assert chat(max_tokens=7, max_completion_tokens=7).max_tokens == 7
    assert chat(max_completion_tokens=7).max_tokens == 7


def test_a_negative_seed_is_a_seed():
    assert chat(seed=-1).seed == 2**63 - 1


def test_running_usage_needs_usage():
    both = {"include_usage": True, "continuous_usage_stats": True}
    plan = chat(stream=True, stream_options=both)
    assert plan.streaming == Streaming(include_usage=True, continuous_usage=True)
    assert chat(stream=True).streaming == Streaming()
    with pytest.raises(ApiError) as caught:
        chat(stream=True, stream_options={"continuous_usage_stats": True})
    assert caught.value.body.param == "stream_options.continuous_usage_stats"


def test_another_model_is_not_found():
    check_model(None, "m")
    check_model("m", "m")
    for name in ("", "other"):
        with pytest.raises(ApiError) as caught:
            check_model(name, "m")
        assert (caught.value.status, caught.value.body.code) == (404, "model_not_found")


def test_answers_per_request_are_bounded():
    check_total(2, 4, LIMITS)
    with pytest.raises(ApiError) as caught:
        check_total(3, 3, LIMITS)
    assert caught.value.body.param == "prompt"
