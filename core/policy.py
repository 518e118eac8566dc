"""The policy: a transformers vision-language model, sharded, that scores completions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer

from speciarl.core.attention import NAME, ROUTES, choose_route
from speciarl.core.batch import PackedBatch
from speciarl.core.lora import adapters_off, add_lora
from speciarl.core.network import LogProbHead, PackedVLM
from speciarl.core.world import World
from speciarl.kernels.loss import LossSpec, policy_loss
from speciarl.kernels.routes import MODES, select
from speciarl.kernels.routes import ROUTES as HEAD_ROUTES

HEAD_MODES = (*MODES, "chunked")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is held."""

    path: str = "toy"
    """Checkpoint folder or hub name; "toy" is the packaged base policy of the toy world."""
    dtype: str = "auto"
    """Compute type: "bfloat16", "float32", or "auto" (bfloat16 on CUDA, float32 on the CPU).
    Trained weights and their optimizer state are float32 in either case."""
    lora_rank: int = 0
    """Rank of the LoRA adapters on every linear layer of the language model; 0 trains all."""
    lora_alpha: float = 32.0
    """LoRA scale: the adapters' product is multiplied by alpha / rank."""
    freeze_vision: bool = False
    """Leaves the vision tower as it is (always so with LoRA)."""
    checkpoint_activations: bool = False
    """Recomputes each layer in the backward pass: less memory, about a third more time."""
    reshard_after_forward: bool = True
    """Frees gathered weights between forward and backward: less memory, more traffic."""
    cpu_offload: bool = False
    """Keeps shards, gradients and optimizer state on the host."""
    attention: str = "auto"
    """"flash-attn", "varlen" (torch's own, CUDA), "sdpa" (padded), or "auto"."""
    head_route: str = "auto"
    """How log-probs are computed: "reference" (plain torch), "rows", "expsum" (Triton on CUDA), or
    "auto": the fastest that runs here and agrees with the reference at start."""
    head_mode: str = "auto"
    """What the head keeps for its backward pass: "store" (a table of tokens x vocabulary),
    "recompute" (nothing), "auto" (what memory allows), or "chunked" (the policy loss computed
    inside the head: least memory, nothing twice; not for gspo)."""
    head_chunk: int = 0
    """Rows of the head computed at once; 0 lets the route choose."""

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype={self.dtype!r}: one of auto, {', '.join(DTYPES)}")
        if self.attention not in ("auto", *ROUTES):
            raise ValueError(f"attention={self.attention!r}: one of auto, {', '.join(ROUTES)}")
        for name, known in (("head_route", HEAD_ROUTES), ("head_mode", HEAD_MODES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r}: one of {', '.join(known)}")
        if self.lora_rank < 0 or self.head_chunk < 0:
            raise ValueError("lora_rank and head_chunk must not be negative")

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """The type of the forward pass on this device."""
        if self.dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return DTYPES[self.dtype]

    @property
    def folder(self) -> str:
        """`path`, with "toy" replaced by the packaged checkpoint."""
        packaged = Path(__file__).parent / "toybase"
        return str(packaged) if self.path == "toy" else self.path


def load_model(config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """transformers' own class with the checkpoint's weights, on the host.

    Raises:
        OSError: no such checkpoint; the message names the path.
    """
    return AutoModelForImageTextToText.from_pretrained(config.folder, dtype=dtype)


class Policy:
    """Trainable model and, where the objective has a KL term, its frozen reference.

    Args:
        config: what to load and how to hold it.
        world: the process group to shard over.
        banned: token ids masked out of the distribution, exactly as the sampler masks them.
        reference: hold a reference (with LoRA: the same weights, adapters off).
        seed: of the adapters' first weights, the same on every rank.
    """

    def __init__(
        self,
        config: ModelConfig,
        world: World,
        banned: tuple[int, ...],
        *,
        reference: bool,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.world = world
        self.seed = seed
        self.dtype = config.compute_dtype(world.device)
        self.banned = torch.tensor(banned, device=world.device) if banned else None
        self.head_route: str | None = None
        self.net = self._shard(load_model(config, self._stored_dtype), trainable=True)
        # Taken now: between forward and backward FSDP shows the gathered tensors instead.
        self._sharded = dict(self.hf.named_parameters())
        self.image_token_id = int(self.hf.config.image_token_id)  # type: ignore[union-attr,arg-type]
        self.frozen: PackedVLM | None = None
        if reference and not config.lora_rank:
            self.frozen = self._shard(load_model(config, self.dtype), trainable=False)

    @property
    def hf(self) -> nn.Module:
        """The transformers model inside."""
        return self.net.model

    @property
    def _stored_dtype(self) -> torch.dtype:
        """Frozen weights need no fp32 copy; trained ones do."""
        return self.dtype if self.config.lora_rank else torch.float32

    def _shard(self, model: Any, *, trainable: bool) -> PackedVLM:
        config, world = self.config, self.world
        model.set_attn_implementation({"text_config": NAME, "vision_config": "sdpa"})
        outputs, inputs = model.lm_head.weight.shape
        if self.head_route is None:
            self.head_route = select(
                config.head_route, (outputs, inputs), device=world.device, dtype=self.dtype
            )
        head = LogProbHead(inputs, outputs, bias=False, device="meta")
        head.weight = model.lm_head.weight
        model.lm_head = head
        model.requires_grad_(trainable and not config.lora_rank)
        if trainable and config.lora_rank:
            add_lora(model, config.lora_rank, config.lora_alpha, self.seed)
        if config.freeze_vision:
            model.model.visual.requires_grad_(False)
        if trainable and config.checkpoint_activations:
            # Newer releases of transformers 5 warn of the older name.
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
            model.disable_input_require_grads()  # else frozen layers are differentiated too
        net = PackedVLM(model, choose_route(config.attention, world.device, self.dtype))
        net.train(trainable)
        cuda = world.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=cuda) if config.cpu_offload else OffloadPolicy()
        how: dict[str, Any] = {
            "mesh": world.mesh,
            # Inputs stay as they are: cast, the vision tower's rotary angles would lose bits that
            # the engine's keep.
            "mp_policy": MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False),
            "offload_policy": offload,
            "reshard_after_forward": config.reshard_after_forward,
        }
        for layer in [m for m in net.modules() if isinstance(m, GradientCheckpointingLayer)]:
            fully_shard(layer, **how)
        text = model.model.language_model
        if head.weight is text.get_input_embeddings().weight:
            # A tied weight belongs to one unit only, so its modules must share it.
            fully_shard([text.get_input_embeddings(), text.norm, head], **how)
        else:
            fully_shard(head, **how)
        fully_shard(net, **how)
        for unit in net.modules():
            if isinstance(unit, FSDPModule):
                # Losses carry global denominators: gradients add up, they are not averaged.
                unit.set_force_sum_reduction_for_comms(True)
                unit.set_gradient_divide_factor(1.0)
        if cuda and not config.cpu_offload:
            net.to(world.device)  # buffers; the shards are there already
        return net

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters (sharded) by transformers' names."""
        return {name: p for name, p in self._sharded.items() if p.requires_grad}

    def logprobs(self, batch: PackedBatch, *, temperature: float, entropy: bool = False) -> Any:
        """Log-probs [C] fp32, nats, of the targets under softmax(logits / temperature).

        With `entropy`, a pair (log-probs, entropy). Differentiable in the trainable weights.
        """
        return self.net(batch, **self._how(temperature), **self._kept(entropy))

    def loss(
        self,
        batch: PackedBatch,
        *,
        temperature: float,
        spec: LossSpec,
        old: Tensor | None,
        **columns: Any,
    ) -> tuple[Tensor, Tensor]:
        """The policy loss of a batch and its statistics; see `kernels.loss.policy_loss`.

        old [C] fp32: log-probs, None where the policy has not moved since the batch was sampled;
        columns: advantages, weights [S] fp32, ref and engine [C] fp32 or None.
        """
        columns |= {"sequence_ids": batch.sequence_ids, "spec": spec}
        if self.config.head_mode == "chunked":
            return self.net(batch, loss={"old": old, **columns}, **self._how(temperature))
        scored = self.logprobs(batch, temperature=temperature, entropy=spec.entropy_coef != 0)
        new, entropy = scored if isinstance(scored, tuple) else (scored, None)
        return policy_loss(new, new.detach() if old is None else old, entropy=entropy, **columns)

    def reference_logprobs(self, batch: PackedBatch, *, temperature: float) -> Tensor:
        """The same under the frozen reference, without gradient.

        Raises:
            RuntimeError: the policy was made without a reference.
        """
        if self.frozen is None and not self.config.lora_rank:
            raise RuntimeError("the policy holds no reference: make it with reference=True")
        off = adapters_off(self.hf) if self.frozen is None else nullcontext()
        with torch.no_grad(), off:
            return (self.frozen or self.net)(batch, **self._how(temperature), **self._kept(False))

    def _how(self, temperature: float) -> dict[str, Any]:
        return {
            "temperature": temperature,
            "banned": self.banned,
            "chunk": self.config.head_chunk or None,
            "route": self.head_route,
        }

    def _kept(self, entropy: bool) -> dict[str, Any]:
        mode = self.config.head_mode
        return {"return_entropy": entropy, "mode": "auto" if mode == "chunked" else mode}

    @torch.no_grad()
    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full weights by transformers' names, one at a time: LoRA merged, tied ones once.

        Collective: every rank must iterate to the end.
        """
        for name, parameter in self._sharded.items():
            if ".lora_" in name:
                continue
            weight = whole(parameter.to(self.dtype))  # cast first: half the traffic
            if name.endswith(".base_layer.weight"):
                layer = name.removesuffix(".base_layer.weight")
                a, b = (whole(self._sharded[f"{layer}.lora_{x}.default.weight"]) for x in "AB")
                adapted: Any = self.hf.get_submodule(layer)
                weight = weight + adapted.scaling["default"] * (b @ a)
            yield name.replace(".base_layer", ""), weight.to(self.dtype)

    def save_hf(self, folder: Path) -> None:
        """Writes the model in the Hugging Face layout, loadable by `from_pretrained`.

        Collective; rank 0 writes. Tokenizer and image processor are the caller's.
        """
        state = {}
        for name, weight in self.named_weights():
            if self.world.main:
                state[name] = weight.cpu().contiguous()
        if self.world.main:
            config = AutoConfig.from_pretrained(self.config.folder)
            config.dtype = self.dtype
            with torch.device("meta"):
                shell = AutoModelForImageTextToText.from_config(config)
            shell.generation_config = self.hf.generation_config  # stop ids above all
            if config.tie_word_embeddings:
                state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
            shell.save_pretrained(folder, state_dict=state)
        self.world.barrier()


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor (collective), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
