"""How the products of a layer with a sparse output gradient run: channel-last slabs of x, and lists of entries.

sparse_gradient.hh says what slabs and lists are. Here they are given their sizes, from the shapes, the instruction set
and how many values are used, so that no result depends on the number of threads.
"""

from sparsetrain import arrays
from sparsetrain._kernels import core

# What a list meets of a slab: more than L1's 48 KB, as longer lists load the taps less often. Of 32, 64, 96 and
# 160 KB, 64 and 96 were best at 92 and 98 % zeros (64 channels at 56x56, 256 at 14x14, 512 at 7x7); 72 gives each its
# better group.
L1_BYTES = 72 << 10
# Lists that load and store the taps for fewer products of a register than SHORT are better made of more images, and
# with 3x3 taps from one register of channels instead of two: 6 to 20 % faster at 98 % zeros, 2 to 4 % at 92 % with
# stride 2 (the layers above, 128 -> 256 channels at 28x28 and others); 1x1: 7 to 20 % at 98 %, 6 to 13 % at 92 %;
# linear layers, batch 512: 28 and 20 %.
SHORT, SHORT_BYTES = 144, 160 << 10
MOST_POSITION = 1 << 23  # in a slab, of entries that hold a value of 8 bits in the same 32
TASKS = 16  # at least, where the shape allows: enough for 8 threads to share evenly


def _vectors(channels, taps, lanes, short):
    """Registers of channels side by side: as many as there are channels for, and as all taps of a tile leave."""
    most = 8 if taps == 1 else 4 if taps <= 3 else 1 if short else 2
    if lanes < 16:
        most = min(most, 4)
    while most > 1 and (most // 2) * lanes >= channels:
        most //= 2
    return most


def is_short(plan, share, dtype):
    """Whether the lists of a plan are shorter than SHORT where that share of values is used."""
    registers = plan.taps * plan.width / core.vector_lanes(dtype)
    return plan.list_values * share * registers < SHORT


def plan(x_shape, dtype, dy_shape, images, kernel, geometry, most=None, short=False, lanes=arrays.IMAGES):
    """The SlabPlan for blocked shapes of x and dy (blocks, channels, height, width, 16). geometry.groups must be 1.

    short: whether lists will be short, see is_short(). lanes: 1 for a plain image alone. most: how many products
    a sum of the weight gradient may have before it is added to others; None if that is not possible.
    """
    blocks, channels, height, width = x_shape[:4]
    _, out_channels, out_height, out_width = dy_shape[:4]
    taps, size = kernel[0] * kernel[1], dtype.itemsize
    register = core.vector_lanes(dtype)
    side, room = _vectors(channels, taps, register, short) * register, SHORT_BYTES if short else L1_BYTES
    row = (width + 2 * geometry.padding[1]) * side
    padded = height + 2 * geometry.padding[0]
    reach, stride = geometry.reach(kernel)[0] + 1, geometry.stride[0]

    def rows(bands):
        """Rows of the slab of the largest band."""
        begin = [b * out_height // bands for b in range(bands + 1)]
        last = padded - begin[-2] * stride
        return max(
            [last]
            + [max((e - b - 1) * stride + reach, (e - b) * stride) for b, e in zip(begin, begin[1:], strict=False)]
        )

    bands = 1
    while bands < out_height and rows(bands) * row * size > room:
        bands += 1
    while bands > 1 and rows(bands - 1) == rows(bands):
        bands -= 1
    # An odd number of lines, or all images would share one set of the L1 cache
    line = 64 // size
    image = (-(-rows(bands) * row // line) | 1) * line
    group, span = 1, 1
    while group < lanes and 2 * group * image * size <= room:
        group *= 2
    if group == lanes:
        while span * 2 <= blocks and 2 * lanes * span * image * size <= room:
            span *= 2
        group = lanes * span
    spans = -(-blocks // span)
    channel_groups = -(-channels // side)
    parts = min(spans, -(-TASKS // channel_groups))
    if most is not None:
        spans_of_a_part = most // (lanes * span * out_height * out_width)
        if spans_of_a_part == 0:
            return None
        parts = max(parts, -(-spans // spans_of_a_part))
    return core.SlabPlan(
        blocks=blocks, images=images, channels=channels, height=height, in_width=width, out_channels=out_channels,
        out_height=out_height, out_width=out_width, kernel=kernel, stride=geometry.stride, padding=geometry.padding,
        dilation=geometry.dilation, width=side, lanes=lanes, span=span, group=group, bands=bands, row=row, image=image,
        parts=parts, short=short,
    )  # fmt: skip
