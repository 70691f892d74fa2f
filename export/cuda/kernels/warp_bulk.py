"""States and tokens of the scan of a head a warp by the bulk copy engine.

Each warp sets a share of a program's copies on their way, one a lane. Shared memory is one
allocation, which lies at its beginning, since copies take addresses that only assembly can make:

- **States**: eight channels a piece, 1 KB, those of odd q behind those of even q and 64 bytes
  further on, so that the eight lanes that read at a time read from different banks.
- **Tokens**: 512 bytes each, those of lanes j side by side and 32 bytes further on for each j.
- Scores, for each row of a program and warp the barriers that count its copies' bytes, of states
  and of tokens, and what the warps exchange of B and C.

What the launch ahead reads waits for all that was asked of memory before, even where the L2 cache
has it. So of its first row a warp may ask for PACE KB at a time, of the state and then of tokens;
8 is all of both at once.
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
_PIECES = gl.constexpr(8)  # of a head's state, and the most tokens of a warp
_ODD = gl.constexpr(4 * WARPS.value * _PIECE.value + 64)
_TOKENS = gl.constexpr(8 * WARPS.value * _PIECE.value + 64)
ROWS = gl.constexpr(2)  # the most that a program takes, one after the other
TOKEN = gl.constexpr(2 * WARPS.value * P.value)  # bytes
_SHARE = gl.constexpr(CHUNK.value // 4 * TOKEN.value + 32)  # bytes of a lane's tokens
_BLOCK = gl.constexpr(2 * S.value)  # words
_BLOCKS = gl.constexpr(-(-(_TOKENS.value + 4 * _SHARE.value) // (4 * _BLOCK.value)) + 1)
SCORES = gl.constexpr(4 * _BLOCK.value * (_BLOCKS.value - 1) - 4 * CHUNK.value)
_OF_TOKENS = gl.constexpr(8 * ROWS.value * WARPS.value)  # from states' barriers to those of tokens
_BARRIERS = gl.constexpr(SCORES.value - 2 * _OF_TOKENS.value)
# What a program allocates: if it is all that a kernel has, it lies where assembly looks for it.
BYTES = gl.constexpr(4 * _BLOCK.value * _BLOCKS.value)


@gluon.constexpr_function
def _at_once(PACE, OF_TOKENS):
    """Pieces of a warp's state, or tokens, that are on their way at a time."""
    return min(2 * PACE if OF_TOKENS else PACE, _PIECES.value)


@gluon.constexpr_function
def _phase(PACE, OF_TOKENS, COUNT):
    """The parity of the barrier's phase that ends with the first COUNT pieces or tokens."""
    return (COUNT // _at_once(PACE, OF_TOKENS) - 1) % 2


@gluon.constexpr_function
def _barrier_text(ITEM):
    """PTX: m, where warp w's barrier of a program's row ITEM is; s, where memory begins."""
    text = "mov.u32 t, %tid.x; shr.u32 w, t, 5; and.b32 l, t, 31; setp.eq.u32 f, l, 0;"
    offset = _BARRIERS.value + 8 * WARPS.value * ITEM
    return text + f"mov.u32 s, global_smem; mad.lo.u32 m, w, 8, s; add.u32 m, m, {offset};"


@gluon.constexpr_function
def _begin_text(COUNT):
    """PTX: a warp's barriers, by its first lane."""
    text = "{ .reg .b32 t, w, l, s, m; .reg .pred f;"
    for item in range(COUNT):
        text += _barrier_text(item) + "@f mbarrier.init.shared::cta.b64 [m], 1;"
        text += f"@f mbarrier.init.shared::cta.b64 [m+{_OF_TOKENS.value}], 1;"
    text += "@f fence.mbarrier_init.release.cluster; bar.warp.sync 0xffffffff;"
    return text + "mov.u32 $0, s; }"


@gluon.constexpr_function
def _told(size):
    """PTX: tell the barrier m of so many bytes, when all lanes have seen its phase before.

    None at all would end the phase at once.
    """
    text = "bar.warp.sync 0xffffffff; @f mbarrier.arrive.expect_tx.shared::cta.b64 _, [m], "
    return text + f"{size}; bar.warp.sync 0xffffffff;"


@gluon.constexpr_function
def _states_text(ITEM, FIRST, LAST):
    """PTX: copies of the pieces FIRST to LAST of a warp's state ($1), if there are any ($2)."""
    text = "{ .reg .b32 t, w, l, i, k, s, d, e, n, m; .reg .pred p, f; .reg .b64 a;"
    text += _barrier_text(ITEM) + f"mul.lo.u32 n, $2, {(LAST - FIRST) * _PIECE.value};"
    text += _told("n") + "mad.lo.u32 i, w, 8, l; shr.u32 d, i, 1; and.b32 e, i, 1;"
    text += f"mad.lo.u32 s, d, {_PIECE.value}, s; mad.lo.u32 d, e, {_ODD.value}, s;"
    text += f"mad.wide.u32 a, i, {_PIECE.value}, $1; mul.lo.u32 n, $2, {LAST - FIRST};"
    text += f"sub.u32 k, l, {FIRST}; setp.lt.u32 p, k, n;"
    text += "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    return text + f" [d], [a], {_PIECE.value}, [m]; mov.u32 $0, l; }}"


@gluon.constexpr_function
def _tokens_text(INNER, ITEM, FIRST, LAST):
    """PTX: copies of a warp's tokens FIRST to LAST, which are every fourth of $2 tokens ($1)."""
    text = "{ .reg .b32 t, w, l, k, s, d, n, m; .reg .pred p, f; .reg .b64 a;"
    text += _barrier_text(ITEM) + f"add.u32 m, m, {_OF_TOKENS.value};"
    text += "add.u32 n, $2, 3; sub.u32 n, n, w; shr.u32 n, n, 2;"
    text += f"min.u32 k, n, {FIRST}; min.u32 n, n, {LAST}; sub.u32 t, n, k;"
    text += f"mul.lo.u32 t, t, {TOKEN.value};" + _told("t")
    text += f"setp.lt.u32 p, l, n; setp.ge.and.u32 p, l, {FIRST}, p; mad.lo.u32 k, l, 4, w;"
    text += f"mad.lo.u32 s, l, {TOKEN.value}, s; mad.lo.u32 s, w, {_SHARE.value}, s;"
    text += f"add.u32 d, s, {_TOKENS.value}; mad.wide.u32 a, k, {2 * INNER}, $1;"
    text += "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    return text + f" [d], [a], {TOKEN.value}, [m]; mov.u32 $0, l; }}"


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
def set_states(
    state, old, ITEM: gl.constexpr, FIRST: gl.constexpr = 0, LAST: gl.constexpr = _PIECES
):
    """Set a program's states of row ITEM on their way, or these pieces of each of them.

    `state` points to the first head's state; none is copied that is not `old`.
    """
    gl.inline_asm_elementwise(
        _states_text(ITEM, FIRST, LAST),
        "=r,l,r",
        [state.to(gl.int64), old.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def set_tokens(
    past_x,
    slot,
    INNER: gl.constexpr,
    ITEM: gl.constexpr,
    FIRST: gl.constexpr = 0,
    LAST: gl.constexpr = _PIECES,
):
    """Set a program's `slot` tokens of row ITEM on their way, or these of each warp's.

    `past_x` points to the first token's share of these heads.
    """
    gl.inline_asm_elementwise(
        _tokens_text(INNER, ITEM, FIRST, LAST),
        "=r,l,r",
        [past_x.to(gl.int64), slot],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def set_first(state, past_x, slot, old, INNER: gl.constexpr, PACE: gl.constexpr):
    """Set PACE KB of each warp's first row on their way; `set_others` has to follow."""
    set_states(state, old, 0, 0, _at_once(PACE, False))
    if PACE >= _PIECES:
        set_tokens(past_x, slot, INNER, 0)


@gluon.jit
def set_others(state, past_x, slot, old, INNER: gl.constexpr, PACE: gl.constexpr):
    """Ask for the others whenever those ahead are there; the last are still on their way then."""
    PIECES: gl.constexpr = _at_once(PACE, False)
    TOKENS: gl.constexpr = _at_once(PACE, True)
    if PACE < _PIECES:
        for piece in gl.static_range(PIECES, _PIECES, PIECES):
            _wait(slot, 0, False, False, _phase(PACE, False, piece))
            set_states(state, old, 0, piece, piece + PIECES)
        _wait(slot, 0, False, False, _phase(PACE, False, _PIECES))
        for token in gl.static_range(0, _PIECES, TOKENS):
            if token > 0:
                _wait(slot, 0, True, False, _phase(PACE, True, token))
            set_tokens(past_x, slot, INNER, 0, token, token + TOKENS)


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
def _wait_text(ITEM, OF_TOKENS, OF_ALL, PHASE):
    """PTX: wait for a phase of the own barrier of a row's states or tokens, or of all warps'."""
    text = "{ .reg .pred p, f; .reg .b32 t, w, l, s, m;" + _barrier_text(ITEM)
    if OF_ALL:
        text += f"add.u32 m, s, {_BARRIERS.value + 8 * WARPS.value * ITEM};"
    for warp in range(WARPS.value if OF_ALL else 1):
        at = 8 * warp + (_OF_TOKENS.value if OF_TOKENS else 0)
        text += f"WAIT{warp}: mbarrier.try_wait.parity.shared::cta.b64 p, [m+{at}], {PHASE};"
        text += f"@!p bra WAIT{warp};"
    return text + "mov.b32 $0, $1; }"


@gluon.jit
def _wait(
    value,
    ITEM: gl.constexpr,
    OF_TOKENS: gl.constexpr,
    OF_ALL: gl.constexpr,
    PHASE: gl.constexpr,
):
    """The same `value`, when what `_wait_text` waits for is there."""
    return gl.inline_asm_elementwise(
        _wait_text(ITEM, OF_TOKENS, OF_ALL, PHASE),
        "=r,r",
        [value],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.constexpr_function
def _read_text(OFFSET):
    return f"ld.shared.v4.b32 {{$0,$1,$2,$3}}, [$4+{OFFSET}];"


@gluon.jit
def arrived(places, ITEM: gl.constexpr, OF_TOKENS: gl.constexpr, PACE: gl.constexpr):
    """The same places (THREADS,), when a row's states of the warp or tokens of all are there.

    Of several phases the last alone is waited for: a barrier of all warps must lie between
    `set_others` and this, for another warp's phases but the last are over then.
    """
    PHASE: gl.constexpr = _phase(PACE, OF_TOKENS, _PIECES) if ITEM == 0 else 0
    return _wait(places, ITEM, OF_TOKENS, OF_TOKENS, PHASE)


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
