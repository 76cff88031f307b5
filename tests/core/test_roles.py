"""Roles: presets over the bounds of a step, and what they do to one."""

from appliance.core.batcher import Batcher
from appliance.core.messages import Assign, SetBudget, SetRole
from appliance.core.roles import RolePreset, preset
from appliance.core.types import BatcherConfig, Request, RequestId, Role
from tests.core.toy_worker import FCFS, WORKER, paged, result_of

CONFIG = BatcherConfig(max_model_len=64, max_num_seqs=8, max_batch_tokens=20)


def test_a_role_is_a_preset_that_serves_both_phases() -> None:
    assert preset(Role.MIXED, CONFIG) == preset(Role.PREFILL, CONFIG)
    assert preset(Role.PREFILL, CONFIG).beside_decodes == 20
    decode = preset(Role.DECODE, CONFIG)
    assert decode == RolePreset(prefill_tokens=20, beside_decodes=5, max_decodes=8)
    tiny = BatcherConfig(max_model_len=64, max_batch_tokens=2)
    assert preset(Role.DECODE, tiny).beside_decodes == 1


def _batcher(role: Role) -> Batcher:
    batcher = Batcher(WORKER, CONFIG, groups=[paged(64)], policy=FCFS, role=role)
    for number in (1, 2):
        request = Request(id=RequestId(number), arrived=0.0, prompt_tokens=18, max_tokens=9)
        batcher.handle(Assign(worker=WORKER, request=request), 0.0)
    return batcher


def _tokens(batcher: Batcher) -> list[int]:
    plan = batcher.next_step(0.0)
    assert plan is not None
    results = [item for item in plan.work if item.samples]
    sampling = plan.__class__(step=plan.step, work=tuple(results))
    batcher.finish_step(result_of(sampling, 1), 0.0)
    return [item.num_tokens for item in plan.work]


def test_at_a_decode_worker_a_prompt_gets_a_small_part_of_a_step_with_decodes() -> None:
    batcher = _batcher(Role.DECODE)
    assert _tokens(batcher) == [18, 2], "nothing decodes yet"
    assert _tokens(batcher) == [1, 5]
    mixed = _batcher(Role.MIXED)
    assert _tokens(mixed) == [18, 2]
    assert _tokens(mixed) == [1, 16]


def test_a_new_role_counts_from_the_next_step_and_a_budget_overrides_it() -> None:
    batcher = _batcher(Role.MIXED)
    _tokens(batcher)
    batcher.handle(SetRole(worker=WORKER, role=Role.DECODE, epoch=1), 0.0)
    assert (batcher.role, batcher.role_epoch) == (Role.DECODE, 1)
    assert _tokens(batcher) == [1, 5]
    batcher.handle(SetBudget(worker=WORKER, prefill_tokens=7, max_decodes=8), 0.0)
    assert _tokens(batcher) == [1, 7]
