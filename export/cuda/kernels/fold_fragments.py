"""How the four warps of `warp_fold` hold a state, and its parts, for the tensor cores.

Warp w has channels 16 w to 16 w + 15 of all columns. Lane 4 q + j has two of them, 2 q and the
next, and of every 32 columns 8 j to 8 j + 7: so it loads 8 bytes of a state at a time. To the
tensor cores' m16n8k16 these are rows q and q + 8 of a tile and columns 2 j and the next of four of
them. A result is so held as the left operand of a product along columns: nothing moves in between.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from aim_export.cuda.kernels.common import INTEGERS
from aim_export.cuda.kernels.warp_fragments import CHUNK, WARPS, P, S, bits

TILES = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [WARPS.value, 1], [16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, TILES.value, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, TILES.value, 2))
_CHANNELS = gl.constexpr([[2, 0], [4, 0], [8, 0]])  # of lanes
_WARPS = gl.constexpr([[16, 0], [32, 0]])


@gluon.constexpr_function
def _wide_tiles(N):
    """A result (P, N) as `wgmma` has it: in the same registers as of TILES."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS.value, 1], [16, N, 16])


@gluon.constexpr_function
def lines_of(W, GROUP):
    """Shared memory (N, W) of halves, whose lines `ldmatrix`, or `wgmma`, reads."""
    if GROUP:
        return gl.NVMMASharedLayout(min(128, 2 * W), 16, rank=2)
    phases = min(8, W // 8)
    return gl.SwizzledSharedLayout(8, max(1, 8 // phases), phases, [1, 0])


@gluon.jit
def products(lefts, right, total, GROUP: gl.constexpr, ADDS: gl.constexpr):
    """`total` (P, N), zeros if it is not ADDS, and `lefts` times a matrix in shared memory.

    By the instructions of four warps together if GROUP.
    """
    if GROUP:
        tiles: gl.constexpr = _wide_tiles(total.shape[1])
        operand: gl.constexpr = gl.DotOperandLayout(0, tiles, 2)
        total = gl.convert_layout(total, tiles, assert_trivial=True)
        for index in gl.static_range(len(lefts)):
            left = gl.convert_layout(lefts[index], operand, assert_trivial=True)
            total = warpgroup_mma(left, right, total, use_acc=ADDS or index > 0, is_async=True)
        total = warpgroup_mma_wait(0, deps=[total])
        return gl.convert_layout(total, TILES, assert_trivial=True)
    else:
        right = right.load(RIGHT)
        for index in gl.static_range(len(lefts)):
            total = mma_v2(lefts[index], right, total)
        return total


@gluon.jit
def product(left, right, total, GROUP: gl.constexpr):
    """As `products`, of one, and `total`."""
    return products((left,), right, total, GROUP, True)


@gluon.jit
def product_alone(left, right, N: gl.constexpr, GROUP: gl.constexpr):
    """As `products`, of one (P, N)."""
    return products((left,), right, gl.zeros([P, N], gl.float32, TILES), GROUP, False)


@gluon.constexpr_function
def columns_of(W):
    """(P, W): some columns of a state, a multiple of 32."""
    registers = [[0, 1], [0, 2], [0, 4], *([0, 32 * bit] for bit in bits(W // 32)), [1, 0]]
    lanes = [[0, 8], [0, 16], *_CHANNELS.value]
    return gl.DistributedLinearLayout(registers, lanes, _WARPS.value, [], [P.value, W])


@gluon.constexpr_function
def words_of(W):
    """(P, W / 4): the same columns, four bytes in a word."""
    registers = [[0, 1], *([0, 8 * bit] for bit in bits(W // 32)), [1, 0]]
    lanes = [[0, 2], [0, 4], *_CHANNELS.value]
    return gl.DistributedLinearLayout(registers, lanes, _WARPS.value, [], [P.value, W // 4])


STATE = gl.constexpr(columns_of(S.value))
TOKENS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[1, 0], [0, 1], [0, 8], [0, 16]],
        [[0, 2], [0, 4], *_CHANNELS.value],
        _WARPS.value,
        [],
        [P.value, CHUNK.value],
    )
)


@gluon.jit
def tiled(values):
    """(N, W) with columns in the order of tiles; twice that is the order in memory again."""
    N: gl.constexpr = values.shape[0]
    W: gl.constexpr = values.shape[1]
    values = gl.permute(gl.reshape(values, [N, W // 32, 4, 4, 2]), [0, 1, 3, 2, 4])
    return gl.reshape(values, [N, W])


@gluon.jit
def _tiled_channels(values):
    values = gl.permute(gl.reshape(values, [WARPS, 8, 2, values.shape[1]]), [0, 2, 1, 3])
    return gl.reshape(values, [P, values.shape[3]])


@gluon.jit
def as_result(values):
    """Columns (P, W) as a result of the tensor cores."""
    return gl.convert_layout(tiled(_tiled_channels(values)), TILES, assert_trivial=True)


@gluon.jit
def as_left(values):
    """Columns (P, W) as the left operand of a product along them."""
    return gl.convert_layout(tiled(_tiled_channels(values)), LEFT, assert_trivial=True)


@gluon.jit
def from_result(values):
    """The opposite of `as_result`."""
    W: gl.constexpr = values.shape[1]
    values = gl.permute(gl.reshape(values, [WARPS, 2, 8, W]), [0, 2, 1, 3])
    values = tiled(gl.reshape(values, [P, W]))
    return gl.convert_layout(values, columns_of(W), assert_trivial=True)


@gluon.jit
def halves(values):
    """The two halves (P, W/2) of the columns of `values` (P, W)."""
    HALF: gl.constexpr = values.shape[1] // 2
    first, second = gl.split(gl.permute(gl.reshape(values, [P, 2, HALF]), [0, 2, 1]))
    layout: gl.constexpr = columns_of(HALF)
    first = gl.convert_layout(first, layout, assert_trivial=True)
    return first, gl.convert_layout(second, layout, assert_trivial=True)


@gluon.jit
def along(COUNT: gl.constexpr, axis: gl.constexpr, layout: gl.constexpr):
    """0 to COUNT - 1 along an axis of two."""
    return gl.expand_dims(gl.arange(0, COUNT, gl.SliceLayout(1 - axis, layout)), 1 - axis)


@gluon.jit
def _words(target, W: gl.constexpr):
    """Pointers (P, W / 4) to the words of columns that begin at `target`."""
    layout: gl.constexpr = words_of(W)
    at = along(P, 0, layout) * (S // 4) + along(W // 4, 1, layout)
    return target.to(gl.pointer_type(gl.int32)) + at


@gluon.jit
def load_bytes(source, there):
    """A state's words (P, S / 4), zeros if it is not `there`."""
    words = _words(source, S)
    return gl.load(words, mask=(along(P, 0, words_of(S)) >= 0) & there, other=0)


@gluon.jit
def numbers_of(words, channel):
    """The bytes of `load_bytes` times what their channels (P, 1) count, float32 (P, S)."""
    # A byte above the bits of 2**15 makes a number of 2**15 and the byte. What rounding 2**15 + 128
    # channels loses is at most a thousandth of what the byte counts.
    first, second, third, fourth = gl.inline_asm_elementwise(
        "{ .reg .b32 a; xor.b32 a, $4, 0x80808080; prmt.b32 $0, a, 0x47000000, 0x7604;"
        "prmt.b32 $1, a, 0x47000000, 0x7614; prmt.b32 $2, a, 0x47000000, 0x7624;"
        "prmt.b32 $3, a, 0x47000000, 0x7634; }",
        "=&f,=&f,=&f,=&f,r",
        [words],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )
    numbers = gl.reshape(gl.join(gl.join(first, third), gl.join(second, fourth)), [P, S])
    numbers = gl.convert_layout(numbers, STATE, assert_trivial=True)
    return gl.fma(numbers, channel, channel * -32896.0)


@gluon.jit
def integers(values, factors):
    """The integers nearest to float32 `values` times `factors`, in the low bits of the result."""
    return gl.fma(values, factors, INTEGERS)


@gluon.jit
def bounded_integers(values, factors):
    """`integers`, none beyond 127, of `values` (two whose sum it is) times `factors`.

    The second factor is divided by 254 already.
    """
    first, second = values
    # Between 0 and 1 the GPU bounds results for nothing.
    share = gl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, $3;",
        "=f,f,f,f",
        [second, factors[1], gl.fma(first, factors[0] * (1.0 / 254.0), 0.5)],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
    return gl.fma(share, 254.0, INTEGERS - 127.0)


@gluon.jit
def store_integers(target, sums):
    """Store columns (P, W) of `integers` as int8; returns minus the integers as float32."""
    W: gl.constexpr = sums.shape[1]
    pairs = gl.reshape(sums.to(gl.int32, bitcast=True), [P, W // 4, 2, 2])
    even, odd = gl.split(pairs)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    words = gl.inline_asm_elementwise(
        "{ .reg .b32 a, b; prmt.b32 a, $1, $2, 0x0040; prmt.b32 b, $3, $4, 0x0040;"
        "prmt.b32 $0, a, b, 0x5410; }",
        "=r,r,r,r,r",
        [first, second, third, fourth],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    words = gl.convert_layout(words, words_of(W), assert_trivial=True)
    gl.store(_words(target, W), words)
    return INTEGERS - sums


@gluon.jit
def load_tokens(past_x, past_decay, INNER: gl.constexpr):
    """The chunk's dt * x (P, CHUNK), of memory, and how much of it is left, (1, CHUNK).

    `past_x` points to the head of the first token, `past_decay` to its sums.
    """
    token = along(CHUNK, 1, TOKENS)
    x = gl.load(past_x + (token * INNER + along(P, 0, TOKENS)))
    return x, gl.exp(gl.load(past_decay + CHUNK - 1) - gl.load(past_decay + token))


@gluon.jit
def added(kept, tokens, keys, GROUP: gl.constexpr):
    """`kept` (P, S), decayed, and the chunk's dt * x times B, of shared memory `keys`.

    `tokens` are of `load_tokens`.
    """
    x, left = tokens
    x = x.to(gl.float32) * left
    # Two halves hold 22 bits of x, down to 2**-24; B is one half already.
    high = x.to(gl.float16)
    low = (x - high.to(gl.float32)).to(gl.float16)
    high = gl.convert_layout(_tiled_channels(high), LEFT, assert_trivial=True)
    low = gl.convert_layout(_tiled_channels(low), LEFT, assert_trivial=True)
    return from_result(products((high, low), keys, as_result(kept), GROUP, True))
