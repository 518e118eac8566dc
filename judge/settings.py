"""The settings of a judge: section [judge] of a run, and [evaluation.judge]."""

import math
import re
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from speciarl.judge.prompt import DEFAULT_VARIANT, VARIANTS

KINDS = ("taxonomy", "transformers", "openai", "sglang")
SAME = "same"  # evaluation's word for "as in training"
AUTO = "auto"
VOTES = ("majority", "median")
_MOST_PAIRS = 64  # threads that grade for a judge elsewhere; more only wait for each other


@dataclass(frozen=True)
class JudgeConfig:
    """Which judge, and how it is run. Raises ValueError naming the field, its value and the fix."""

    kind: str = "taxonomy"
    """"taxonomy": exact, from the taxonomy files of the data tables; "transformers": a language
    model in this process; "sglang": one in SGLang, which takes turns with the rollout engine;
    "openai": any server that speaks OpenAI's chat completions (vLLM, SGLang, hosted)."""
    model: str = ""
    """Folder or hub name of the language model, or the name that the server knows it by."""
    base_url: str = ""
    """Address of the server, up to and with /v1."""
    key_env: str = ""
    """Name of the environment variable that holds the server's key, never the key itself; "" for
    a server that wants none."""
    variant: str = DEFAULT_VARIANT
    """Wording of the question."""
    concurrency: int = 32
    """Questions that a server has to answer at the same time."""
    timeout: float = 30.0
    """Seconds that a server may take for one question."""
    retries: int = 4
    """Repetitions of a question that failed, before it is given up for this step."""
    token_budget: int = 65536
    """Tokens that a model in this process reads at once, instructions included."""
    device: str = AUTO
    """Of a model in this process: "auto" (as the policy), "cpu", "cuda" or "cuda:0"."""
    dtype: str = AUTO
    """Of a model in this process: "auto" (as stored), "bfloat16", "float16" or "float32"."""
    memory: float = 0.0
    """Share of the device's memory for "sglang", weights included; 0 lets it choose."""
    server_args: str = ""
    """Further server arguments of "sglang", as in "tp_size=2 quantization=fp8 port=31000"."""
    panel: tuple[str, ...] = ()
    """Members of a panel. Each is a text of key=value words over the settings here, as in
    "variant=relation" or "kind=openai model=llama base_url=http://host:8000/v1"; two or more. Each
    member in this process holds a model of its own."""
    vote: str = "majority"
    """Of a panel: "majority", or "median" of the ladder; a tie goes to the lower category."""
    noise: float = 0.0
    """Share of verdicts moved one step up or down the ladder, an ablation; not in evaluation by the
    same judge."""
    noise_seed: int = 0
    """Of the moves."""
    cache: str = AUTO
    """File of verdicts that outlive the run; "auto": verdicts.sqlite beside the run folder, for
    judges with a model; "" for none. Processes of several hosts must not share one (on a network
    file system): a run over several hosts takes verdicts.HOST.sqlite."""
    max_fault_share: float = 0.5
    """Share of a step's pairs that may stay without a verdict; more, or all, stops the run."""
    workers: int = 0
    """Threads that grade finished groups while others are still being generated; 0 takes one for
    "taxonomy", else as many as questions may be under way (`concurrency`), at most 64."""

    def __post_init__(self) -> None:
        _choice("kind", self.kind, (*KINDS, SAME))
        _choice("variant", self.variant, VARIANTS)
        _choice("vote", self.vote, VOTES)
        _choice("dtype", self.dtype, (AUTO, "bfloat16", "float16", "float32"))
        self._require_ranges()
        self._require_address()
        if self.panel:
            self.members()
        else:
            self._require_model()

    def _require_ranges(self) -> None:
        for name in ("concurrency", "token_budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("retries", "workers", "noise_seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        for name in ("noise", "max_fault_share", "memory"):
            if not 0 <= getattr(self, name) <= 1:  # nan too
                raise ValueError(f"{name} = {getattr(self, name)}: must be from 0 to 1")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ValueError(f"timeout = {self.timeout}: must be a number of seconds above 0")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device = {self.device!r}: auto, cpu, cuda or cuda:N")

    def _require_address(self) -> None:
        """Neither message repeats the value: it may hold what must not be shown."""
        if not re.fullmatch(r"([A-Z_][A-Z0-9_]*)?", self.key_env):
            raise ValueError(
                "key_env must be the name of an environment variable (capital letters, digits, _) "
                "that holds the key, not the key itself"
            )
        try:
            address = urlsplit(self.base_url)
        except ValueError:  # half a bracket
            raise ValueError("base_url is no address: must be http://HOST[:PORT]/v1") from None
        if "@" in address.netloc or address.query or address.fragment:
            raise ValueError(
                "base_url must hold no user, password or query: put the key into the environment "
                "variable that key_env names"
            )
        if self.base_url and (address.scheme not in ("http", "https") or not address.netloc):
            raise ValueError(f"base_url = {self.base_url!r}: must be http://HOST[:PORT]/v1")

    def _require_model(self) -> None:
        needed = {"transformers": ("model",), "sglang": ("model",), "openai": ("model", "base_url")}
        for name in needed.get(self.kind, ()):
            if not getattr(self, name):
                raise ValueError(f"{name} = '': kind {self.kind!r} needs it")

    @property
    def has_model(self) -> bool:
        """Whether any judge asked is a language model."""
        return any(member.kind != "taxonomy" for member in self.members())

    @property
    def threads(self) -> int:
        """Threads that grade groups."""
        if self.workers:
            return self.workers
        return min(self.concurrency, _MOST_PAIRS) if self.has_model else 1

    def members(self) -> tuple["JudgeConfig", ...]:
        """The judges that are asked: those of the panel, or this one.

        Raises ValueError naming the member, the word and the nearest key.
        """
        if not self.panel:
            return (self,)
        if len(self.panel) == 1:
            raise ValueError(f"panel = {list(self.panel)}: needs two members or more")
        return tuple(self._member(words, f"panel[{i}]") for i, words in enumerate(self.panel))

    def _member(self, words: str, where: str) -> "JudgeConfig":
        known: dict[str, Any] = {f.name: type(f.default) for f in fields(self)}
        ours = ("panel", "vote", "noise", "noise_seed", "cache", "max_fault_share", "workers")
        open_to = [name for name in known if name not in ours]
        values: dict[str, object] = {}
        for word in words.split():
            name, equals, text = word.partition("=")
            if not equals or name not in open_to:
                near = get_close_matches(name, open_to, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(
                    f"{where}: {name!r} is no key of a member; {hint}"
                    f"key=value words of: {', '.join(open_to)}"
                )
            try:
                values[name] = known[name](text)
            except ValueError:
                raise ValueError(
                    f"{where}: {name} = {text!r}: must be {known[name].__name__}"
                ) from None
        try:
            return replace(self, panel=(), **values)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def cache_file(self, auto: Path | None) -> Path | None:
        """Where verdicts are kept, None for nowhere; `auto` is what "auto" stands for."""
        if self.cache == AUTO:
            return auto
        return Path(self.cache).expanduser() if self.cache else None


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = get_close_matches(value, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{name} = {value!r}: {hint}known: {', '.join(known)}")
