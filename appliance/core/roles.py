"""What a role means at a worker: a preset over two bounds of a step.

A role is a preference, never a prohibition: in each role a worker serves whatever it is given. A
decode worker only takes care that a prompt, which it seldom gets, does not hold up its decodes.
"""

from appliance.core.types import BatcherConfig, Record, Role

DECODE_SHARE = 4
"""While anything decodes, a decode worker gives prompts one part in so many of a step."""


class RolePreset(Record, frozen=True, kw_only=True):
    """Bounds of one step: prefill tokens when nothing decodes and beside decodes, and sequences in
    decode. All at least 1."""

    prefill_tokens: int
    beside_decodes: int
    max_decodes: int


def preset(role: Role, config: BatcherConfig) -> RolePreset:
    """The bounds of a worker in this role."""
    tokens = config.max_batch_tokens
    share = DECODE_SHARE if role is Role.DECODE else 1
    return RolePreset(
        prefill_tokens=tokens,
        beside_decodes=max(1, tokens // share),
        max_decodes=config.max_num_seqs,
    )
