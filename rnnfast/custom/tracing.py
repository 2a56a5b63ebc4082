"""From a cell's step in PyTorch to a `Program`, with a clear error for all that has no kernel."""

from __future__ import annotations

import inspect
import linecache
import os
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from threading import Thread
from types import CodeType, FrameType, TracebackType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rnnfast.custom.program import CALLS, COMPARISONS, MASKS, Argument, Builder, Program, Ref, Value

_SIZE = (2, 3)  # of the tensors in a trace, which have no memory
_NOT_USERS = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep for file in (torch.__file__, __file__)
)

ALLOWED = (
    "+ - * /, neg, reciprocal, square, pow with a constant multiple of 0.5 from -4 to 4, "
    "comparisons, isnan, logical_and, logical_or, logical_xor, logical_not, where, masked_fill, "
    "exp, expm1, log, log1p, logaddexp, sqrt, rsqrt, abs, sign, sin, cos, erf, tanh, sigmoid, "
    "relu, relu6, leaky_relu, elu, celu, selu, silu, gelu, mish, softplus, logsigmoid, hardtanh, "
    "hardsigmoid, hardswish, minimum, maximum, clamp, lerp, addcmul, addcdiv, zeros_like, "
    "ones_like, full_like, detach"
)
"""What a step may call, for messages."""


class CellError(ValueError):
    """A step that no kernel can be made of. The message names the line."""


class Traced(Tensor):
    """A tensor of a trace: a value of the program that is being made, without memory."""

    value: Value
    recorder: Recorder
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(  # noqa: D102
        cls, recorder: Recorder, value: Value, mask: bool, requires_grad: bool = False
    ) -> Traced:
        tensor: Traced = torch.Tensor._make_wrapper_subclass(
            cls,
            _SIZE,
            dtype=torch.bool if mask else torch.float64,
            device=torch.device("cpu"),
            requires_grad=requires_grad,
        )
        tensor.value, tensor.recorder = value, recorder
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise CellError("A tensor of the step is used after the step has returned.")

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        self.recorder.fail(
            "The step needs the value of a tensor, for an `if`, for a Python number or for an "
            "array. A kernel cannot branch on values: use torch.where."
        )

    __bool__ = __float__ = __int__ = __index__ = __complex__ = __array__ = _refuse
    item = tolist = numpy = _refuse

    def _refuse_size(self, *args: Any) -> Any:
        if not self.recorder.of_user:
            return torch.Size(_SIZE)
        self.recorder.fail(
            "The step asks for the size of a tensor. A cell works for all sizes: take a number "
            "from outside, or use full_like."
        )

    def numel(self) -> int:
        """The number of elements; refused in a user's step."""
        return self._refuse_size().numel()

    size = __len__ = _refuse_size  # type: ignore[assignment]
    shape = property(_refuse_size)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<tensor of a cell's step: {self.value}>"

    def _refuse_part(self, *args: Any) -> Any:
        self.recorder.fail(
            "The step indexes or iterates over the units of a gate, a state or a parameter. "
            "Every operation must be elementwise: x[g] and h[g] are whole gates."
        )

    __getitem__ = __iter__ = _refuse_part

    def __setitem__(self, *args: Any) -> Any:
        self.recorder.fail(_IN_PLACE)


_IN_PLACE = "The step writes to a tensor in place. Make a new tensor: z = z * 2, not z *= 2."

# operators by the number of their leading arguments that are kept
_KEPT = {
    **dict.fromkeys(CALLS, 1),
    **dict.fromkeys(COMPARISONS, 2),
    **dict.fromkeys(("logical_and", "logical_or", "logical_xor"), 2),
    **dict.fromkeys(("maximum", "minimum", "clamp_min", "clamp_max", "logaddexp", "mul"), 2),
    **dict.fromkeys(("leaky_relu", "gelu"), 2),
    **dict.fromkeys(("where", "hardtanh", "softplus"), 3),
    "elu": 4,
}
_SAME = {
    "bitwise_and": "logical_and",
    "bitwise_or": "logical_or",
    "bitwise_xor": "logical_xor",
    "bitwise_not": "logical_not",
    "sgn": "sign",
    "clip": "clamp",
    "multiply": "mul",
    "special_expm1": "expm1",
}
_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)
_COPIES = ("alias", "clone", "lift_fresh", "lift_fresh_copy", "positive", "view_of", "view_as")
_FILLED = {"zeros_like": 0.0, "ones_like": 1.0, "new_zeros": 0.0, "new_ones": 1.0}


class Recorder(TorchDispatchMode):
    """Records the operators that run under it on tensors made by `input`.

    Args:
        builder: Where the operations go.
        of_user: Whether the operators are a user's, so that what is not allowed is an error for
            the user; else they are torch's own derivatives.
        decompositions: Functions in Python for operators that are to be taken apart.
        code: The code object of the user's function.
    """

    def __init__(
        self,
        builder: Builder,
        of_user: bool,
        decompositions: dict[Any, Callable[..., Any]] | None = None,
        code: CodeType | None = None,
    ) -> None:
        super().__init__()
        self.builder, self.of_user, self.code = builder, of_user, code
        self.decompositions = decompositions or {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds

    def input(self, index: int, requires_grad: bool = False) -> Traced:
        """The tensor that stands for an input of the program."""
        return Traced(self, Ref(index), False, requires_grad)

    def fail(self, problem: str) -> NoReturn:
        """Raises the error for the line of the user's function that is running."""
        raise CellError(f"{problem}\n{_place(_user_frame(sys._getframe(1), self.code))}")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if not any(isinstance(value, Traced) for value in _flat((*args, *kwargs.values()))):
            self._check_random(func, name)
            return func(*args, **kwargs)
        self._check_random(func, name)
        if self.of_user and not torch.is_grad_enabled():
            self.fail("The step turns gradients off. Use detach() on the values it is meant for.")
        bound = _bound(func, args, kwargs)
        if func._schema.is_mutable:
            if self.of_user:
                self.fail(_IN_PLACE)
            result = self._record(func, name.rstrip("_"), bound)
            args[0].value = result.value
            return args[0]
        packet = func.overloadpacket
        decomposition = self.decompositions.get(func, self.decompositions.get(packet))
        if decomposition is not None:
            with self:
                return decomposition(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), torch._C.DispatchKey.CompositeImplicitAutograd
        ):
            with self:
                return func.decompose(*args, **kwargs)
        result = self._record(func, name, bound)
        if name == "log_sigmoid_forward":
            return result, Traced(self, 0.0, False)
        return result

    def _check_random(self, func: Any, name: str) -> None:
        # torch's dropout fills an empty tensor
        if torch.Tag.nondeterministic_seeded in func.tags or name == "empty_like":
            self.fail(
                f"The step draws random numbers ({name}). A step must be a function of its "
                "arguments: put noise into the input or into a state."
            )

    def _record(self, func: Any, name: str, bound: dict[str, Any]) -> Traced:
        name = _SAME.get(name, name)
        given = list(bound.values())
        if func._overloadname in ("Tensor_mode", "Scalar_mode"):
            self._not_allowed(f"{name} with rounding_mode")
        if name in _COPIES:
            return Traced(self, given[0].value, given[0].dtype is torch.bool)
        if name in _FILLED or name in ("full_like", "new_full"):
            return self._filled(name, bound)
        if name in ("_to_copy", "convert_element_type"):
            return self._converted(given[0], bound.get("dtype"))
        if name == "log_sigmoid_forward":
            return self._of("log_sigmoid", given[0])
        if name in ("add", "sub", "rsub"):
            other = given[1] if bound.get("alpha", 1) == 1 else self._times(given[1], bound)
            return self._of(name, given[0], other)
        if name in ("div", "divide", "true_divide"):
            return self._of("div", given[0], given[1])
        if name == "square":
            return self._of("pow", given[0], 2.0)
        if name == "pow":
            return self._power(given[0], given[1])
        if name == "clamp":
            result = given[0]
            if given[1] is not None:
                result = self._of("clamp_min", result, given[1])
            return result if given[2] is None else self._of("clamp_max", result, given[2])
        if name == "lerp":
            return self._of("add", given[0], self._lerp_change(*given[:3]))
        if name in ("addcmul", "addcdiv"):
            change = self._of("mul" if name == "addcmul" else "div", given[1], given[2])
            if bound["value"] != 1:
                change = self._of("mul", change, bound["value"])
            return self._of("add", given[0], change)
        if name == "isnan":
            return self._of("ne", given[0], given[0])
        if name == "celu":
            alpha = float(given[1])
            return self._of("elu", given[0], alpha, 1.0, 1 / alpha)
        if name == "selu":
            return self._of("elu", given[0], *_SELU, 1.0)
        if name == "masked_fill":
            return self._of("where", given[1], given[2], given[0])
        if name in _KEPT:
            return self._of(name, *given[: _KEPT[name]])
        self._not_allowed(name)

    def _not_allowed(self, name: str) -> NoReturn:
        if self.of_user:
            self.fail(
                f"The step calls {name}, which a cell cannot have. Every operation must be "
                f"elementwise and one of these: {ALLOWED}."
            )
        raise CellError(f"The derivative of this cell needs {name}, which has no kernel.")

    def _times(self, other: Any, bound: dict[str, Any]) -> Any:
        if isinstance(other, Traced):
            return self._of("mul", other, bound["alpha"])
        return self._argument(other) * bound["alpha"]

    def _lerp_change(self, start: Any, end: Any, weight: Any) -> Any:
        return self._of("mul", self._of("sub", end, start), weight)

    def _power(self, base: Any, exponent: Any) -> Traced:
        power = self._argument(exponent)
        if not isinstance(base, Traced) or not isinstance(power, float):
            self._not_allowed("pow with a tensor as its exponent")
        if self.of_user and not (abs(power) <= 4 and 2 * power == int(2 * power)):
            self._not_allowed(f"pow with the exponent {power:g}")
        return self._of("pow", base, power)

    def _filled(self, name: str, bound: dict[str, Any]) -> Traced:
        dtype = bound.get("dtype")
        if dtype is not None and dtype not in (torch.float64, torch.float32):
            self._not_allowed(f"{name} with dtype={dtype}")
        fill = _FILLED[name] if name in _FILLED else self._argument(bound["fill_value"])
        assert isinstance(fill, float)
        if self.of_user and tuple(bound.get("size", ())) != ():
            self._not_allowed(f"{name} with a size")
        if self.of_user:
            return Traced(self, self.builder.add("full_like", Ref(0), fill), False)
        return Traced(self, fill, False)

    def _converted(self, tensor: Traced, dtype: torch.dtype | None) -> Traced:
        if dtype is None or tensor.dtype is dtype:
            return tensor
        if dtype is torch.float32 and tensor.dtype is torch.float64:
            return tensor  # kernels compute in float32 or float64 in any case
        if dtype.is_floating_point and tensor.dtype is torch.bool:
            return Traced(self, self._number_of(tensor), False)
        self.fail(
            f"The step converts a tensor to {dtype}. The types are chosen when the cell runs. "
            "A comparison becomes 0 and 1 where it is multiplied."
        )

    def _number_of(self, mask: Traced) -> Value:
        return self.builder.add("where", mask.value, 1.0, 0.0)

    def _argument(self, value: Any) -> Argument:
        if isinstance(value, Traced):
            return value.value
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, Tensor):
            return self._constant(value)
        if isinstance(value, bool | int | float):
            return float(value)
        self.fail(f"The step uses a {type(value).__name__} where a tensor or a number belongs.")

    def _constant(self, tensor: Tensor) -> float:
        advice = "Make it a parameter of the cell, and read it from `parameters`."
        if tensor.dim() > 0:
            self.fail(
                f"The step uses a tensor of size {tuple(tensor.shape)} that does not come from its "
                "arguments. Only numbers and tensors without dimensions may come from elsewhere. "
                f"{advice}"
            )
        if tensor.requires_grad:
            self.fail(f"The step uses a tensor from outside that requires a gradient. {advice}")
        if tensor.dtype.is_complex:
            self.fail("The step uses a complex number.")
        return float(tensor.item())

    def _of(self, operator: str, *given: Any) -> Traced:
        """Records one operator of `CALLS`."""
        assert operator in CALLS, operator
        masks = [isinstance(value, Traced) and value.dtype is torch.bool for value in given]
        arguments = [self._argument(value) for value in given]
        logical = operator.startswith("logical_")
        if operator in ("logical_and", "logical_or", "logical_xor", "logical_not"):
            if not all(masks):
                self.fail(f"The step calls {operator} on something else than comparisons.")
        elif operator == "where":
            if not masks[0] and isinstance(arguments[0], Ref):
                self.fail("The condition of torch.where is not a comparison.")
            if isinstance(arguments[0], float):
                chosen = given[1] if arguments[0] else given[2]
                if isinstance(chosen, Traced):
                    return chosen
                return Traced(self, self.builder.add("full_like", Ref(0), arguments[1]), False)
        elif any(masks) and operator not in ("mul", "div"):
            tensors = [isinstance(value, Traced) for value in given]
            if masks == tensors:
                self.fail(f"The step calls {operator} on comparisons alone, which are booleans.")
        for index, value in enumerate(given):
            if masks[index] and not logical and not (operator == "where" and index == 0):
                arguments[index] = self._number_of(value)
        return Traced(self, self.builder.add(operator, *arguments), operator in MASKS)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by their names, in the order of the operator's schema."""
    bound = {}
    for index, argument in enumerate(func._schema.arguments):
        if index < len(args):
            bound[argument.name] = args[index]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


# ---- the line of a problem ----


def _in_user_code(code: CodeType) -> bool:
    name = code.co_filename
    return not name.startswith("<frozen") and not os.path.abspath(name).startswith(_NOT_USERS)


def _user_frame(frame: FrameType | None, code: CodeType | None) -> tuple[CodeType, int] | None:
    """The innermost frame that is not torch's or ours, if the step is running."""
    found = None
    while frame is not None:
        if found is None and _in_user_code(frame.f_code):
            found = (frame.f_code, frame.f_lineno)
        if frame.f_code is code:
            return found or (frame.f_code, frame.f_lineno)
        frame = frame.f_back
    return found


def _traceback_place(traceback: TracebackType | None) -> tuple[CodeType, int] | None:
    found = None
    while traceback is not None:
        if _in_user_code(traceback.tb_frame.f_code):
            found = (traceback.tb_frame.f_code, traceback.tb_lineno)
        traceback = traceback.tb_next
    return found


def _place(where: tuple[CodeType, int] | None) -> str:
    if where is None:
        return "  in a function whose source is not known"
    code, line = where
    text = linecache.getline(code.co_filename, line).strip()
    place = f'  File "{code.co_filename}", line {line}, in {code.co_name}'
    return f"{place}\n    {text}" if text else place


def _code_of(function: Callable[..., Any]) -> CodeType | None:
    plain: Any = inspect.unwrap(function)
    plain = getattr(plain, "func", plain)  # of functools.partial
    if not hasattr(plain, "__code__"):
        plain = getattr(type(plain), "forward", None) or type(plain).__call__
    return getattr(plain, "__code__", None)


# ---- tracing ----

_Result = TypeVar("_Result")


def alone(function: Callable[[], _Result]) -> _Result:
    """Calls a function in a thread of its own.

    torch keeps its modes for each thread: inference mode, autocast, the default device, hooks on
    saved tensors, transforms. None of them must change what is recorded.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class _Gates(tuple):  # type: ignore[type-arg]
    """The gates of x or h."""

    recorder: Recorder
    name: str

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, Traced):
            index._refuse()
        if isinstance(index, int) and not -len(self) <= index < len(self):
            self.recorder.fail(
                f"{self.name}[{index}] is beyond the gates. The cell has {len(self)}: "
                f"{self.name}[0] to {self.name}[{len(self) - 1}]."
            )
        return super().__getitem__(index)


def input_names(gates: int, states: Sequence[str], parameters: Sequence[str]) -> tuple[str, ...]:
    """The inputs of a step's program: gates of x, gates of h, states, parameters."""
    return (
        *(f"x[{g}]" for g in range(gates)),
        *(f"h[{g}]" for g in range(gates)),
        *(f"state.{name}" for name in states),
        *(f"parameters.{name}" for name in parameters),
    )


def trace(
    function: Callable[..., Any],
    gates: int,
    states: Sequence[str],
    parameters: Sequence[str] = (),
    *,
    only: str | None = None,
) -> Program:
    """The program of a cell's step.

    Args:
        function: ``step(x, h, state)``, or ``step(x, h, state, parameters)`` if there are
            parameters. It returns the new states: a tensor, or a tuple in the order of ``states``.
        gates: How many gates ``x`` and ``h`` have.
        states: The names of the states, of which the first is the output ``h``.
        parameters: The names of the learnable vectors.
        only: The name of what the function takes in place of ``x`` and ``h``: their sums, one for
            each gate. None if it takes both.

    Returns:
        The program. Its inputs are the gates of x, those of h, the states and the parameters. Its
        outputs are the new states.

    Raises:
        CellError: The function is not a step that a kernel can be made of.
    """
    return alone(lambda: _traced(function, gates, states, parameters, only))


def _traced(
    function: Callable[..., Any],
    gates: int,
    states: Sequence[str],
    parameters: Sequence[str],
    only: str | None,
) -> Program:
    builder = Builder(input_names(gates, states, parameters))
    code = _code_of(function)
    recorder = Recorder(builder, of_user=True, code=code)
    tensors = [recorder.input(index) for index in range(len(builder.inputs))]
    of_gates = {"x": tensors[:gates], "h": tensors[gates : 2 * gates]}
    if only:
        with recorder:
            of_gates = {only: [x + h for x, h in zip(*of_gates.values(), strict=True)]}
    arguments: list[Any] = []
    for name, own in of_gates.items():
        arguments.append(_Gates(own))
        arguments[-1].recorder, arguments[-1].name = recorder, name
    end = 2 * gates + len(states)
    arguments.append(namedtuple("State", states)(*tensors[2 * gates : end]))
    if parameters:
        arguments.append(namedtuple("Parameters", parameters)(*tensors[end:]))
    start = None if code is None else (code, code.co_firstlineno)
    names = [*of_gates, "state", *(["parameters"] if parameters else [])]
    _check_signature(function, arguments, names, start)

    last: dict[str, Any] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "return" and frame.f_code is code:
            last.update(line=frame.f_lineno, variables=dict(frame.f_locals))

    before = sys.getprofile()
    try:
        with recorder:
            sys.setprofile(profile)
            try:
                result = function(*arguments)
            finally:
                sys.setprofile(before)
    except CellError:
        raise
    except Exception as error:
        where = _traceback_place(error.__traceback__) or start
        raise CellError(_explained(error, states, parameters) + "\n" + _place(where)) from error
    place = _place(start if code is None or "line" not in last else (code, last["line"]))
    values = _checked_result(result, states, builder, place)
    for name, variable in last.get("variables", {}).items():
        if isinstance(variable, Traced) and builder.operation(variable.value) is not None:
            assert isinstance(variable.value, Ref)
            builder.names.setdefault(variable.value, name)
    return builder.build(values)


def _check_signature(
    function: Callable[..., Any],
    arguments: list[Any],
    names: list[str],
    start: tuple[CodeType, int] | None,
) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise CellError(
            f"A step of this cell is called with ({', '.join(names)}), but this function takes "
            f"{signature}. The last argument is there only if the cell has parameters.\n"
            + _place(start)
        ) from error


def _explained(error: Exception, states: Sequence[str], parameters: Sequence[str]) -> str:
    text = f"The step raised {type(error).__name__}: {error}"
    if isinstance(error, AttributeError):
        text += f"\nThe states are {', '.join(states)}"
        text += f", the parameters {', '.join(parameters)}." if parameters else "."
    return text


def _checked_result(
    result: Any, states: Sequence[str], builder: Builder, place: str
) -> list[Ref | None]:
    expected = ", ".join(states)
    results = result if isinstance(result, tuple | list) else (result,)
    if len(results) != len(states):
        raise CellError(
            f"The step returned {len(results)} tensor{'s' * (len(results) != 1)}, but the cell has "
            f"{len(states)} state{'s' * (len(states) != 1)}: {expected}. Return one tensor for "
            f"each, in this order.\n{place}"
        )
    values: list[Ref | None] = []
    for name, tensor in zip(states, results, strict=True):
        if not isinstance(tensor, Traced):
            kind = type(tensor).__name__
            if isinstance(tensor, Tensor):
                kind = f"tensor of size {tuple(tensor.shape)} that does not come from its arguments"
            raise CellError(
                f"The step returned a {kind} as the state {name}. Return a tensor of the size of "
                f"x[0]; for a constant use torch.full_like(x[0], value).\n{place}"
            )
        if tensor.dtype is torch.bool:
            raise CellError(
                f"The step returned booleans as the state {name}. Use torch.where to choose "
                f"numbers.\n{place}"
            )
        value = tensor.value
        if not isinstance(value, Ref) or not _has_batch(builder, value):
            value = builder.add("add", builder.add("full_like", Ref(0), 0.0), value)
        assert isinstance(value, Ref)
        values.append(value)
    return values


def _has_batch(builder: Builder, value: Ref) -> bool:
    """Whether a value has a row for each sequence. Parameters alone give one row for all."""
    operation = builder.operation(value)
    if operation is None:
        return not builder.inputs[value.index].startswith("parameters.")
    return any(_has_batch(builder, a) for a in operation.arguments if isinstance(a, Ref))
