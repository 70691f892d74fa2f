"""What a fold reads of a state, on its way to shared memory while another is folded.

One state's share of shared memory is COUNT blocks of a fragment, 16 bytes, for each thread: the
state's 64 channels of 128 bytes, 32 tokens of 64 halves, the columns' and the channels' factors and
the sums of dt * a. Lines of 128 bytes are kept in four parts of 32 bytes, in an order that every
other line changes: the eight lanes that read different lines at a time so find them in different
banks.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from aim_export.cuda.kernels.fold_fragments import STATE, TOKENS, words_of
from aim_export.cuda.kernels.warp_fragments import (
    CHUNK,
    LINE,
    THREADS,
    P,
    S,
    copy,
    places,
)

_COUNT = gl.constexpr(8)  # blocks of a state's share, the last one unused
_BLOCK = gl.constexpr(16 * THREADS.value)  # bytes
_SHARE = gl.constexpr(_COUNT.value * _BLOCK.value)
_OF_STATE = gl.constexpr(P.value * S.value // _BLOCK.value)  # blocks
_OF_TOKENS = gl.constexpr(2 * P.value * CHUNK.value // _BLOCK.value)
_FACTORS = gl.constexpr((_OF_STATE.value + _OF_TOKENS.value) * _BLOCK.value)  # bytes ahead of them
_WORDS = gl.constexpr(gl.SwizzledSharedLayout(8, 2, 4, [1, 0]))
_STAGES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
_HALVES = gl.constexpr(gl.SwizzledSharedLayout(16, 2, 4, [1, 0]))


@gluon.jit
def room_ahead(AHEAD: gl.constexpr):
    """Shared memory for so many states."""
    return gl.allocate_shared_memory(gl.int32, [AHEAD, _COUNT * THREADS, 4], _STAGES)


@gluon.jit
def ask(held, stage, pointers, there, old, INNER: gl.constexpr):
    """Set a state's share on its way to a stage of `held`, if there is one.

    What is not `old` is zeros instead, but for tokens and sums.
    """
    state, factors, columns, past_x, sums = pointers
    number, thread, word = places(_COUNT)
    line, part = thread // 8, thread % 8
    # The part of its line that is to lie there.
    within = 4 * ((part // 2 ^ line // 2 % 4) * 2 + part % 2) + word
    words: gl.constexpr = gl.pointer_type(gl.int32)
    in_state = state.to(words) + (line * (S // 4) + within) + number * (16 * S // 4)
    number_of_tokens = number - _OF_STATE
    in_tokens = past_x.to(words) + (line * (INNER // 2) + within) + number_of_tokens * (8 * INNER)
    rest = 4 * (thread % 16) + word
    in_rest = gl.where(thread < 16, columns.to(words) + rest, factors.to(words) + rest)
    in_rest = gl.where(thread < 32, in_rest, sums.to(words) + rest)
    of_state, of_tokens = number < _OF_STATE, number < _OF_STATE + _OF_TOKENS
    source = gl.where(of_state, in_state, gl.where(of_tokens, in_tokens, in_rest))
    rest = (number == _OF_STATE + _OF_TOKENS) & (thread < 40) & (old | (thread >= 32))
    mask = (of_state & old) | (of_tokens & (number >= _OF_STATE)) | rest
    copy(held.index(stage), source, mask & there & (word >= 0), _COUNT)


@gluon.jit
def arrived(AHEAD: gl.constexpr):
    """Wait for the state that was asked for first; others are still on their way."""
    async_copy.wait_group(AHEAD - 1)


@gluon.jit
def _part(held, stage, BEGIN: gl.constexpr, BYTES: gl.constexpr, like: gl.constexpr):
    """BYTES of a stage, from BEGIN on, as shared memory of type, shape and layout `like`."""
    parts: gl.constexpr = held.shape[0] * (_SHARE // BYTES)
    held = held._reinterpret(like[0], [parts] + like[1], like[2])
    return held.index(stage * (_SHARE // BYTES) + BEGIN // BYTES)


@gluon.jit
def words_ahead(held, stage):
    """A state's words, (P, S / 4)."""
    like: gl.constexpr = (gl.int32, [P, S // 4], _WORDS)
    return _part(held, stage, 0, P * S, like).load(words_of(S))


@gluon.jit
def tokens_ahead(held, stage):
    """dt * x of its head's tokens, (P, CHUNK) float16."""
    like: gl.constexpr = (gl.float16, [CHUNK, P], _HALVES)
    tokens = _part(held, stage, P * S, 2 * P * CHUNK, like)
    return tokens.permute([1, 0]).load(TOKENS)


@gluon.jit
def factors_ahead(held, stage):
    """What its channels count, (P,) float32, and its columns, (S,) float16."""
    columns: gl.constexpr = (gl.float16, [S], LINE)
    channels: gl.constexpr = (gl.float32, [P], LINE)
    columns = _part(held, stage, _FACTORS, 2 * S, columns)
    channels = _part(held, stage, _FACTORS + 2 * S, 4 * P, channels)
    return channels.load(gl.SliceLayout(1, STATE)), columns.load(gl.SliceLayout(0, STATE))


@gluon.jit
def sums_ahead(held, stage):
    """Its sums, (CHUNK,), and the last of them, (1,) for tokens and (1,) for channels."""
    BEGIN: gl.constexpr = _FACTORS + 2 * S + 4 * P
    sums = _part(held, stage, BEGIN, 4 * CHUNK, (gl.float32, [CHUNK], LINE))
    last = _part(held, stage, BEGIN + 4 * CHUNK - 4, 4, (gl.float32, [1], LINE))
    tokens: gl.constexpr = gl.SliceLayout(0, TOKENS)
    return sums.load(tokens), last.load(tokens), last.load(gl.SliceLayout(1, STATE))
