"""The Triton kernels behind `expsum`, which has the maths and the launches.

All sums are fp32, exponents are in units of log2, and every sum has a fixed order, so that two runs
agree in every bit.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

# Exponents above it are cut: even a sum over a million columns of 2 ** LIMIT is finite in fp32.
LIMIT: tl.constexpr = tl.constexpr(100.0)
# The exponent of a column that does not count. 2 ** NEVER is 0, and so is 0 * NEVER, unlike -inf.
NEVER: tl.constexpr = tl.constexpr(-1.0e30)
# One flag per so many ids says whether any of them is banned. No tile may be wider.
FLAG_IDS: tl.constexpr = tl.constexpr(256)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


# --- the product and its sums ------------------------------------------------------------------


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: bands of GROUP_M row tiles, walked column by column.

    Programs in flight then share a few tiles of the weight, and both operands stay in the L2 cache.
    """
    band = tile // (GROUP_M * tiles_n)
    inside = tile % (GROUP_M * tiles_n)
    height = min(tiles_m - band * GROUP_M, GROUP_M)
    return band * GROUP_M + inside % height, inside // height


@triton.jit
def needs_mask(here, flags, column, V, first_id, WIDTH: tl.constexpr, BANNED: tl.constexpr):
    """Whether a tile holds a target, the end of the vocabulary or, maybe, a banned id."""
    special = tl.max((here >= 0).to(tl.int32), axis=0) > 0
    special |= column + WIDTH > V
    if BANNED:
        low = tl.load(flags + (first_id + column) // FLAG_IDS)
        high = tl.load(flags + (first_id + column + WIDTH - 1) // FLAG_IDS)
        special |= (low | high) != 0
    return special


@triton.jit
def counted(here, allowed, column, V, first_id, WIDTH: tl.constexpr, BANNED: tl.constexpr):
    """Which entries of a tile count: ids of the vocabulary, not banned, not the row's target."""
    offset = tl.arange(0, WIDTH)
    # TMA fills what lies beyond the vocabulary with zeros, which would count as 2 ** -anchor.
    keep = offset < V - column
    if BANNED:
        keep &= tl.load(allowed + first_id + column + offset, mask=keep, other=0) != 0
    return keep[None, :] & (offset[None, :] != here[:, None])


@triton.jit
def add_up(d, table, row, column, STORE: tl.constexpr, ENTROPY: tl.constexpr, SPLIT: tl.constexpr):
    """Row sums of E = 2 ** d and of E d. E goes to the table as bf16, in SPLIT parts (1 or 2)."""
    e = tl.exp2(d)
    s = tl.sum(e, axis=1)
    u = s
    if ENTROPY:
        u = tl.sum(e * d, axis=1)
    # After the sums: before them E and d would both have to wait, more registers than there are.
    if STORE:
        if SPLIT == 1:
            table.store([row, column], e.to(tl.bfloat16))
        else:
            HALF: tl.constexpr = e.shape[1] // 2
            halves = tl.reshape(e.to(tl.bfloat16), (e.shape[0], 2, HALF))
            left, right = tl.split(tl.permute(halves, (0, 2, 1)))
            table.store([row, column], left)
            table.store([row, column + HALF], right)
    return s, u


@triton.jit(do_not_specialize=["T", "V", "first_id"], do_not_specialize_on_alignment=["targets"])
def expsum_kernel(
    hidden,
    weight,
    table,
    anchors,
    targets,
    allowed,
    flags,
    partials,
    T,
    V,
    first_id,
    scale,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    STORE: tl.constexpr,
    ENTROPY: tl.constexpr,
    BANNED: tl.constexpr,
):
    """partials[0, n, r] = the sum of E over column tile n of row r; partials[1] of E d likewise."""
    tiles_m = tl.cdiv(T, BLOCK_M)
    tiles_n = tl.cdiv(V, BLOCK_N)
    programs = tl.num_programs(0)
    # Flattened with the loop inside it, this loop loads the next tile while it sums up the last
    # one. The second counter keeps the two tiles' positions apart.
    done = tl.program_id(0) - programs
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=True):
        m, n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(tl.cdiv(H, BLOCK_K)):
            x = hidden.load([m * BLOCK_M, k * BLOCK_K])
            w = weight.load([n * BLOCK_N, k * BLOCK_K])
            z = tl.dot(x, w.T, z)

        done += programs
        m, n = tile_of(done, tiles_m, tiles_n, GROUP_M)
        row, column = m * BLOCK_M, n * BLOCK_N
        rows = row + tl.arange(0, BLOCK_M)
        inside = rows < T
        anchor = tl.load(anchors + rows, mask=inside, other=0.0)
        target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int64) - first_id - column
        here = tl.where((target >= 0) & (target < BLOCK_N), target, -1).to(tl.int32)
        special = needs_mask(here, flags, column, V, first_id, BLOCK_N, BANNED)

        # Outside the branches on purpose: were `z` first used inside them, Triton 3.7 would wait
        # for the product in each, and ptxas then runs the matrix instructions one at a time.
        d = z * scale - anchor[:, None]
        d = tl.minimum(d, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        if special:
            keep = counted(here, allowed, column, V, first_id, BLOCK_N, BANNED)
            s, u = add_up(tl.where(keep, d, NEVER), table, row, column, STORE, ENTROPY, SPLIT)
        else:
            s, u = add_up(d, table, row, column, STORE, ENTROPY, SPLIT)
        out = partials + n.to(tl.int64) * T + rows
        tl.store(out, s, mask=inside)
        if ENTROPY:
            tl.store(out + tiles_n.to(tl.int64) * T, u, mask=inside)


@triton.jit(do_not_specialize=["T", "tiles"])
def reduce_kernel(partials, sums, T, tiles, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """sums[r] = the sum of partials[tile, r] over the tiles; program (i, q) has quantity q."""
    quantity = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    partials += quantity * tiles * T
    total = tl.zeros((DEPTH, ROWS), tl.float32)
    for first in range(0, tiles, DEPTH):
        tile = (first + tl.arange(0, DEPTH))[:, None]
        valid = (tile < tiles) & (rows < T)[None, :]
        total += tl.load(partials + tile.to(tl.int64) * T + rows[None, :], mask=valid, other=0.0)
    tl.store(sums + quantity * T + rows, tl.sum(total, axis=0), mask=rows < T)


# --- before and after --------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["V", "first_id"],
    do_not_specialize_on_alignment=["hidden", "weight", "targets"],
)
def anchor_kernel(
    hidden,
    weight,
    targets,
    anchors,
    V,
    first_id,
    scale,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """anchors[r] = scale x hidden[r] . weight[target], or 0 where the target is not here."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64) - first_id
    here = (target >= 0) & (target < V)
    hidden += row * hidden_row
    weight += tl.where(here, target, 0) * weight_row
    total = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, H, BLOCK_H):
        at = (start + tl.arange(0, BLOCK_H)).to(tl.int64)
        valid = (at < H) & here
        x = tl.load(hidden + at * hidden_column, mask=valid, other=0.0).to(tl.float32)
        w = tl.load(weight + at * weight_column, mask=valid, other=0.0).to(tl.float32)
        total += x * w
    tl.store(anchors + row, tl.sum(total, axis=0) * scale)


@triton.jit
def log1p(x):
    """ln(1 + x) for x >= 0, to fp32's relative accuracy also where 1 + x rounds to 1."""
    t = x / (2.0 + x)
    t2 = t * t
    series = 2.0 * t * (1.0 + t2 * (1 / 3 + t2 * (1 / 5 + t2 * (1 / 7 + t2 * (1 / 9)))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit(
    do_not_specialize=["T", "V", "first_id", "total_ids"],
    do_not_specialize_on_alignment=["targets", "fault"],
)
def finish_kernel(
    sums,
    targets,
    allowed,
    table,
    logp,
    entropy,
    fault,
    T,
    V,
    first_id,
    total_ids,
    table_row,
    BLOCK: tl.constexpr,
    BANNED: tl.constexpr,
    STORE: tl.constexpr,
):
    """Log-prob and entropy in nats of BLOCK rows, and the table's entries of their targets."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < T
    s = tl.load(sums + rows, mask=inside, other=0.0)
    u = tl.load(sums + T + rows, mask=inside, other=0.0)
    target = tl.load(targets + rows, mask=inside, other=0).to(tl.int64)
    possible = (target >= 0) & (target < total_ids)
    if BANNED:
        possible &= tl.load(allowed + target, mask=inside & possible, other=0) != 0
    clamped = inside & possible & (s >= tl.exp2(LIMIT))
    count = tl.sum(clamped.to(tl.int32), axis=0)
    if count > 0:
        tl.atomic_add(fault, count)

    # A possible target counts 1 in the total. Any other counts nothing, and then S' may be 0.
    total = tl.where(possible, 1.0 + s, tl.where(s == 0.0, 1.0, s))
    log_total = tl.where(possible, log1p(s), tl.log(total))
    tl.store(logp + rows, tl.where(possible, -log_total, float("-inf")), mask=inside)
    tl.store(entropy + rows, log_total - LN2 * u / total, mask=inside)
    if STORE:
        column = target - first_id
        here = inside & possible & (column >= 0) & (column < V)
        tl.store(table + rows * table_row + column, (-s).to(tl.bfloat16), mask=here)


@triton.jit(
    do_not_specialize=["V", "first_id"],
    do_not_specialize_on_alignment=["targets", "grad_logp", "grad_entropy"],
)
def entropy_kernel(
    table,
    logp,
    entropy,
    targets,
    grad_logp,
    grad_entropy,
    V,
    first_id,
    table_row,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """One row of the table, in place: from E to the gradient of the logits before temperature."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64) - first_id
    # A row without a gradient, its target banned, has log-prob -inf: p is 0, and 0 x -inf avoided.
    log_p = tl.maximum(tl.load(logp + row), -1.0e4)
    h = tl.load(entropy + row)
    c, g = tl.load(grad_logp + row), tl.load(grad_entropy + row)
    p = tl.exp(log_p)
    table += row * table_row
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        e = tl.load(table + at, mask=at < V, other=0.0).to(tl.float32)
        # The target's entry is -S'; as a term of the entropy its E is 1.
        term = tl.where(at == target, 1.0, e)
        slope = LN2 * tl.log2(tl.where(term > 0.0, term, 1.0)) + log_p + h
        gradient = -inverse_temperature * p * (c * e + g * term * slope)
        tl.store(table + at, gradient.to(tl.bfloat16), mask=at < V)
