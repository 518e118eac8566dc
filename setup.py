"""Packaging. The top-level folders become `speciarl.core`, `speciarl.kernels`, ...

The mapping exists because SGLang depends on a PyPI package named `kernels`: a top-level
package of that name in our own wheel would break the environment that rollouts need.
"""

from setuptools import setup

PACKAGES = ["core", "kernels", "rollout", "judge", "bench"]

EXTRAS = {
    "triton": ["triton>=3.6; sys_platform == 'linux'"],
    "flash-attn": ["flash-attn>=2.7"],
    "sglang": ["sglang>=0.5.17"],
    "lora": ["peft>=0.17"],
    "judge": ["aiohttp>=3.10"],
    "trl": ["trl>=1.16"],
    "peers": ["trl>=1.16", "liger-kernel>=0.8"],
}
EXTRAS["dev"] = [
    # What pairs with torch 2.11 to 2.13; torch for CUDA brings its own.
    "triton>=3.6,<3.8; sys_platform == 'linux'",
    *EXTRAS["lora"],
    *EXTRAS["judge"],
    *EXTRAS["trl"],
    "pytest>=8",
    "pytest-timeout>=2.3",
    "hypothesis>=6",
    "ruff>=0.8",
    "mypy>=1.13",
]

setup(
    name="speciarl",
    version="0.1.0",
    description="Specificity-aware reinforcement learning for vision-language models",
    python_requires=">=3.11",
    packages=[f"speciarl.{name}" for name in PACKAGES],
    package_dir={f"speciarl.{name}": name for name in PACKAGES},
    package_data={
        "speciarl.core": ["presets/*.toml", "toybase/*"],
        "speciarl.judge": ["taxonomies/*.json"],
        "speciarl.rollout": ["sglang_reference.json"],
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.12,<6",
        "safetensors>=0.5",
        "numpy>=1.26",
        "click>=8.1",
        "pillow>=10",
        "rich>=13",
        "tensorboard>=2.16",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["speciarl = speciarl.core.cli:main"]},
)
