"""States and tokens of the scan of a head a warp by the bulk copy engine.

Each warp sets a share of a program's copies on their way, one a lane. Shared memory is one
allocation, which lies at its beginning, since copies take addresses that only assembly can make:

- **States**: eight channels a piece, 1 KB, those of odd q behind those of even q and 64 bytes
  further on, so that the eight lanes that read at a time read from different banks.
- **Tokens**: 512 bytes each, those of lanes j side by side and 32 bytes further on for each j.
- Scores, for each row of a program and warp the barrier that counts its copies' bytes, and what
  the warps exchange of B and C.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aim_export.cuda.kernels.persistent_common import none
from aim_export.cuda.kernels.warp_fragments import (
    CHUNK,
    FRAGMENT,
    LINE,
    LINES,
    THREAD,
    THREADS,
    WARPS,
    P,
    S,
    constraints,
    lanes,
)

_PIECE = gl.constexpr(P.value * S.value // 8)  # bytes of eight channels
_ODD = gl.constexpr(4 * WARPS.value * _PIECE.value + 64)
_TOKENS = gl.constexpr(8 * WARPS.value * _PIECE.value + 64)
ROWS = gl.constexpr(2)  # the most that a program takes, one after the other
TOKEN = gl.constexpr(2 * WARPS.value * P.value)  # bytes
_SHARE = gl.constexpr(CHUNK.value // 4 * TOKEN.value + 32)  # bytes of a lane's tokens
_BLOCK = gl.constexpr(2 * S.value)  # words
_BLOCKS = gl.constexpr(-(-(_TOKENS.value + 4 * _SHARE.value) // (4 * _BLOCK.value)) + 1)
SCORES = gl.constexpr(4 * _BLOCK.value * (_BLOCKS.value - 1) - 4 * CHUNK.value)
_BARRIERS = gl.constexpr(SCORES.value - 8 * ROWS.value * WARPS.value)
# What a program allocates: if it is all that a kernel has, it lies where assembly looks for it.
BYTES = gl.constexpr(4 * _BLOCK.value * _BLOCKS.value)


@gluon.constexpr_function
def _barrier_text(ITEM):
    """PTX: m, where the barrier of warp w and a program's row ITEM is; s, where memory begins."""
    text = "mov.u32 t, %tid.x; shr.u32 w, t, 5; and.b32 l, t, 31; setp.eq.u32 f, l, 0;"
    offset = _BARRIERS.value + 8 * WARPS.value * ITEM
    return text + f"mov.u32 s, global_smem; mad.lo.u32 m, w, 8, s; add.u32 m, m, {offset};"


@gluon.constexpr_function
def _begin_text(COUNT):
    """PTX: a warp's barriers, by its first lane."""
    text = "{ .reg .b32 t, w, l, s, m; .reg .pred f;"
    for item in range(COUNT):
        text += _barrier_text(item) + "@f mbarrier.init.shared::cta.b64 [m], 1;"
    text += "@f fence.mbarrier_init.release.cluster; bar.warp.sync 0xffffffff;"
    return text + "mov.u32 $0, s; }"


@gluon.constexpr_function
def _copies_text(INNER, ITEM, STATES, TOKENS):
    """PTX: a warp's copies, of a lane each: the pieces of its head's state ($1), if there are any
    ($3), and every fourth of $4 tokens ($2). Where states are, the barrier is told of both."""
    text = "{ .reg .b32 t, w, l, i, k, s, d, e, n, m; .reg .pred p, q, f; .reg .b64 a, b;"
    text += _barrier_text(ITEM)
    if STATES:
        text += "add.u32 n, $4, 3; sub.u32 n, n, w; shr.u32 n, n, 2;"
        text += f"mul.lo.u32 n, n, {TOKEN.value}; mad.lo.u32 n, $3, {8 * _PIECE.value}, n;"
        text += "@f mbarrier.arrive.expect_tx.shared::cta.b64 _, [m], n; bar.warp.sync 0xffffffff;"
    text += "mad.lo.u32 i, w, 8, l; shr.u32 d, i, 1; and.b32 e, i, 1;"
    text += f"mul.lo.u32 d, d, {_PIECE.value}; mad.lo.u32 d, e, {_ODD.value}, d;"
    text += f"mad.wide.u32 a, i, {_PIECE.value}, $1; mul.lo.u32 n, $3, {8 if STATES else 0};"
    # Of tokens, by the eight lanes that follow.
    text += "setp.lt.u32 p, l, n; sub.u32 i, l, 8; mad.lo.u32 k, i, 4, w;"
    text += f"setp.lt.u32 q, i, {8 if TOKENS else 0}; setp.lt.and.u32 q, k, $4, q;"
    text += "setp.lt.u32 f, l, 8; or.pred p, p, q;"
    text += f"mul.lo.u32 e, i, {TOKEN.value}; mad.lo.u32 e, w, {_SHARE.value}, e;"
    text += f"add.u32 e, e, {_TOKENS.value}; mad.wide.u32 b, k, {2 * INNER}, $2;"
    text += "selp.b64 a, a, b, f; selp.b32 d, d, e, f; add.u32 d, d, s;"
    text += f"selp.b32 n, {_PIECE.value}, {TOKEN.value}, f;"
    text += "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    return text + " [d], [a], n, [m]; mov.u32 $0, s; }"


@gluon.constexpr_function
def _zeros_text():
    """PTX: zeros in place of the tokens from $2 on, at $1 a lane's share."""
    text = "{ .reg .b32 l, z; .reg .pred p; mov.b32 z, 0; mov.u32 l, %laneid; and.b32 l, l, 3;"
    for i in range(CHUNK.value // 4):
        text += f"setp.ge.s32 p, l, $2; @p st.shared.v4.b32 [$1+{i * TOKEN.value}], {{z,z,z,z}};"
        text += "add.s32 l, l, 4;"
    return text + "mov.b32 $0, $1; }"


@gluon.jit
def begin_copies(COUNT: gl.constexpr):
    """Make room for copies of COUNT rows: where a thread finds states and tokens, (THREADS,)."""
    q, j = lanes()
    begin = gl.inline_asm_elementwise(
        _begin_text(COUNT), "=r,r", [q], dtype=gl.int32, is_pure=False, pack=1
    )
    warp = gl.arange(0, THREADS, THREAD) // 32
    piece = 8 * warp + q
    states = begin + piece // 2 * _PIECE + piece % 2 * _ODD + 16 * j
    return states, begin + _TOKENS + j * _SHARE + warp * (2 * P) + 16 * q


@gluon.jit
def set_copies(
    state,
    past_x,
    slot,
    old,
    INNER: gl.constexpr,
    ITEM: gl.constexpr,
    STATES: gl.constexpr,
    TOKENS: gl.constexpr,
):
    """Set states and tokens, or one of both, of a program's row ITEM on their way.

    `state` points to the first head's state, `past_x` to the first token's share of these heads.
    Of two such calls for a row that of the states is the first.
    """
    gl.inline_asm_elementwise(
        _copies_text(INNER, ITEM, STATES, TOKENS),
        "=r,l,l,r,r",
        [state.to(gl.int64), past_x.to(gl.int64), old.to(gl.int32), slot],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def fill_tokens(tokens, slot):
    """Zeros in place of the tokens that are not there; returns `tokens`."""
    return gl.inline_asm_elementwise(
        _zeros_text(), "=r,r,r", [tokens, slot], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def shared_of_all():
    """What is exchanged of B and C (2 S,) and of scores (CHUNK / 4, 4), float32."""
    held = gl.allocate_shared_memory(gl.float32, [_BLOCKS, _BLOCK], LINE)
    lines: gl.constexpr = _BLOCKS * (_BLOCK // CHUNK)
    scores = held._reinterpret(gl.float32, [lines, CHUNK // 4, 4], LINES)
    scores = scores.index(SCORES // (4 * CHUNK))
    return held.index(_BLOCKS - 1), scores


@gluon.constexpr_function
def _wait_text(ITEM, ALL):
    """PTX: wait for the own copies, or those of all warps."""
    text = "{ .reg .pred p, f; .reg .b32 t, w, l, s, m;" + _barrier_text(ITEM)
    if ALL:
        text += f"add.u32 m, s, {_BARRIERS.value + 8 * WARPS.value * ITEM};"
    for warp in range(WARPS.value if ALL else 1):
        text += f"WAIT{warp}: mbarrier.try_wait.parity.shared::cta.b64 p, [m+{8 * warp}], 0;"
        text += f"@!p bra WAIT{warp};"
    return text + "mov.b32 $0, $1; }"


@gluon.constexpr_function
def _read_text(OFFSET):
    return f"ld.shared.v4.b32 {{$0,$1,$2,$3}}, [$4+{OFFSET}];"


@gluon.jit
def arrived(places, ITEM: gl.constexpr, ALL: gl.constexpr):
    """The same places (THREADS,), when the warp's copies of a row or those of all are there."""
    return gl.inline_asm_elementwise(
        _wait_text(ITEM, ALL), "=r,r", [places], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def fragment_at(places, OFFSET: gl.constexpr):
    """A fragment (THREADS, 4), so many bytes from `places`."""
    return gl.inline_asm_elementwise(
        _read_text(OFFSET),
        constraints("r", 4, "r", 4),
        [gl.expand_dims(places, 1) + gl.full([THREADS, 4], 0, gl.int32, FRAGMENT)],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def bulk_states(places):
    """A thread's 16 fragments of the state."""
    found = none()
    for number in gl.static_range(16):
        found += (fragment_at(places, 64 * number),)
    return found
