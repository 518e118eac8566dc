"""Everything of SGLang that this project calls, passes or reads: the table of the contract.

Names are SGLang's own. A name that starts to be used is written here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["call", "attribute", "fields", "arguments", "value", "words", "model"]

ENGINE = "srt.entrypoints.engine"
MANAGER = "srt.managers.tokenizer_manager"
MESSAGES = "srt.managers.io_struct"
UPDATER = "srt.model_executor.model_runner_components.weight_updater"
ARGUMENTS = "srt.arg_groups.fields"  # where ServerArgs has its fields from 0.5.18 on
MODELS = "srt.models"


@dataclass(frozen=True)
class Need:
    """One thing that SGLang must have."""

    kind: Kind
    """"call": a function and its parameters. "attribute": a name in a class or a module. "fields":
    a class and its fields. "arguments": the fields of ServerArgs. "value": a constant and its
    value. "words": string constants or identifiers of a file. "model": a class of a model."""
    module: str
    """From where it is imported, without "sglang."."""
    name: str
    """"Engine.async_generate"; of words, what they are together."""
    why: str
    """What it is used for."""
    parts: tuple[str, ...] = ()
    """Parameters ("**" is any keyword), fields, values or words that are used."""
    optional: bool = False
    """Without it something else is done, or cannot be asked for."""


_CALLS = (
    Need("call", ENGINE, "Engine.__init__", "starting an engine", ("**",)),
    Need("call", ENGINE, "Engine.async_generate", "completions, and the scores of a judge's labels",
         ("input_ids", "sampling_params", "return_logprob", "logprob_start_len",
          "token_ids_logprob", "image_data")),
    Need("call", ENGINE, "Engine.release_memory_occupation", "sleeping", ("tags",)),
    Need("call", ENGINE, "Engine.resume_memory_occupation", "waking", ("tags",)),
    Need("call", ENGINE, "Engine.get_server_info", "how many tokens an engine takes"),
    Need("call", ENGINE, "Engine.shutdown", "replaced: it would end all children of this process"),
    Need("call", MANAGER, "TokenizerManager.update_weights_from_tensor",
         "pushing weights", ("obj", "request")),
    Need("call", MANAGER, "TokenizerManager.abort_request", "ending requests under way",
         ("abort_all",)),
    Need("call", "srt.utils", "MultiprocessingSerializer.serialize", "packing weights for a push",
         ("obj",)),
    Need("call", "srt.weight_sync.tensor_bucket", "FlattenedTensorBucket.__init__",
         "many weights in one tensor", ("named_tensors",)),
    Need("call", "srt.weight_sync.tensor_bucket", "FlattenedTensorBucket.get_flattened_tensor",
         "many weights in one tensor"),
    Need("call", "srt.weight_sync.tensor_bucket", "FlattenedTensorBucket.get_metadata",
         "many weights in one tensor"),
    Need("call", "srt.utils.patch_torch", "monkey_patch_torch_reductions",
         "CUDA memory shared with an engine that numbers GPUs in another way"),
    Need("call", ENGINE, "Engine.begin_weight_update", "weight updates in a session",
         optional=True),
    Need("call", ENGINE, "Engine.end_weight_update", "weight updates in a session", optional=True),
    Need("call", "srt.utils.torch_memory_saver_adapter", "TorchMemorySaverAdapter.create",
         "sleeping frees memory on a GPU", optional=True),
    Need("call", "srt.runtime_context", "snapshot_context", "several engines in one process",
         optional=True),
    Need("call", "srt.runtime_context", "restore_context", "several engines in one process",
         ("state",), optional=True),
)  # fmt: skip

_ATTRIBUTES = (
    Need("attribute", ENGINE, "Engine.run_scheduler_process_func", "tying processes to this one"),
    Need("attribute", ENGINE, "Engine.run_detokenizer_process_func", "tying processes to this one"),
    Need("attribute", ENGINE, "Engine.tokenizer_manager", "requests and weights"),
    Need("attribute", ENGINE, "Engine.loop", "requests that run side by side"),
    Need("attribute", ENGINE, "Engine.port_args", "where an engine listens"),
    Need("attribute", MANAGER, "TokenizerManager._subprocess_watchdog",
         "stopped: it would end this process with the engine's"),
    Need("attribute", MANAGER, "TokenizerManager.mm_processor", "its workers are ended on closing"),
)  # fmt: skip

_DATA = (
    Need("fields", MESSAGES, "UpdateWeightsFromTensorReqInput", "a push of weights",
         ("serialized_named_tensors", "load_format", "flush_cache", "weight_version")),
    Need("fields", "srt.sampling.sampling_params", "SamplingParams", "how tokens are chosen",
         ("max_new_tokens", "temperature", "top_p", "top_k", "stop_token_ids", "stop_regex",
          "logit_bias", "ignore_eos")),
    Need("fields", "srt.sampling.sampling_params", "SamplingParams", "a seed for each sample",
         ("sampling_seed",), optional=True),
    Need("fields", "srt.server_args", "PortArgs", "shared memory is removed after a kill",
         ("instance_id",)),
    Need("arguments", "srt.server_args", "ServerArgs", "settings of an engine",
         ("model_path", "device", "dtype", "tp_size", "port", "nccl_port", "base_gpu_id",
          "random_seed", "log_level", "skip_server_warmup", "grammar_backend", "sleep_on_idle",
          "mem_fraction_static", "max_total_tokens", "max_running_requests", "weight_version",
          "disable_radix_cache", "enable_memory_saver", "enable_weights_cpu_backup",
          "attention_backend", "mm_attention_backend", "disable_cuda_graph",
          "disable_overlap_schedule", "quantization", "kv_cache_dtype",
          "json_model_override_args")),
    Need("arguments", "srt.server_args", "ServerArgs", "the same samples whatever the batch",
         ("enable_deterministic_inference",), optional=True),
    Need("value", "srt.constants", "GPU_MEMORY_TYPE_KV_CACHE", "sleeping and waking",
         ("kv_cache",)),
    Need("value", "srt.constants", "GPU_MEMORY_TYPE_WEIGHTS", "sleeping and waking", ("weights",)),
    Need("value", "srt.constants", "GPU_MEMORY_TYPE_CUDA_GRAPH", "sleeping and waking",
         ("cuda_graph",)),
)  # fmt: skip

_WORDS = (
    Need("words", UPDATER, "the format of packed weights", "pushing weights",
         ("flattened_bucket", "flattened_tensor", "metadata")),
    Need("words", MANAGER, "the keys of meta_info", "reading an answer",
         ("finish_reason", "weight_version", "cached_tokens", "output_token_logprobs",
          "output_token_ids_logprobs")),
    Need("words", "srt.multimodal.processors.base_processor", "the format of processed images",
         "the engine sees the trainer's pixels", ("processor_output",)),
    Need("words", "srt.mem_cache.kv_cache_builder", "SGLANG_VLM_CACHE_SIZE_MB",
         "no image features of other weights are reused",
         ("SGLANG_VLM_CACHE_SIZE_MB", "init_mm_embedding_cache")),
    Need("words", "srt.platforms", "SGLANG_USE_CPU_ENGINE", "engines on a CPU",
         ("SGLANG_USE_CPU_ENGINE",)),
    Need("words", "srt.layers.sampler", "SGLANG_RETURN_ORIGINAL_LOGPROB",
         "log-probs are taken at the sampling temperature", ("SGLANG_RETURN_ORIGINAL_LOGPROB",)),
    Need("words", "srt.managers.load_snapshot", "shared memory of loads",
         "shared memory is removed after a kill", ("/dev/shm/sglang_loads_",)),
    Need("words", "srt.utils.stale_shm_cleanup", "shared memory of queues",
         "shared memory is removed after a kill", ("sgl_shm",)),
)  # fmt: skip

_MODEL_CLASSES = tuple(
    Need("model", MODELS, name, "the policies that are trained")
    for name in ("Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration")
)

NEEDS = (*_CALLS, *_ATTRIBUTES, *_DATA, *_WORDS, *_MODEL_CLASSES)
