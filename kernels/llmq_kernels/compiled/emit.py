"""Writing machine code in Python: a thin layer over llvmlite's IR builder in which kernels read
like C with vector types.

A `Value` is one SSA value with operators; Python numbers beside it become constants of its type,
spread over all lanes. Python loops and lists unroll at the time of writing, which is how register
blocks are made: `sums = [e.variable(e.zero(F32x16)) for _ in range(16)]` are sixteen registers.
`e.loop` is a loop at run time.

A kernel is `void kernel(int64 *arguments)`: addresses and sizes in one array, so that any pool of
threads can start it with one pointer. Its threads share the rows of blocks by taking the next index
from a counter in that array (`e.share`): a thread that the system delays costs one block, not its
whole half of the work, and nobody has to know how many threads there are.

Why not Numba, which carries llvmlite: its functions compile in seconds instead of tens of
milliseconds, cannot be compiled for another CPU's features (which the tests do), and their threads
are a second pool beside torch's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat16, which llvmlite's builder lacks; enough of it to convert to and from."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


I1, I8, I16, I32, I64, F32, BF16 = (
    ir.IntType(1),
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.FloatType(),
    _BFloat(),
)
POINTER, VOID = ir.PointerType(), ir.VoidType()


def vector(element: Any, lanes: int) -> Any:
    """The type of `lanes` elements."""
    return ir.VectorType(element, lanes)


def constant(type_: Any, value: Any) -> Any:
    """One number for all lanes, or a list of one per lane."""
    if not isinstance(type_, ir.VectorType):
        return ir.Constant(type_, value)
    values = value if isinstance(value, list) else [value] * type_.count
    return ir.Constant(type_, [ir.Constant(type_.element, v) for v in values])


class Value:
    """An SSA value. `>>` shifts in zeros, `sar` copies of the sign. Integers and floats are told
    apart by their type."""

    def __init__(self, emitter: Emitter, raw: Any) -> None:
        self.emitter, self.raw = emitter, raw

    @property
    def type(self) -> Any:
        return self.raw.type

    def _with(self, operation: str, other: Value | float) -> Value:
        raw = other.raw if isinstance(other, Value) else constant(self.type, other)
        return Value(self.emitter, getattr(self.emitter.builder, operation)(self.raw, raw))

    def _arithmetic(self, name: str, other: Value | float) -> Value:
        element = self.type.element if isinstance(self.type, ir.VectorType) else self.type
        return self._with(f"f{name}" if isinstance(element, ir.FloatType) else name, other)

    def __radd__(self, other: int) -> Value:
        return self + other

    def __add__(self, other: Value | float) -> Value:
        return self._arithmetic("add", other)

    def __sub__(self, other: Value | float) -> Value:
        return self._arithmetic("sub", other)

    def __mul__(self, other: Value | float) -> Value:
        return self._arithmetic("mul", other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._with("fdiv", other)

    def __rmul__(self, other: int) -> Value:
        return self * other

    def __floordiv__(self, other: Value | int) -> Value:
        return self._with("udiv", other)

    def __and__(self, other: Value | int) -> Value:
        return self._with("and_", other)

    def __or__(self, other: Value | int) -> Value:
        return self._with("or_", other)

    def __xor__(self, other: Value | int) -> Value:
        return self._with("xor", other)

    def __lshift__(self, other: Value | int) -> Value:
        return self._with("shl", other)

    def __rshift__(self, other: Value | int) -> Value:
        return self._with("lshr", other)

    def sar(self, other: int) -> Value:
        return self._with("ashr", other)

    def less(self, other: Value | int) -> Value:
        raw = other.raw if isinstance(other, Value) else constant(self.type, other)
        return Value(self.emitter, self.emitter.builder.icmp_signed("<", self.raw, raw))

    def cast(self, type_: Any) -> Value:
        """The same bits as another type."""
        return (
            self
            if self.type == type_
            else Value(self.emitter, self.emitter.builder.bitcast(self.raw, type_))
        )

    def to(self, operation: str, type_: Any) -> Value:
        """A conversion of every lane: `sitofp`, `sext`, `zext`, `trunc`, `fptosi`."""
        return Value(self.emitter, getattr(self.emitter.builder, operation)(self.raw, type_))

    def shuffle(self, lanes: Sequence[int], other: Value | None = None) -> Value:
        """Lanes of this vector, and from its lane count on of the other."""
        second = ir.Constant(self.type, ir.Undefined) if other is None else other.raw
        return Value(
            self.emitter,
            self.emitter.builder.shuffle_vector(
                self.raw, second, constant(vector(I32, len(lanes)), list(lanes))
            ),
        )


class Variable:
    """A value that changes in loops; the optimizer turns it into a register."""

    def __init__(self, emitter: Emitter, first: Value) -> None:
        self.emitter, self.type = emitter, first.type
        with emitter.builder.goto_entry_block():
            self.slot = emitter.builder.alloca(self.type)
        self.set(first)

    def get(self) -> Value:
        return Value(self.emitter, self.emitter.builder.load(self.slot, typ=self.type))

    def set(self, value: Value) -> None:
        self.emitter.builder.store(value.raw, self.slot)


class Emitter:
    """One kernel under construction; `arguments` names the entries of its int64 array, the first of
    which is the counter."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = ("counter", *arguments)
        self.addresses: set[str] = set()  # those of them that are
        self.module = ir.Module("llmq")
        function = ir.Function(self.module, ir.FunctionType(VOID, [POINTER]), "kernel")
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))
        self.array = Value(self, function.args[0])
        # A jump behind the entry block keeps it open for the stack slots of variables.
        body = function.append_basic_block("body")
        self.builder.branch(body)
        self.builder.position_at_end(body)

    # --- values -----------------------------------------------------------------------------------

    def constant(self, type_: Any, value: Any) -> Value:
        return Value(self, constant(type_, value))

    def argument(self, name: str) -> Value:
        """An argument as int64."""
        return self.load(I64, self.array, 8 * self.arguments.index(name), align=8)

    def number(self, name: str) -> Value:
        """An argument as float32, whose bits are the lower half of its entry (`float_bits`)."""
        return self.load(F32, self.array, 8 * self.arguments.index(name), align=8)

    def pointer(self, name: str) -> Value:
        """An argument as an address."""
        self.addresses.add(name)
        return Value(self, self.builder.inttoptr(self.argument(name).raw, POINTER))

    def at(self, base: Value, offset: Value | int) -> Value:
        """The address `offset` bytes behind `base`."""
        raw = offset.raw if isinstance(offset, Value) else constant(I64, offset)
        return Value(self, self.builder.gep(base.raw, [raw], source_etype=I8))

    def load(self, type_: Any, base: Value, offset: Value | int = 0, align: int = 1) -> Value:
        return Value(self, self.builder.load(self.at(base, offset).raw, typ=type_, align=align))

    def store(self, value: Value, base: Value, offset: Value | int = 0, align: int = 1) -> None:
        self.builder.store(value.raw, self.at(base, offset).raw, align=align)

    def prefetch(self, base: Value, offset: Value | int, level: int = 1) -> None:
        """Ask for a cache line of data, to be put into the first- or second-level cache; an address
        outside of memory does no harm."""
        self.call(
            "llvm.prefetch.p0",
            VOID,
            self.at(base, offset),
            *(self.constant(I32, value) for value in (0, 4 - level, 1)),
        )

    def buffer(self, n_bytes: int) -> Value:
        """Memory on the stack, aligned to cache lines."""
        with self.builder.goto_entry_block():
            slot = self.builder.alloca(ir.ArrayType(I8, n_bytes))
        slot.align, slot.type = 64, POINTER
        return Value(self, slot)

    def variable(self, first: Value) -> Variable:
        return Variable(self, first)

    def splat(self, value: Value, lanes: int) -> Value:
        """One number in all lanes."""
        type_ = vector(value.type, lanes)
        single = self.builder.insert_element(
            ir.Constant(type_, ir.Undefined), value.raw, constant(I32, 0)
        )
        return Value(self, single).shuffle([0] * lanes)

    def call(self, name: str, result: Any, *values: Value) -> Value:
        """An LLVM intrinsic by its full name."""
        type_ = ir.FunctionType(result, [value.type for value in values])
        function = self.module.globals.get(name) or ir.Function(self.module, type_, name)
        return Value(self, self.builder.call(function, [value.raw for value in values]))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        lanes = f"v{a.type.count}" if isinstance(a.type, ir.VectorType) else ""
        return self.call(f"llvm.fma.{lanes}f32", a.type, a, b, c)

    def reduce_add(self, values: Value) -> Value:
        """The sum of float32 lanes, in any order."""
        type_ = ir.FunctionType(F32, [F32, values.type])
        name = f"llvm.vector.reduce.fadd.v{values.type.count}f32"
        function = self.module.globals.get(name) or ir.Function(self.module, type_, name)
        return Value(
            self,
            self.builder.call(function, [constant(F32, 0.0), values.raw], fastmath=["reassoc"]),
        )

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        return Value(self, self.builder.select(condition.raw, yes.raw, no.raw))

    def minimum(self, a: Value, b: Value) -> Value:
        """The smaller of two integers."""
        return self.select(a.less(b), a, b)

    def negate(self, condition: Value) -> Value:
        return Value(self, self.builder.not_(condition.raw))

    # --- control ----------------------------------------------------------------------------------

    @contextmanager
    def loop(self, start: Value | int, stop: Value | int, step: int = 1) -> Iterator[Value]:
        """`for i in range(start, stop, step)`, int64."""
        index = self.variable(self._int(start))
        blocks = [self.builder.append_basic_block(name) for name in ("head", "inside", "after")]
        self.builder.branch(blocks[0])
        self.builder.position_at_end(blocks[0])
        i = index.get()
        self.builder.cbranch(i.less(self._int(stop)).raw, blocks[1], blocks[2])
        self.builder.position_at_end(blocks[1])
        yield i
        index.set(i + step)
        self.builder.branch(blocks[0])
        self.builder.position_at_end(blocks[2])

    @contextmanager
    def share(self, stop: Value | int) -> Iterator[Value]:
        """A loop whose indices, `0 .. stop - 1`, are shared out between the threads that run this
        kernel."""
        blocks = [self.builder.append_basic_block(name) for name in ("next", "inside", "after")]
        self.builder.branch(blocks[0])
        self.builder.position_at_end(blocks[0])
        i = Value(
            self, self.builder.atomic_rmw("add", self.array.raw, constant(I64, 1), "monotonic")
        )
        self.builder.cbranch(i.less(self._int(stop)).raw, blocks[1], blocks[2])
        self.builder.position_at_end(blocks[1])
        yield i
        self.builder.branch(blocks[0])
        self.builder.position_at_end(blocks[2])

    @contextmanager
    def share_bands(self) -> Iterator[Value]:
        """The bands of a weight, `bands_per_item` consecutive ones at a time: what a thread fetches
        ahead of its use is then its own, not the next thread's."""
        n_bands, per_item = self.argument("n_bands"), self.argument("bands_per_item")
        with (
            self.share((n_bands + per_item - 1) // per_item) as item,
            self.loop(item * per_item, self.minimum(item * per_item + per_item, n_bands)) as band,
        ):
            yield band

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.raw):
            yield

    def finish(self) -> str:
        """The kernel as LLVM's text, its arguments in a comment in front: addresses with a star."""
        self.builder.ret_void()
        names = [f"{name}*" if name in self.addresses else name for name in self.arguments[1:]]
        return f"; arguments: {' '.join(names)}\n{self.module}"

    def _int(self, value: Value | int) -> Value:
        return value if isinstance(value, Value) else self.constant(I64, value)
