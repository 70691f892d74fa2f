"""The tokens since the chunk began, for the scan of a head a warp: keys by C, values by scores.

- **Scores**, B times C, are shared by all heads of a row: a warp makes those of eight tokens, of
  mma.m16n8k16 with C as two halves, the second of what the first leaves: 22 bits.
- **Values**, dt * x: those of 16 tokens are A of mma.m16n8k16 as 16 channels by tokens. What a
  token is weighed with is two halves, in even and in odd columns.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aim_export.cuda.kernels.common import HALF_LIMIT
from aim_export.cuda.kernels.persistent_common import bits, none, power_of_e
from aim_export.cuda.kernels.warp_bulk import SCORES, TOKEN, fragment_at
from aim_export.cuda.kernels.warp_fragments import (
    CHUNK,
    FRAGMENT,
    LINE,
    THREAD,
    THREADS,
    WARPS,
    P,
    S,
    constraints,
    copy,
    fragment,
    lanes,
    line_of,
    of_heads,
    of_lanes,
    places,
    room,
    wait_for_copies,
)

VALUES = gl.constexpr(CHUNK.value // 4)  # fragments of a thread
SCORED = gl.constexpr(of_heads((1, 4), (8, 16, 2, 32, 64)))  # a lane's share of C for scores
# (WARPS, 8, CHUNK): of 16 tokens a lane has 4 j to 4 j + 3.
_SLOTS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 16]],
        [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[bit, 0, 0] for bit in bits(WARPS.value)],
        [],
        [WARPS.value, 8, CHUNK.value],
    )
)


@gluon.jit
def hold_values(past_x, slot, INNER: gl.constexpr, PACE: gl.constexpr):
    """Set the tokens' dt * x of WARPS heads on their way: of its tokens a line a lane.

    `past_x` points to the first of these tokens, and of them to the first head; those from `slot`
    on are not there. Paced as `hold_states` is, behind it.
    """
    COUNT: gl.constexpr = min(2 * PACE, VALUES)
    parts = none()
    for part in gl.static_range(VALUES // COUNT):
        number, thread, word = places(COUNT)
        number += part * COUNT
        token = thread % 4 * 4 + number % 4 + number // 4 * 16
        at = thread // 32 * (P // 2) + line_of(thread // 4 % 8) * 4 + word
        words = past_x.to(gl.pointer_type(gl.int32)) + at + token * (INNER // 2)
        held = room(COUNT)
        if PACE < 8:
            wait_for_copies()
        copy(held, words, token + word * 0 < slot, COUNT)
        parts += (held,)
    return parts


@gluon.jit
def load_keys(past_b, slot):
    """B of token 8 w + q in warp w, four quarters (THREADS, 4) of it."""
    thread = gl.arange(0, THREADS, THREAD)
    word = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, FRAGMENT)), 0)
    token = gl.expand_dims(thread // 4, 1)
    words = past_b.to(gl.pointer_type(gl.int32)) + token * (S // 2)
    words += gl.expand_dims(thread % 4 * 4, 1) + word
    there = (token < slot) & (word >= 0)
    loaded = none()
    for quarter in gl.static_range(4):
        loaded += (gl.load(words + quarter * 16, mask=there, other=0),)
    return loaded


@gluon.jit
def _heads_of_slots(values):
    """(WARPS,) as (WARPS, 1)."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, _SLOTS))
    return gl.expand_dims(gl.convert_layout(values, layout, assert_trivial=True), 1)


@gluon.jit
def load_decays(past_decay, heads, slot):
    """The tokens' sums of dt * a (WARPS, CHUNK), and whatever stands behind them up to a fourth."""
    token = gl.expand_dims(gl.arange(0, CHUNK, gl.SliceLayout(0, gl.SliceLayout(1, _SLOTS))), 0)
    at = _heads_of_slots(heads) * CHUNK + token
    return gl.load(past_decay + at, mask=at * 0 + token // 4 * 4 < slot, other=0.0)


@gluon.jit
def halves(value):
    """Each lane's four numbers of C (1, S) in `SCORED` as two pairs of halves, and as two of what
    those leave: (threads, 4)."""
    value = gl.maximum(gl.minimum(value, HALF_LIMIT), -HALF_LIMIT) + gl.full(
        [WARPS, S], 0.0, gl.float32, SCORED
    )
    pairs = gl.inline_asm_elementwise(
        "{ .reg .b16 h, k, i, l; .reg .f32 a, b, c, d; cvt.rn.f16x2.f32 $0, $5, $4;"
        "cvt.rn.f16x2.f32 $1, $7, $6; mov.b32 {h, k}, $0; mov.b32 {i, l}, $1; cvt.f32.f16 a, h;"
        "cvt.f32.f16 b, k; cvt.f32.f16 c, i; cvt.f32.f16 d, l; sub.f32 a, $4, a; sub.f32 b, $5, b;"
        "sub.f32 c, $6, c; sub.f32 d, $7, d; cvt.rn.f16x2.f32 $2, b, a;"
        "cvt.rn.f16x2.f32 $3, d, c; }",
        "=&r,=&r,=&r,=&r,f,f,f,f",
        [value],
        dtype=gl.int32,
        is_pure=True,
        pack=4,
    )
    # warp, q2, q1, j1, j0, register, q0, register
    pairs = gl.permute(gl.reshape(pairs, [WARPS, 2, 2, 2, 2, 2, 2, 2]), [0, 1, 2, 6, 3, 4, 5, 7])
    return gl.convert_layout(gl.reshape(pairs, [THREADS, 4]), FRAGMENT, assert_trivial=True)


@gluon.constexpr_function
def _score_text(BULK):
    """PTX: a key's product with C in each lane of its row.

    A quarter of it is right in the lanes whose number is the quarter's: the first half of a
    quarter's words in rows q and even columns, the second in rows q + 8 and odd ones.
    """
    text = "{ .reg .f32 a, b, c, d, z, s, t; .reg .b32 l; .reg .pred p; mov.f32 z, 0f00000000;"
    text += "mov.u32 l, %laneid; and.b32 l, l, 3;"
    product = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {a,b,c,d}, "
    for quarter in range(4):
        key = ",".join(f"${4 + 4 * quarter + word}" for word in range(4))
        text += f"{product}{{{key}}}, {{$20,$21}}, {{z,z,z,z}};"
        text += f"{product}{{{key}}}, {{$22,$23}}, {{a,b,c,d}}; add.f32 t, a, d;"
        text += f"setp.eq.u32 p, l, {quarter}; selp.f32 s, t, {'s' if quarter else 'z'}, p;"
    for lane in (1, 2):
        text += f"shfl.sync.bfly.b32 t, s, {lane}, 0x1f, 0xffffffff; add.f32 s, s, t;"
    text += "mul.rn.f32 s, s, 0f3D800000;"
    if BULK:
        # It goes to all warps at once, from one lane.
        text += "setp.eq.u32 p, l, 0; mov.u32 l, %tid.x; .reg .b32 g; mov.u32 g, global_smem;"
        text += f"add.u32 g, g, l; @p st.shared.f32 [g+{SCORES.value}], s;"
    return text + "mov.f32 $0, s; mov.f32 $1, s; mov.f32 $2, s; mov.f32 $3, s; }"


@gluon.jit
def scores_of(keys, pairs, BULK: gl.constexpr):
    """C times the keys of `load_keys`, for each token in sixteen places: (THREADS, 4).

    `BULK` puts them where `shared_of_all` has room for them as well.
    """
    text: gl.constexpr = _score_text(BULK)
    return gl.inline_asm_elementwise(
        text,
        constraints("f", 4, "r", 20),
        [keys[0], keys[1], keys[2], keys[3], pairs],
        dtype=gl.float32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def share_scores(scores):
    """Those of `scores_of` for all warps: (CHUNK,) in shared memory, the tokens in order."""
    scores = gl.max(gl.reshape(scores, [CHUNK, 16]), axis=1)
    shared = gl.allocate_shared_memory(gl.float32, [CHUNK], LINE)
    shared.store(scores)
    return shared


@gluon.jit
def left_of(decays, decay):
    """What is left at the newest token of each token's share (WARPS, CHUNK)."""
    # Sums only fall; what stands behind the tokens must not become infinite here. Nor does a token
    # whose sum is no number say so: it did when it was the newest.
    return power_of_e(gl.minimum(_heads_of_slots(decay) - decays, 0.0))


@gluon.jit
def weights_of(shared, left):
    """What the tokens' dt * x are weighed with (THREADS, 2, 4), from the scores of all.

    Tokens that are not there have a score of zero, as their keys have.
    """
    scores = shared.load(gl.SliceLayout(0, gl.SliceLayout(1, _SLOTS)))
    weights = gl.expand_dims(gl.expand_dims(scores, 0) * left, 1)
    weights += gl.full([WARPS, 8, CHUNK], 0.0, gl.float32, _SLOTS)
    weights = gl.permute(gl.reshape(weights, [WARPS, 8, 2, 4, 4]), [0, 1, 3, 2, 4])
    return gl.reshape(weights, [THREADS, 2, 4])


@gluon.constexpr_function
def _attend_text():
    """PTX: to four tiles are added dt * x of 16 tokens, four words each, times their weights."""
    text = "{ .reg .b16 h, k; .reg .f32 x, y; .reg .b32 a, b, c, d, e<2>, f; .reg .pred p;"
    text += "mov.u32 f, %laneid; and.b32 f, f, 4; setp.eq.u32 p, f, 0;"
    for pair in range(2):
        first, second = f"${32 + 2 * pair}", f"${33 + 2 * pair}"
        text += f"cvt.rn.f16x2.f32 e{pair}, {second}, {first}; mov.b32 {{h, k}}, e{pair};"
        text += f"cvt.f32.f16 x, h; cvt.f32.f16 y, k; sub.rn.f32 x, {first}, x;"
        text += (
            f"sub.rn.f32 y, {second}, y; cvt.rn.f16x2.f32 f, y, x; selp.b32 e{pair}, e{pair}, f, p;"
        )
    for tile in range(4):
        for pair, even, odd in ((0, "a", "b"), (8, "c", "d")):
            both = f"${16 + pair + tile}, ${20 + pair + tile}"
            text += f"prmt.b32 {even}, {both}, 0x5410; prmt.b32 {odd}, {both}, 0x7632;"
        out = ",".join(f"${4 * tile + i}" for i in range(4))
        total = ",".join(f"${36 + 4 * tile + i}" for i in range(4))
        text += f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{out}}}, {{a,b,c,d}},"
        text += f" {{e0,e1}}, {{{total}}};"
    return text + " }"


@gluon.jit
def _attend(held, group: gl.constexpr, weights, slot, tiles, BULK: gl.constexpr):
    """Tiles (threads, 4), to which 16 tokens are added, times `weights` (threads, 4)."""
    _q, j = lanes()
    found = none()
    for i in gl.static_range(4):
        if BULK:
            found += (fragment_at(held, (4 * group + i) * TOKEN),)
        else:
            there = gl.expand_dims(16 * group + 4 * j + i < slot, 1)
            found += (gl.where(there, fragment(held, 4 * group + i), 0),)
    text: gl.constexpr = _attend_text()
    return gl.inline_asm_elementwise(
        text,
        constraints("f", 16, "r", 16, "f", 20),
        [found[0], found[1], found[2], found[3], weights, tiles[0], tiles[1], tiles[2], tiles[3]],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=4,
    )


@gluon.constexpr_function
def _pick_text():
    """PTX: of four tiles, whose even and odd columns are two numbers' products, a lane's sums."""
    text = "{ .reg .b32 l, s; .reg .f32 a<8>; .reg .pred p, o; mov.u32 l, %laneid; and.b32 s, l, 2;"
    text += "setp.ne.u32 p, s, 0; and.b32 s, l, 1; setp.ne.u32 o, s, 0;"
    for i in range(8):
        text += f"add.rn.f32 a{i}, ${4 + 2 * i}, ${5 + 2 * i};"
    for kept in range(4):
        text += f"selp.f32 a{kept}, a{kept + 4}, a{kept}, p;"
    for kept in range(2):
        text += f"selp.f32 a{kept}, a{kept + 2}, a{kept}, o;"
    for kept in range(2):
        text += f"mul.rn.f32 a{kept}, a{kept}, 0f41800000;"
    return text + "mov.f32 $0, a0; mov.f32 $1, a1; mov.f32 $2, a0; mov.f32 $3, a1; }"


@gluon.jit
def attended(held, weights, slot, BULK: gl.constexpr):
    """What `hold_values` holds, or the copy engine has brought, times `weights`: (WARPS, P)."""
    zero = gl.full([THREADS, 4], 0.0, gl.float32, FRAGMENT)
    first, second = gl.split(gl.permute(weights, [0, 2, 1]))
    first = gl.convert_layout(first, FRAGMENT, assert_trivial=True)
    second = gl.convert_layout(second, FRAGMENT, assert_trivial=True)
    tiles = _attend(held, 0, first, slot, (zero, zero, zero, zero), BULK)
    if slot > 16:
        tiles = _attend(held, 1, second, slot, tiles, BULK)
    mine = gl.inline_asm_elementwise(
        _pick_text(),
        constraints("f", 4, "f", 16),
        [tiles[0], tiles[1], tiles[2], tiles[3]],
        dtype=gl.float32,
        is_pure=False,
        pack=4,
    )
    return of_lanes(mine)
