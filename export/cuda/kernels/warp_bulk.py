"""States and tokens of the scan of a head a warp by the bulk copy engine.

Each warp sets its share of a program's copies on their way, states by its first lane and tokens one
a lane. Shared memory is one allocation, which lies at its beginning, since copies take addresses
that only assembly can make:

- **States**: half of a head's channels a piece, 4 KB, those of odd q behind those of even q and 64
  bytes further on, so that the eight lanes that read at a time read from different banks.
- **Tokens**: 512 bytes each, those of lanes j side by side and 16 bytes further on for each j.
- Barriers that count copies' bytes, one of each warp's own and one of all tokens, scores, and what
  the warps exchange of B and C.

What the launch ahead reads waits for all that was asked of memory before, even where the L2 cache
has it. So a warp may ask for PACE KB at a time, of the state and then of tokens; 8 is all of both.
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
    THREAD,
    THREADS,
    WARPS,
    P,
    S,
    constraints,
    lanes,
    line_of,
)

_PIECES = gl.constexpr(8)  # KB of a head's state, and the most tokens of a warp
_HALF = gl.constexpr(P.value * S.value // 2)  # bytes of half of a head's channels
_ODD = gl.constexpr(WARPS.value * _HALF.value + 64)
_TOKENS = gl.constexpr(2 * WARPS.value * _HALF.value + 64)
TOKEN = gl.constexpr(2 * WARPS.value * P.value)  # bytes
_SHARE = gl.constexpr(CHUNK.value // 4 * TOKEN.value + 16)  # bytes of a lane's tokens
_BLOCK = gl.constexpr(2 * S.value)  # words
_BLOCKS = gl.constexpr(-(-(_TOKENS.value + 4 * _SHARE.value) // (4 * _BLOCK.value)) + 1)
SCORES = gl.constexpr(4 * _BLOCK.value * (_BLOCKS.value - 1) - 4 * CHUNK.value)
_BARRIERS = gl.constexpr(SCORES.value - 8 * (WARPS.value + 2))
# PTX: copies, and how their lines are kept. They are read once: the L2 cache gives them up first,
# and keeps what launches leave for each other.
_COPY = gl.constexpr(
    "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
)
_POLICY = gl.constexpr("createpolicy.fractional.L2::evict_first.b64 h, 1.0;")
# What a program allocates: if it is all that a kernel has, it lies where assembly looks for it.
BYTES = gl.constexpr(4 * _BLOCK.value * _BLOCKS.value)


@gluon.constexpr_function
def _rounds(PACE):
    """In how many rounds a warp's states are asked for, and its tokens."""
    return _PIECES.value // PACE, max(1, _PIECES.value // (2 * PACE))


@gluon.constexpr_function
def _barrier_text():
    """PTX: m, where a program's barriers are, and n, that of a warp's states.

    Behind those of each warp's states is one of all warps' tokens. f is a warp's first lane.
    """
    text = ".reg .b32 l, w, m, n; .reg .pred f; mov.u32 w, %tid.x; and.b32 l, w, 31;"
    text += "shr.u32 w, w, 5; setp.eq.u32 f, l, 0; mov.u32 m, global_smem;"
    return text + f"add.u32 m, m, {_BARRIERS.value}; mad.lo.u32 n, w, 8, m;"


@gluon.constexpr_function
def _begin_text():
    """PTX: the barriers."""
    text = "{" + _barrier_text() + ".reg .pred a; mov.u32 l, %tid.x; setp.eq.u32 a, l, 0;"
    text += "@f mbarrier.init.shared::cta.b64 [n], 1;"
    text += f"@a mbarrier.init.shared::cta.b64 [m+{8 * WARPS.value}], {WARPS.value};"
    return text + "@f fence.mbarrier_init.release.cluster; mov.u32 $0, global_smem; }"


@gluon.constexpr_function
def _told(barrier, size):
    """PTX: tell a barrier of so many bytes, when all lanes have seen its phase before.

    Other lanes' copies may come first: the phase does not end before the arrival that this is.
    """
    text = "bar.warp.sync 0xffffffff;"
    return text + f"@f mbarrier.arrive.expect_tx.shared::cta.b64 _, [{barrier}], {size};"


@gluon.constexpr_function
def _states_text(FIRST, LAST):
    """PTX: the KB FIRST to LAST of a warp's state ($1), if there are any ($2)."""
    text = "{" + _barrier_text() + ".reg .b32 s, t; .reg .b64 a, h; .reg .pred p;"
    text += _POLICY.value
    text += f"mul.lo.u32 t, $2, {1024 * (LAST - FIRST)};" + _told("n", "t")
    text += "setp.ne.and.u32 p, $2, 0, f; mov.u32 s, global_smem;"
    text += f"mad.lo.u32 s, w, {_HALF.value}, s; mad.wide.u32 a, w, {2 * _HALF.value}, $1;"
    size = 1024 * min(LAST - FIRST, _PIECES.value // 2)
    for begin in range(1024 * FIRST, 1024 * LAST, size):
        half, within = divmod(begin, _HALF.value)
        text += _COPY.value + f" [s+{half * _ODD.value + within}], [a+{begin}], {size}, [n], h;"
    return text + "mov.u32 $0, l; }"


@gluon.constexpr_function
def _tokens_text(INNER, FIRST, LAST):
    """PTX: a warp's tokens FIRST to LAST, which are every fourth of $2 tokens ($1).

    The last of them for the barrier of all warps' tokens, others for that of the warp's states.
    """
    text = "{" + _barrier_text() + ".reg .b32 s, c, t, d; .reg .b64 a, h; .reg .pred p;"
    text += _POLICY.value
    if _PIECES.value == LAST:
        text += f"add.u32 n, m, {8 * WARPS.value};"
    text += "add.u32 c, $2, 3; sub.u32 c, c, w; shr.u32 c, c, 2;"
    text += f"min.u32 t, c, {FIRST}; min.u32 c, c, {LAST}; sub.u32 t, c, t;"
    text += f"mul.lo.u32 t, t, {TOKEN.value};" + _told("n", "t")
    text += f"setp.lt.u32 p, l, c; setp.ge.and.u32 p, l, {FIRST}, p;"
    # Token 16 g + 4 j + i is number 4 g + i of lanes j.
    text += f"mov.u32 s, global_smem; and.b32 t, l, 3; mad.lo.u32 s, t, {_SHARE.value}, s;"
    text += f"and.b32 t, l, 4; add.u32 t, t, w; mad.lo.u32 d, t, {TOKEN.value}, s;"
    text += f"mad.lo.u32 t, l, 4, w; mad.wide.u32 a, t, {2 * INNER}, $1;"
    text += _COPY.value + f" [d+{_TOKENS.value}], [a], {TOKEN.value}, [n], h;"
    return text + "mov.u32 $0, l; }"


@gluon.constexpr_function
def _zeros_text():
    """PTX: zeros in place of the tokens from $2 on, at $1 a lane's share."""
    text = "{ .reg .b32 l, z; .reg .pred p; mov.b32 z, 0; mov.u32 l, %laneid; and.b32 l, l, 3;"
    text += "shl.b32 l, l, 2; sub.s32 l, $2, l;"
    for i in range(CHUNK.value // 4):
        text += f"setp.le.s32 p, l, {i % 4 + i // 4 * 16};"
        text += f"@p st.shared.v4.b32 [$1+{i * TOKEN.value}], {{z,z,z,z}};"
    return text + "mov.b32 $0, $1; }"


@gluon.jit
def begin_copies():
    """Make room for copies: where a thread finds states and tokens, (THREADS,)."""
    q, j = lanes()
    begin = gl.inline_asm_elementwise(
        _begin_text(), "=r,r", [q], dtype=gl.int32, is_pure=False, pack=1
    )
    # All warps count on one of the barriers.
    gl.thread_barrier()
    warp = gl.arange(0, THREADS, THREAD) // 32
    states = begin + warp * _HALF + q // 2 * (_HALF // 4) + q % 2 * _ODD + 16 * j
    return states, begin + _TOKENS + j * _SHARE + warp * (2 * P) + 16 * line_of(q)


@gluon.jit
def set_states(state, old, FIRST: gl.constexpr, LAST: gl.constexpr):
    """Set the KB FIRST to LAST of each of a program's states on their way.

    `state` points to the first head's state; none is copied that is not `old`.
    """
    gl.inline_asm_elementwise(
        _states_text(FIRST, LAST),
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
    FIRST: gl.constexpr = 0,
    LAST: gl.constexpr = _PIECES,
):
    """Set a program's `slot` tokens on their way, or these of each warp's.

    `past_x` points to the first token's share of these heads.
    """
    gl.inline_asm_elementwise(
        _tokens_text(INNER, FIRST, LAST),
        "=r,l,r",
        [past_x.to(gl.int64), slot],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def set_first(state, past_x, slot, old, INNER: gl.constexpr, PACE: gl.constexpr):
    """Set PACE KB of each warp's share on their way; `set_others` has to follow."""
    set_states(state, old, 0, PACE)
    if PACE == _PIECES:
        set_tokens(past_x, slot, INNER)


@gluon.jit
def set_others(
    state,
    past_x,
    slot,
    old,
    INNER: gl.constexpr,
    PACE: gl.constexpr,
    TOGETHER: gl.constexpr,
):
    """Ask for the others whenever those ahead are there; the last are still on their way then."""
    if PACE < _PIECES:
        OF_STATES: gl.constexpr = _rounds(PACE)[0]
        for number in gl.static_range(1, OF_STATES):
            _wait(slot, False, (number - 1) % 2)
            set_states(state, old, number * PACE, (number + 1) * PACE)
        if TOGETHER:
            set_tokens(past_x, slot, INNER)
        else:
            OF_TOKENS: gl.constexpr = _rounds(PACE)[1]
            TOKENS: gl.constexpr = _PIECES // OF_TOKENS
            for number in gl.static_range(OF_TOKENS):
                _wait(slot, False, (OF_STATES + number - 1) % 2)
                set_tokens(past_x, slot, INNER, number * TOKENS, (number + 1) * TOKENS)


@gluon.jit
def fill_tokens(tokens, slot):
    """Zeros in place of the tokens that are not there; returns `tokens`."""
    return gl.inline_asm_elementwise(
        _zeros_text(), "=r,r,r", [tokens, slot], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def shared_of_all():
    """What is exchanged of B and C (2 S,) and of scores (CHUNK,), float32."""
    held = gl.allocate_shared_memory(gl.float32, [_BLOCKS, _BLOCK], LINE)
    lines: gl.constexpr = _BLOCKS * (_BLOCK // CHUNK)
    scores = held._reinterpret(gl.float32, [lines, CHUNK], LINE)
    scores = scores.index(SCORES // (4 * CHUNK))
    return held.index(_BLOCKS - 1), scores


@gluon.constexpr_function
def _wait_text(OF_TOKENS):
    """PTX: wait for the phase $2 of the barrier of tokens, or of the warp's states."""
    text = "{" + _barrier_text() + ".reg .pred p;"
    at = f"m+{8 * WARPS.value}" if OF_TOKENS else "n"
    text += f"WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [{at}], $2; @!p bra WAIT;"
    return text + "mov.b32 $0, $1; }"


@gluon.jit
def _wait(value, OF_TOKENS: gl.constexpr, phase):
    """The same `value`, when what `_wait_text` waits for is there."""
    return gl.inline_asm_elementwise(
        _wait_text(OF_TOKENS),
        "=r,r,r",
        [value, phase],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.constexpr_function
def _read_text(OFFSET):
    return f"ld.shared.v4.b32 {{$0,$1,$2,$3}}, [$4+{OFFSET}];"


@gluon.jit
def arrived(places, OF_TOKENS: gl.constexpr, PACE: gl.constexpr, TOGETHER: gl.constexpr):
    """The same places (THREADS,), when states of the warp or tokens of all are there."""
    # Of paced states `set_others` has waited for the last.
    if OF_TOKENS or PACE == _PIECES:
        places = _wait(places, OF_TOKENS, 0)
    elif TOGETHER:
        places = _wait(places, False, (_rounds(PACE)[0] - 1) % 2)
    return places


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
