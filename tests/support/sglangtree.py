"""A small package of SGLang's shape: all that the contract asks for, and nothing else."""

from __future__ import annotations

from speciarl.rollout.sglang_needs import NEEDS

ENGINE = "srt/entrypoints/engine.py"
MANAGER = "srt/managers/tokenizer_manager.py"
MIXIN = "srt/managers/tokenizer_control_mixin.py"
MESSAGES = "srt/managers/io_struct.py"
SAMPLING = "srt/sampling/sampling_params.py"
ARGUMENTS = "srt/server_args.py"
UPDATER = "srt/model_executor/model_runner_components/weight_updater.py"
BUCKET = "srt/weight_sync/tensor_bucket.py"
CACHE = "srt/mem_cache/kv_cache_builder.py"


def _struct(name: str, kinds: tuple[str, ...] = ("fields", "arguments")) -> str:
    """The body of a class with all fields that the table asks for."""
    parts = [p for need in NEEDS if need.kind in kinds and need.name == name for p in need.parts]
    return "".join(f"    {part}: object = None\n" for part in parts)


FILES = {
    "version.py": "from sglang._version import __version__\n",
    "_version.py": "__version__: str\n__version__ = version = '0.5.30'\n",
    ENGINE: """
from sglang.srt.entrypoints.base import EngineBase
class Engine(EngineBase):
    run_scheduler_process_func: object = staticmethod(print)
    run_detokenizer_process_func = staticmethod(print)
    def __init__(self, **kwargs):
        self.tokenizer_manager, self.port_args = None, kwargs
        if kwargs:
            self.loop = 1
    async def async_generate(self, prompt=None, sampling_params=None, input_ids=None,
            image_data=None, return_logprob=False, logprob_start_len=None, token_ids_logprob=None,
            *, stream=False):
        pass
    def get_server_info(self): ...
    def begin_weight_update(self, selector="all"): ...
    def end_weight_update(self): ...
""",
    "srt/entrypoints/base.py": """
class EngineBase:
    def shutdown(self): ...
    def release_memory_occupation(self, tags=None): ...
    def resume_memory_occupation(self, tags=None): ...
""",
    MANAGER: """
from sglang.srt.managers.tokenizer_control_mixin import TokenizerControlMixin as Control
class TokenizerManager(Control):
    def __init__(self):
        self._subprocess_watchdog = self.mm_processor = None
    def abort_request(self, rid="", abort_all=False):
        self.meta = {"finish_reason": 1, "weight_version": 2, "cached_tokens": 3}
        self.meta["output_token_logprobs"] = self.meta["output_token_ids_logprobs"] = 4
""",
    MIXIN: "class TokenizerControlMixin:\n"
    "    async def update_weights_from_tensor(self, obj, request=None): ...\n",
    MESSAGES: "class Base:\n    rid: str = ''\n"
    "class UpdateWeightsFromTensorReqInput(Base, kw_only=True):\n"
    + _struct("UpdateWeightsFromTensorReqInput"),
    "srt/utils/__init__.py": "from sglang.srt.utils.common import *\n",
    "srt/utils/common.py": "import io\nclass MultiprocessingSerializer:\n"
    "    @staticmethod\n    def serialize(obj, output_str=False): ...\n",
    "srt/utils/patch_torch.py": "def monkey_patch_torch_reductions(): ...\n",
    "srt/utils/torch_memory_saver_adapter.py": "class TorchMemorySaverAdapter:\n"
    "    def create(enable): ...\n",
    "srt/utils/stale_shm_cleanup.py": "PREFIX = 'sgl_shm'\n",
    "srt/runtime_context.py": "def snapshot_context(): ...\ndef restore_context(state): ...\n",
    BUCKET: """
class FlattenedTensorBucket:
    def __init__(self, named_tensors=None, flattened_tensor=None, metadata=None): ...
    def get_flattened_tensor(self): ...
    def get_metadata(self): ...
""",
    UPDATER: """
def update(load_format, bucket):
    if load_format == "flattened_bucket":
        return bucket["flattened_tensor"], bucket["metadata"]
""",
    SAMPLING: "class SamplingParams:\n" + _struct("SamplingParams"),
    ARGUMENTS: "class ServerArgs:\n    pass\nclass PortArgs:\n" + _struct("PortArgs"),
    "srt/arg_groups/fields/all.py": "class All:\n" + _struct("ServerArgs"),
    "srt/constants.py": "GPU_MEMORY_TYPE_KV_CACHE = 'kv_cache'\n"
    "GPU_MEMORY_TYPE_WEIGHTS = 'weights'\nGPU_MEMORY_TYPE_CUDA_GRAPH = 'cuda_graph'\n",
    "srt/multimodal/processors/base_processor.py": "FORMATS = ['processor_output']\n",
    CACHE: "init_mm_embedding_cache(envs.SGLANG_VLM_CACHE_SIZE_MB.get())\n",
    "srt/platforms/__init__.py": "CPU = os.getenv('SGLANG_USE_CPU_ENGINE', '0')\n",
    "srt/layers/sampler.py": "ORIGINAL = get_bool_env_var('SGLANG_RETURN_ORIGINAL_LOGPROB')\n",
    "srt/managers/load_snapshot.py": "def path(n):\n    return f'/dev/shm/sglang_loads_{n}.shm'\n",
    "srt/models/qwen2_5_vl.py": "class Qwen2_5_VLForConditionalGeneration(Module): ...\n",
    "srt/models/qwen3_vl.py": "class Qwen3VLForConditionalGeneration(Module): ...\n",
}
