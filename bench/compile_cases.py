"""What `compile_report` compiles: every kernel of kernels/, in every configuration that ships."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from speciarl.kernels import expsum_kernels, loss_kernel, reward_kernel, rowwise
from speciarl.kernels.expsum_tiles import TILES, Tiles
from speciarl.kernels.reward import RULES, RewardSpec

WIDTH = 3584  # of the 7B head; a constant of the kernels, of which nothing but trip counts depends


@dataclass(frozen=True)
class Case:
    """One kernel with its arguments' types and constants.

    types: Triton's name of each run-time argument, such as "*fp32", "i32" or a descriptor;
    constants: all others, with None for a pointer that is not given.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3
    capabilities: tuple[int, ...] = (80, 90)
    product: bool = False
    """Whether it is a matrix product: it must use the matrix units and, on 9.0, TMA loads."""
    tma_stores: bool = False
    per_sm: int = 1
    """Programs that a multiprocessor must have room for."""

    @property
    def full_name(self) -> str:
        return f"{self.kernel.__name__.removesuffix('_kernel')} {self.name}".strip()


def cases() -> list[Case]:
    return [*expsum_cases(), *anchored_cases(), *rows_cases(), *loss_cases(), *reward_cases()]


def expsum_cases() -> Iterator[Case]:
    for name, tiles in TILES.items():
        for store, entropy, banned in product((False, True), repeat=3):
            if tiles.fits(store=store):
                yield expsum_case(name, tiles, store, entropy, banned)


def expsum_case(name: str, tiles: Tiles, store: bool, entropy: bool, banned: bool) -> Case:
    m, n, k = tiles.block_m, tiles.block_n, tiles.block_k
    modes = {"store": store, "entropy": entropy, "banned": banned}
    types = {
        "hidden": f"tensordesc<bf16[{m}, {k}]>",
        "weight": f"tensordesc<bf16[{n}, {k}]>",
        "table": f"tensordesc<bf16[{m}, {n // tiles.split}]>",
        "anchors": "*fp32",
        "targets": "*i64",
        "allowed": "*i8",
        "flags": "*i8",
        "partials": "*fp32",
        "T": "i32",
        "V": "i32",
        "first_id": "i32",
        "scale": "fp32",
    }
    constants: dict[str, Any] = {
        "H": WIDTH,
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "GROUP_M": tiles.group_m,
        "SPLIT": tiles.split,
        "STORE": store,
        "ENTROPY": entropy,
        "BANNED": banned,
    }
    absent = ["table"] * (not store) + ["allowed", "flags"] * (not banned)
    for argument in absent:
        del types[argument]
        constants[argument] = None
    return Case(
        " ".join([name, *(mode for mode, on in modes.items() if on)]),
        expsum_kernels.expsum_kernel,
        types,
        constants,
        warps=tiles.warps,
        stages=tiles.stages,
        capabilities=(90,),
        product=True,
        tma_stores=store,
        per_sm=tiles.per_sm,
    )


def anchored_cases() -> Iterator[Case]:
    """The small kernels around the exp-sum."""
    row_types = {"T": "i32", "V": "i32", "first_id": "i32"}
    yield Case(
        "",
        expsum_kernels.anchor_kernel,
        {
            "hidden": "*bf16",
            "weight": "*bf16",
            "targets": "*i64",
            "anchors": "*fp32",
            "V": "i32",
            "first_id": "i32",
            "scale": "fp32",
            "hidden_row": "i32",
            "weight_row": "i32",
        },
        {"hidden_column": 1, "weight_column": 1, "H": WIDTH, "BLOCK_H": 1024},
    )
    yield Case(
        "",
        expsum_kernels.reduce_kernel,
        {"partials": "*fp32", "sums": "*fp32", "T": "i32", "tiles": "i32"},
        {"ROWS": 32, "DEPTH": 64},
    )
    for store, banned in product((False, True), repeat=2):
        types = {"sums": "*fp32", "targets": "*i64", "logp": "*fp32", "entropy": "*fp32"}
        types |= {"fault": "*i32", "total_ids": "i32", **row_types}
        constants: dict[str, Any] = {"BLOCK": 256, "BANNED": banned, "STORE": store}
        if store:
            types |= {"table": "*bf16", "table_row": "i32"}
        else:
            constants |= {"table": None, "table_row": 0}
        if banned:
            types["allowed"] = "*i8"
        else:
            constants["allowed"] = None
        name = " ".join(["store"] * store + ["banned"] * banned)
        yield Case(name, expsum_kernels.finish_kernel, types, constants)
    columns = ("logp", "entropy", "grad_logp", "grad_entropy")
    yield Case(
        "",
        expsum_kernels.entropy_kernel,
        {"table": "*bf16", "targets": "*i64", "V": "i32", "first_id": "i32", "table_row": "i32"}
        | dict.fromkeys(columns, "*fp32")
        | {"inverse_temperature": "fp32"},
        {"BLOCK": 4096},
        warps=8,
    )


def rows_cases() -> Iterator[Case]:
    shared = {"columns": "*i64", "V": "i32", "table_stride": "i32"}
    scaled = shared | {"logits": "*fp32", "allowed": "*i1", "stride": "i32", "scale": "fp32"}
    block = {"BLOCK": rowwise.BLOCK}
    for dtype in ("bf16", "fp32"):
        table = {"table": f"*{dtype}"}
        for store, entropy, banned in product((False, True), repeat=3):
            modes = {"store": store, "entropy": entropy, "banned": banned}
            yield Case(
                " ".join([dtype, *(mode for mode, on in modes.items() if on)]),
                rowwise.row_sums_kernel,
                scaled | table | {"sums": "*fp32", "T": "i32"},
                block | {"STORE": store, "ENTROPY": entropy, "BANNED": banned},
                warps=rowwise.WARPS,
            )
        for banned in (False, True):
            yield Case(
                f"{dtype} banned" if banned else dtype,
                rowwise.row_table_kernel,
                scaled | table | {"anchors": "*fp32"},
                block | {"BANNED": banned},
                warps=rowwise.WARPS,
            )
        yield Case(
            dtype,
            rowwise.row_entropy_kernel,
            shared | table | {"coefficients": "*fp32", "T": "i32"},
            block,
            warps=rowwise.WARPS,
        )


def loss_cases() -> Iterator[Case]:
    kernel = loss_kernel.policy_loss_kernel
    optional = ("ref_ptr", "engine_ptr", "entropy_ptr", "mean_ptr", "d_ref_ptr", "d_entropy_ptr")
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr") and name not in optional]
    types = dict.fromkeys(pointers, "*fp32")
    types |= {"id_ptr": "*i64", "ticket_ptr": "*i32", "fault_ptr": "*i32"}
    types |= {"tokens": "i32", "sequences": "i32"}
    for scalar in ("below", "above", "dual", "kl_coef", "cap", "entropy_coef"):
        types[scalar] = "fp32"
    block = {"BLOCK": loss_kernel.BLOCK}
    for kind, kl, everything in product(
        ("grpo", "cispo", "gspo"), (None, "k1", "k2", "k3"), (False, True)
    ):
        given = {"ref_ptr"} if kl else set()
        given |= {"mean_ptr"} if kind == "gspo" else set()
        given |= {"engine_ptr", "entropy_ptr", "d_entropy_ptr"} if everything else set()
        given |= {"d_ref_ptr"} if kl and everything else set()
        yield Case(
            " ".join([kind, kl or "no KL", *["importance entropy"] * everything]),
            kernel,
            types | dict.fromkeys(given, "*fp32"),
            block
            | {name: None for name in optional if name not in given}
            | {"KIND": kind, "KL": kl, "USE_DUAL": kind != "cispo", "USE_CAP": everything},
            warps=loss_kernel.WARPS,
        )
    yield Case(
        "",
        loss_kernel.sequence_means_kernel,
        dict.fromkeys(("new_ptr", "old_ptr", "weight_ptr", "partial_ptr", "mean_ptr"), "*fp32")
        | {"id_ptr": "*i64", "bounds_ptr": "*i32", "ticket_ptr": "*i32"}
        | {"tokens": "i32", "sequences": "i32"},
        {"BLOCK": loss_kernel.MEAN_BLOCK},
        warps=loss_kernel.MEAN_WARPS,
    )


def reward_cases() -> Iterator[Case]:
    # "table" is a static rule with other numbers; the size changes no more than the block's shape.
    sizes = [(rule, 16) for rule in RULES if rule != "table"] + [(RULES[0], 64), (RULES[0], 512)]
    for rule, size in sizes:
        spec = RewardSpec(rule)
        groups, slots, warps = reward_kernel.launch_shape(size)
        yield Case(
            f"{rule} N={size}",
            reward_kernel.best_of_n_kernel,
            {
                "code_ptr": "*i8",
                "reward_ptr": "*fp32",
                "advantage_ptr": "*fp32",
                "live_ptr": "*i1",
                "count_ptr": "*i32",
                "fault_ptr": "*i32",
                "groups": "i32",
                "size": "i32",
            },
            {
                "VALUES": spec.values,
                "FORMAT_PENALTY": spec.format_penalty,
                "HAS_BAR": spec.has_bar,
                "KEEPS_FORMAT": spec.keeps_format,
                "NORMALIZE": True,
                "GROUPS": groups,
                "SLOTS": slots,
            },
            warps=warps,
        )
