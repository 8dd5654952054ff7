"""Sixteen numbers at once in numba: a vector type, and what a packed product does with it.

LLVM makes of them what the processor has: AVX-512, two registers of AVX2, four of SSE or NEON. Addresses are integers.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.extending import intrinsic

from eora_lab.layer.cpu_kernels.packed import FIELDS, LANES

FLOAT, INT, BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(8)
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)


class Vector(types.Type):
    """Sixteen float32."""

    def __init__(self):
        super().__init__("Vector")


@register_default(Vector)
class VectorModel(models.PrimitiveModel):
    """How LLVM holds it."""

    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, FLOATS)


VECTOR = Vector()


def read(builder, address, kind):
    """A value in memory, at any alignment."""
    return builder.load(builder.inttoptr(address, ir.PointerType(kind)), align=1)


def constant(value: int):
    """The same integer in every lane."""
    return ir.Constant(INTS, [value] * LANES)


def add_product(builder, total, a, b):
    """total + a b, in one rounding where the processor has that."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    multiply_add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    return builder.call(multiply_add, [a, b, total])


@intrinsic
def pointer(typing, address, kind):
    """The address of numbers of a kind, to index."""

    def make(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind.dtype)(types.int64, kind), make


@intrinsic(prefer_literal=True)
def zeros(typing, rows):
    """As many vectors of zeros as there are rows."""
    kind = types.UniTuple(VECTOR, rows.literal_value)

    def make(context, builder, signature, arguments):
        return context.make_tuple(builder, kind, [ir.Constant(FLOATS, None)] * kind.count)

    return kind(rows), make


@intrinsic
def load(typing, address):
    """Sixteen neighbours."""
    return VECTOR(types.int64), lambda context, builder, signature, arguments: read(builder, arguments[0], FLOATS)


@intrinsic
def fetch(typing, address):
    """Have the cache read what lies there; any address will do."""

    def make(context, builder, signature, arguments):
        pointer = ir.PointerType(BYTE)
        kind = ir.FunctionType(ir.VoidType(), [pointer, INT, INT, INT])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [builder.inttoptr(arguments[0], pointer), INT(0), INT(3), INT(1)])
        return context.get_dummy_value()

    return types.void(types.int64), make


@intrinsic
def load_half(typing, address):
    """Sixteen neighbours in float16, that are finite."""

    def make(context, builder, signature, arguments):
        triple, _, features = context.codegen().magic_tuple()
        if "+f16c" in features or not triple.startswith("x86"):
            return builder.fpext(read(builder, arguments[0], ir.VectorType(ir.HalfType(), LANES)), FLOATS)
        bits = builder.zext(read(builder, arguments[0], ir.VectorType(ir.IntType(16), LANES)), INTS)
        size = builder.bitcast(builder.shl(builder.and_(bits, constant(0x7FFF)), constant(13)), FLOATS)
        size = builder.fmul(size, ir.Constant(FLOATS, [2.0**112] * LANES))  # what the exponents start from differs
        sign = builder.shl(builder.and_(bits, constant(0x8000)), constant(16))
        return builder.bitcast(builder.or_(builder.bitcast(size, INTS), sign), FLOATS)

    return VECTOR(types.int64), make


@intrinsic(prefer_literal=True)
def spread(typing, address, count):
    """`count` neighbours, each in as many lanes as the others."""
    n = count.literal_value

    def make(context, builder, signature, arguments):
        few = read(builder, arguments[0], ir.VectorType(FLOAT, n))
        lanes = ir.Constant(INTS, [lane * n // LANES for lane in range(LANES)])
        return builder.shuffle_vector(few, ir.Constant(few.type, ir.Undefined), lanes)

    return VECTOR(types.int64, count), make


@intrinsic
def add_products(typing, totals, a, address, stride):
    """totals[r] + a b[r], where b[r] lies r strides behind the address."""

    def make(context, builder, signature, arguments):
        totals, a, address, stride = arguments
        found = []
        for total in unpacked(builder, totals):
            found.append(add_product(builder, total, a, read(builder, address, FLOATS)))
            address = builder.add(address, stride)
        return context.make_tuple(builder, signature.return_type, found)

    return totals(totals, VECTOR, types.int64, types.int64), make


@intrinsic(prefer_literal=True)
def add_codes(typing, totals, codes, address, stride, bits):
    """totals[r] + the codes of sixteen lanes times x[r], field by field; x[r] lies r strides behind the address."""

    def make(context, builder, signature, arguments):
        totals, codes, address, stride, _ = arguments
        values, chains = numbers(context, builder, codes, bits.literal_value), [unpacked(builder, totals)]
        if len(chains[0]) == 1 and len(values) > 4:  # each addition waits for the one before: two sums, in turn
            chains.append([ir.Constant(FLOATS, None)])
        for field, value in enumerate(values):
            row, chain = address, chains[field % len(chains)]
            for r in range(len(chain)):
                chain[r] = add_product(builder, chain[r], value, read(builder, row, FLOATS))
                row = builder.add(row, stride)
            address = builder.add(address, ir.Constant(address.type, 4 * LANES))
        found = chains[0] if len(chains) == 1 else [builder.fadd(chains[0][0], chains[1][0])]
        return context.make_tuple(builder, signature.return_type, found)

    return totals(totals, types.int64, types.int64, types.int64, bits), make


@intrinsic(prefer_literal=True)
def store_codes(typing, address, codes, factor, summand, bits):
    """factor codes + summand of sixteen lanes, field by field."""

    def make(context, builder, signature, arguments):
        address, codes, factor, summand, _ = arguments
        for value in numbers(context, builder, codes, bits.literal_value):
            place = builder.inttoptr(address, ir.PointerType(FLOATS))
            builder.store(add_product(builder, summand, value, factor), place, align=4)
            address = builder.add(address, ir.Constant(address.type, 4 * LANES))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, VECTOR, VECTOR, bits), make


@intrinsic
def scale(typing, totals, parts, factor):
    """totals[r] + parts[r] factor."""

    def make(context, builder, signature, arguments):
        totals, parts, factor = arguments
        pairs = zip(unpacked(builder, totals), unpacked(builder, parts), strict=True)
        return context.make_tuple(
            builder, signature.return_type, [add_product(builder, total, part, factor) for total, part in pairs]
        )

    return totals(totals, totals, VECTOR), make


@intrinsic
def add(typing, totals, others):
    """totals[r] + others[r]."""

    def make(context, builder, signature, arguments):
        pairs = zip(*(unpacked(builder, rows) for rows in arguments), strict=True)
        return context.make_tuple(builder, signature.return_type, [builder.fadd(a, b) for a, b in pairs])

    return totals(totals, totals), make


@intrinsic
def sums(typing, totals):
    """Of the lanes of each."""
    kind = types.UniTuple(types.float32, totals.count)

    def make(context, builder, signature, arguments):
        found = []
        for total in unpacked(builder, arguments[0]):
            for half in (8, 4, 2, 1):
                low, high = (ir.Constant(ir.VectorType(INT, half), [at + i for i in range(half)]) for at in (0, half))
                parts = [builder.shuffle_vector(total, total, part) for part in (low, high)]
                total = builder.fadd(*parts)
            found.append(builder.extract_element(total, INT(0)))
        return context.make_tuple(builder, kind, found)

    return kind(totals), make


def unpacked(builder, rows) -> list:
    """The elements of a tuple."""
    return [builder.extract_value(rows, i) for i in range(rows.type.count)]


def numbers(context, builder, address, width: int):
    """The codes of sixteen lanes, a vector for each field; or sixteen weights, of 32 bits, or 16 (bfloat16)."""
    if width == 32:
        return [read(builder, address, FLOATS)]
    if width == 16:
        bits = builder.zext(read(builder, address, ir.VectorType(ir.IntType(16), LANES)), INTS)
        return [builder.bitcast(builder.shl(bits, constant(16)), FLOATS)]
    words, number = lanes_of(builder, address, width * FIELDS[width] // 8), number_of(context, builder, width)
    last = FIELDS[width] - 1
    return [
        number(builder.lshr(words, constant(width * field)) if field else words, field == last)
        for field in range(last + 1)
    ]


def number_of(context, builder, width: int):
    """How the lowest `width` bits of every lane become a number, as a function of lanes and whether no other bits are
    set. Where a register holds all numbers there are, the processor looks them up, and other bits do not matter.
    """
    features = context.codegen().magic_tuple()[2]
    lanes = LANES if "+avx512f" in features else LANES // 2
    if 2**width > lanes or "+avx2" not in features:
        mask = constant(2**width - 1)
        return lambda words, alone: builder.sitofp(words if alone else builder.and_(words, mask), FLOATS)
    part = ir.VectorType(FLOAT, lanes)
    table = ir.Constant(part, [float(lane % 2**width) for lane in range(lanes)])
    name = "llvm.x86.avx512.permvar.sf.512" if lanes == LANES else "llvm.x86.avx2.permps"
    kind = ir.FunctionType(part, [part, ir.VectorType(INT, lanes)])
    look_up = cgutils.get_or_insert_function(builder.module, kind, name)

    def number(words, alone):
        if alone:  # as fast, and by another unit of the processor
            return builder.sitofp(words, FLOATS)
        if lanes == LANES:
            return builder.call(look_up, [table, words])
        low, high = (ir.Constant(ir.VectorType(INT, lanes), [at + i for i in range(lanes)]) for at in (0, lanes))
        halves = [builder.call(look_up, [table, builder.shuffle_vector(words, words, half)]) for half in (low, high)]
        return builder.shuffle_vector(*halves, ir.Constant(INTS, list(range(LANES))))

    return number


def lanes_of(builder, address, width: int):
    """Sixteen unsigned integers of `width` bytes, 1 or 3, that follow each other. Of 3 bytes, it reads 8 bytes more."""
    if width == 1:
        return builder.zext(read(builder, address, ir.VectorType(BYTE, LANES)), INTS)
    low = read(builder, address, ir.VectorType(INT, 8))
    high = read(builder, builder.add(address, ir.Constant(address.type, 24)), ir.VectorType(INT, 8))
    quarters = [start + i for start in (0, 3, 8, 11) for i in range(4)]  # 12 bytes, which four lanes need, and 4 more
    words = builder.shuffle_vector(low, high, ir.Constant(INTS, quarters))
    packed = builder.bitcast(words, ir.VectorType(BYTE, 4 * LANES))
    zero = ir.Constant(packed.type, None)
    places = [
        16 * (lane // 4) + 3 * (lane % 4) + byte if byte < 3 else 64 for lane in range(LANES) for byte in range(4)
    ]
    spaced = builder.shuffle_vector(packed, zero, ir.Constant(ir.VectorType(INT, 4 * LANES), places))
    return builder.bitcast(spaced, INTS)
