"""What a server offers, found out by asking: a field counts only if its effect is seen."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from speciarl.judge.base import Pair
from speciarl.judge.http_retry import Fault
from speciarl.judge.prompt import LABELS, messages
from speciarl.judge.replies import GUIDES, TOPS, Plan, has_logprobs, label_in, text_of, verdict_in

T = TypeVar("T")

# Nobody who is free to say anything answers this with a label.
_OFF_LABEL = [{"role": "user", "content": "Reply with the single word: hello"}]
_EASY = Pair("European Robin", "European Robin")
_CONNECTIONS = {
    "timeout": "is it running? If it is only slow, raise timeout",
    "unreachable": "is it running?",
    "disconnected": "is it running, and does base_url name it?",
    "server-error": "is it running well? Its own log says more",
    "busy": "wait, lower concurrency or raise retries",
}
_NO_CHAT = "does base_url name a server of OpenAI's chat completions?"


class Ask(Protocol):
    """What `read` makes of an answer; `once`: repeated once at most. Raises Fault."""

    async def __call__(self, body: dict[str, Any], read: Callable[[Any], T], once: bool) -> T: ...


async def explore(model: str, variant: str, ask: Ask) -> Plan:
    """The plan that gets most out of the server; its last request is a verdict by that plan.

    Raises the Fault of a server that answers nothing, or no label.
    """
    easy = messages(_EASY, variant)
    plan = Plan(top=0)
    try:
        text = await ask(plan.body(model, easy), text_of, False)
    except Fault as fault:  # a chat template without a system role
        if fault.reason != "rejected":
            raise
        plan = replace(plan, system=False)
        text = await ask(plan.body(model, easy), text_of, False)
    if label_in(text) is None:  # a template that makes the model think first
        silent = replace(plan, silent=True)
        if label_in(await _offered(ask, silent.body(model, easy), text_of) or "") is not None:
            plan = silent
    for top in TOPS:
        wanted = replace(plan, top=top)
        if await _offered(ask, wanted.body(model, easy), has_logprobs):
            plan = wanted
            break
    plan = await _guided(ask, model, plan)
    await ask(plan.body(model, easy), lambda reply: verdict_in(reply, variant), False)
    return plan


async def _guided(ask: Ask, model: str, plan: Plan) -> Plan:
    """With log-probabilities only guides that hold the first token are of use."""
    for guide in GUIDES:
        if plan.top and guide == "json_schema":
            continue
        guided = replace(plan, guide=guide)
        said = await _offered(ask, guided.body(model, _OFF_LABEL), text_of)
        if label_in(said or "") is not None:
            return guided
    return plan


async def _offered(ask: Ask, body: dict[str, Any], read: Callable[[Any], T]) -> T | None:
    """None where the server does not take the fields of `body`."""
    try:
        return await ask(body, read, True)
    except Fault as fault:
        if fault.reason in ("rejected", "server-error"):  # some fail where they should refuse
            return None
        raise


def explained(fault: Fault, url: str, model: str, key_env: str, key_sent: bool) -> Exception:
    """What to do about a server that cannot judge."""
    said, where = fault.detail, f"judge server {url}"
    if fault.reason == "unauthorised":
        hint = f"the key in {key_env} is not accepted"
        if not key_env:
            hint = "it wants a key: name the environment variable that holds it in key_env"
        elif not key_sent:
            hint = f"it wants a key: put it into the environment variable {key_env}"
        return PermissionError(f"{where}: {hint} ({said})")
    if fault.reason in _CONNECTIONS:
        return ConnectionError(f"{where}: {fault.reason} ({said}): {_CONNECTIONS[fault.reason]}")
    if fault.reason == "not-found":
        return ValueError(f"{where}: no model {model!r}, or base_url lacks its /v1 ({said})")
    if fault.reason == "no-label":
        labels = ", ".join(LABELS)
        return ValueError(
            f"{where}: model {model!r} answers {said} where one of {labels} is asked for: "
            "it cannot judge"
        )
    hint = "set base_url to the address itself" if fault.reason == "redirected" else _NO_CHAT
    return ValueError(f"{where}: {fault.reason} ({said}): {hint}")
