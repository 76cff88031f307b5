"""HyperFlexis: budgets for every step, late binding from one queue, demotion instead of collapse.

After the abstracts of arXiv 2508.15919 (v1 to v3): budget estimation and prioritisation for new and
ongoing requests, prefill and decode scheduled each for itself, migration, role changes. The paper's
own rules were not published in what could be read; what is stated there and what is ours, with the
formulas, is in `docs/hyperflexis.md`. The parts:

    hyperflexis_budget     settings, due times, the pace of a worker
    hyperflexis_queue      lanes of what waits, shedding under overload
    hyperflexis_workers    estimates of the workers
    hyperflexis_dispatch   who goes where, who is too late (slots of the Dispatcher)
    hyperflexis_decode     where answers are decoded, migration
    hyperflexis_step       the step (slots of the Batcher)
"""

from collections.abc import Mapping

from appliance.core.slots import BatchSlots, DispatchSlots, Policy
from appliance.policy.dispatch_parts import admit_all
from appliance.policy.hyperflexis_budget import HyperflexisSettings
from appliance.policy.hyperflexis_decode import Migrator
from appliance.policy.hyperflexis_dispatch import HyperflexisDispatch
from appliance.policy.hyperflexis_step import HyperflexisStep
from appliance.policy.settings import read_settings


def hyperflexis(settings: Mapping[str, object]) -> Policy:
    """The policy. Raises `PolicySettingsError` for a setting it does not have."""
    known = read_settings(HyperflexisSettings, settings, policy="hyperflexis")
    dispatch = HyperflexisDispatch(known)
    step = HyperflexisStep(known)
    return Policy(
        name="hyperflexis",
        dispatch=DispatchSlots(
            admit=admit_all,
            order=dispatch.order,
            place=dispatch.place,
            wakeup=dispatch.wakeup,
            late=dispatch.late,
            migrate=Migrator(known) if known.migrate else None,
        ),
        batch=BatchSlots(victim=step.victim, fill=step.fill),
        chunk=0,
    )
