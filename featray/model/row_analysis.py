"""Find out from a traced graph, without running it, whether values vary for the same input.

In: a recording of a model, with the tensors of its layers. Out: whether each tensor samples, or depends on
the same row of the input only; or that the graph does not show it. Only operations with a rule here show it.
For all others the model has to be run, so a missing rule costs time and no correctness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import Any

from featray.errors import ModelError
from featray.model import inputs, seeding, trace
from featray.model.taps import Tap
from featray.model.trace import ModelCall, Recording
from featray.model.variation import TapEvaluation, Variation


class _Origin(Enum):
    """Data from which the values of a tensor are computed."""

    FIXED = auto()
    """Weights and constants only."""
    SIZE = auto()
    """Also the number of rows in the batch."""
    ROWS = auto()
    """The first axis is that of the batch, and each row is computed from the same row of the input only."""
    RANDOM = auto()
    """Also random numbers."""
    UNKNOWN = auto()
    """Anything; the operation has no rule."""


_Rule = Callable[[Any, Sequence[_Origin]], bool]
"""Takes an operation and the origins of its inputs, at least one of which is ROWS and none of which is RANDOM
or UNKNOWN. Returns whether all outputs are ROWS."""

_VARIATIONS = {
    _Origin.FIXED: Variation.NONE,
    _Origin.ROWS: Variation.NONE,
    _Origin.RANDOM: Variation.SAMPLES,
}
_SHAPE_OPS = {"Shape", "ShapeN", "Size", "Rank"}
_CALLING_OPS = {"While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase", "PartitionedCall",
                "StatefulPartitionedCall", "PyFunc", "PyFuncStateless", "EagerPyFunc"}  # fmt: skip
"""Operations that run a function, which may do anything."""
_WRITING_OPS = ("Assign", "ResourceScatter", "ResourceApply", "StatefulUniform", "StatefulStandard")


def evaluate_taps_by_graph(
    call: ModelCall, recording: Recording, taps: Sequence[Tap]
) -> TapEvaluation | None:
    """Return the result of `variation.evaluate_taps` without running the model.

    The result is None if the graph does not show the shape and the variation of every tap.

    Args:
        call: The model and how to call it. Along an axis that accepts any size, sizes are tried as for a run.
        recording: The recording of this call.
        taps: Taps of the recording, without problems.
    """
    import tensorflow as tf

    sized = recording if None not in call.input_shape else _record_with_size(call, taps)
    if sized is None:
        return None
    tensors: dict[str, Any] = {tap.key: sized.tensors.get(tap.key) for tap in taps}
    if not all(isinstance(tensor, tf.Tensor) and tensor.shape.rank for tensor in tensors.values()):
        return None
    origins = _find_origins(sized.inputs)
    variations = {
        key: _VARIATIONS[origin]
        for key, tensor in tensors.items()
        if (origin := origins.get(tensor.name, _Origin.UNKNOWN)) in _VARIATIONS
    }
    shapes = {key: tuple(tensor.shape)[1:] for key, tensor in tensors.items()}
    is_shown = len(variations) == len(tensors) and all(None not in shape for shape in shapes.values())
    return TapEvaluation(shapes, variations) if is_shown else None


def _record_with_size(call: ModelCall, taps: Sequence[Tap]) -> Recording | None:
    """Return the recording for the smallest trial size at which the model has all taps, or None."""
    for size in inputs.TRIAL_SIZES:
        shape = tuple(size if extent is None else extent for extent in call.input_shape)
        try:
            recording = trace.record_taps(replace(call, input_shape=shape))
        except ModelError:
            continue
        usable = {tap.key for tap in recording.taps if not tap.problem}
        if usable >= {tap.key for tap in taps}:
            return recording
    return None


def _find_origins(batch: Any) -> dict[str, _Origin]:
    """Return the origin of every tensor in the graph of `batch`, by the name of the tensor."""
    graph = batch.graph
    random_names = seeding.list_state_tensors(graph)
    operations = graph.get_operations()
    written = {
        operation.inputs[0].name for operation in operations if operation.type.startswith(_WRITING_OPS)
    }
    origins = dict.fromkeys(written, _Origin.UNKNOWN) | dict.fromkeys(random_names, _Origin.RANDOM)
    origins[batch.name] = _Origin.ROWS
    for operation in operations:  # in order of creation, so inputs come before outputs
        given = [origins.get(tensor.name, _Origin.UNKNOWN) for tensor in operation.inputs]
        for index, output in enumerate(operation.outputs):
            origins.setdefault(output.name, _find_origin(operation, given, index))
    return origins


def _find_origin(operation: Any, given: Sequence[_Origin], index: int) -> _Origin:
    """Return the origin of output `index` of an operation whose inputs have the origins `given`."""
    kind = operation.type
    if kind == "IdentityN":
        return given[index]
    if kind in _SHAPE_OPS:
        is_fixed = set(given) <= {_Origin.FIXED}
        return _Origin.FIXED if is_fixed else _Origin.SIZE
    if kind in _CALLING_OPS:  # not each of its outputs needs each of its inputs
        return _Origin.UNKNOWN
    if seeding.is_uncontrolled_random_op(kind) or _Origin.RANDOM in given:
        return _Origin.RANDOM
    if _Origin.UNKNOWN in given:
        return _Origin.UNKNOWN
    if _Origin.ROWS in given:
        rule = _RULES.get(kind)
        return _Origin.ROWS if rule is not None and rule(operation, given) else _Origin.UNKNOWN
    if _Origin.SIZE in given:
        return _Origin.ROWS if _fills_rows(operation, given) else _Origin.SIZE
    return _Origin.FIXED


def _fills_rows(operation: Any, given: Sequence[_Origin]) -> bool:
    """Return whether an operation repeats a fixed value for every row, such as zeros for a first state."""
    value = {"Fill": 1, "BroadcastTo": 0}.get(operation.type)
    if value is None or given[value] is not _Origin.FIXED:
        return False
    shape = _get_shape(operation.outputs[0])
    return (
        bool(shape)
        and shape[0] is None
        and None not in shape[1:]
        and _is_same_for_rows(operation.inputs[value], len(shape))
    )


def _get_shape(tensor: Any) -> tuple[int | None, ...]:
    """Return the static shape of a tensor; empty if it is a single value or the rank is unknown."""
    return tuple(tensor.shape) if tensor.shape.rank is not None else ()


def _is_same_for_rows(tensor: Any, rank: int) -> bool:
    """Return whether broadcasting gives every row of a result of this rank the same values of `tensor`."""
    if tensor.shape.rank is None:
        return False
    return bool(tensor.shape.rank < rank or (tensor.shape.rank == rank and tensor.shape[0] == 1))


def _get_constant(tensor: Any) -> list[int | None] | None:
    """Return the values of a constant tensor of whole numbers, also of one number, as a list.

    Values that are not known are None, and so is the list if no value is known.
    """
    import tensorflow as tf

    value = tf.get_static_value(tensor, partial=True)
    return None if value is None else [None if one is None else int(one) for one in value.ravel()]


def _broadcasts_rows(operation: Any, given: Sequence[_Origin]) -> bool:
    """Rule of operations that combine values at the same position."""
    rank = operation.outputs[0].shape.rank
    return bool(rank) and all(
        tensor.shape.rank == rank if origin is _Origin.ROWS
        else origin is _Origin.FIXED and _is_same_for_rows(tensor, rank)
        for tensor, origin in zip(operation.inputs, given, strict=True)
    )  # fmt: skip


def _has_only_rows_first(operation: Any, given: Sequence[_Origin]) -> bool:
    """Rule of operations whose first input is the batch, and whose other inputs are weights."""
    is_first = given[0] is _Origin.ROWS and set(given[1:]) <= {_Origin.FIXED}
    return is_first and bool(operation.outputs[0].shape.rank)


def _works_inside_rows(operation: Any, given: Sequence[_Origin]) -> bool:
    """Rule of operations along the last axis."""
    return _has_only_rows_first(operation, given) and operation.inputs[0].shape.rank >= 2


def _normalizes_with_weights(operation: Any, given: Sequence[_Origin]) -> bool:
    return not operation.get_attr("is_training") and _has_only_rows_first(operation, given)


def _has_rows_behind_weights(_operation: Any, given: Sequence[_Origin]) -> bool:
    """Rule of transposed convolutions: size of the output, weights, batch."""
    return given[1] is _Origin.FIXED and given[2] is _Origin.ROWS


def _multiplies_rows(operation: Any, given: Sequence[_Origin]) -> bool:
    """Rule of the product of two matrices."""
    return tuple(given) == (_Origin.ROWS, _Origin.FIXED) and not operation.get_attr("transpose_a")


def _multiplies_inside_rows(operation: Any, given: Sequence[_Origin]) -> bool:
    """Rule of products of matrices along the last two axes."""
    ranks = [tensor.shape.rank for tensor in operation.inputs]
    if None in ranks:
        return False
    if max(ranks) == 2:
        return tuple(given) == (_Origin.ROWS, _Origin.FIXED) and not operation.get_attr("adj_x")
    return _broadcasts_rows(operation, given)


def _contracts_inside_rows(operation: Any, given: Sequence[_Origin]) -> bool:
    """Rule of `Einsum`: the first label of the batch is the first one of the result, once in each."""
    terms, _, result = operation.get_attr("equation").decode().partition("->")
    if "." in terms or not result:
        return False
    batch = result[0]
    return all(
        term[:1] == batch and batch not in term[1:] if origin is _Origin.ROWS
        else origin is _Origin.FIXED and batch not in term
        for term, origin in zip(terms.split(","), given, strict=True)
    )  # fmt: skip


def _leaves_first_axis(axes: Sequence[int | None] | None, rank: int | None) -> bool:
    return axes is not None and rank is not None and all(axis is not None and axis % rank for axis in axes)


def _make_axis_rule(position: int, data: int = 0, added_rank: int = 0) -> _Rule:
    """Return the rule of operations that work along the constant axes in input `position`.

    Args:
        position: Input with the axes.
        data: Input with the batch.
        added_rank: Number of axes that the operation adds.
    """

    def works_along_other_axes(operation: Any, given: Sequence[_Origin]) -> bool:
        rank = operation.inputs[data].shape.rank
        others = {origin for index, origin in enumerate(given) if index != data}
        if given[data] is not _Origin.ROWS or rank is None or not others <= {_Origin.FIXED}:
            return False
        return _leaves_first_axis(_get_constant(operation.inputs[position]), rank + added_rank)

    return works_along_other_axes


def _joins_along_other_axis(operation: Any, given: Sequence[_Origin]) -> bool:
    is_rows = set(given[:-1]) == {_Origin.ROWS}
    return is_rows and _leaves_first_axis(
        _get_constant(operation.inputs[-1]), operation.outputs[0].shape.rank
    )


def _make_attribute_rule(name: str, added_rank: int = 0) -> _Rule:
    """Return the rule of operations that work along the axes in the attribute `name`."""

    def works_along_other_axes(operation: Any, given: Sequence[_Origin]) -> bool:
        value, rank = operation.get_attr(name), operation.inputs[0].shape.rank
        axes = list(value) if isinstance(value, list | tuple) else [int(value)]
        is_rows = set(given) == {_Origin.ROWS} and rank is not None
        return is_rows and bool(axes) and _leaves_first_axis(axes, rank + added_rank)

    return works_along_other_axes


def _keeps_rows_together(operation: Any, given: Sequence[_Origin]) -> bool:
    """Rule of `Reshape`: every row of the result has as many values as a row before."""
    before, after = _get_shape(operation.inputs[0]), _get_shape(operation.outputs[0])
    if given[0] is not _Origin.ROWS or not before or not after:
        return False
    sizes_before, sizes_after = before[1:], after[1:]
    is_known = None not in sizes_before and None not in sizes_after and after[0] is None
    return is_known and math.prod(sizes_before) == math.prod(sizes_after)  # type: ignore[arg-type]


def _make_first_value_rule(position: int, expected: Sequence[int]) -> _Rule:
    """Return the rule of operations that leave the first axis if input `position` begins with `expected`."""

    def leaves_rows(operation: Any, given: Sequence[_Origin]) -> bool:
        values = _get_constant(operation.inputs[position])
        is_first = given[0] is _Origin.ROWS and set(given[1:]) <= {_Origin.FIXED}
        return is_first and values is not None and values[: len(expected)] == list(expected)

    return leaves_rows


def _slices_inside_rows(operation: Any, given: Sequence[_Origin]) -> bool:
    """Rule of `StridedSlice`: the first axis is taken whole."""
    if given[0] is not _Origin.ROWS or set(given[1:]) != {_Origin.FIXED}:
        return False
    masks = [operation.get_attr(name) & 1 for name in ("begin_mask", "end_mask", "ellipsis_mask")]
    dropped = [operation.get_attr(name) & 1 for name in ("new_axis_mask", "shrink_axis_mask")]
    if any(dropped):
        return False
    if masks[2]:
        return _get_shape(operation.outputs[0])[:1] == (None,)
    strides = _get_constant(operation.inputs[3])
    return bool(masks[0] and masks[1]) and strides is not None and strides[0] == 1


def _looks_up_rows(operation: Any, given: Sequence[_Origin]) -> bool:
    """Rule of lookups in a table: `Gather` and `ResourceGather`."""
    if operation.get_attr("batch_dims"):
        return False
    axis = _get_constant(operation.inputs[2]) if len(operation.inputs) > 2 else [0]
    if tuple(given[:2]) == (_Origin.FIXED, _Origin.ROWS):
        return axis == [0]
    is_selection = tuple(given[:2]) == (_Origin.ROWS, _Origin.FIXED)
    return is_selection and _leaves_first_axis(axis, operation.inputs[0].shape.rank)


_ELEMENTWISE = (
    "Abs Acos Acosh Add AddN AddV2 Asin Asinh Atan Atan2 Atanh BitwiseAnd BitwiseOr BitwiseXor Cast Ceil "
    "ClipByValue Cos Cosh Div DivNoNan Elu Equal Erf Erfc Exp Expm1 Floor FloorDiv FloorMod Greater "
    "GreaterEqual Identity IsFinite IsInf IsNan LeakyRelu Less LessEqual Lgamma Log Log1p LogicalAnd "
    "LogicalNot LogicalOr Maximum Minimum Mul MulNoNan Neg NotEqual OnesLike Pow PreventGradient RealDiv "
    "Reciprocal Relu Relu6 Rint Round Rsqrt SelectV2 Selu Sigmoid Sign Sin Sinh Softplus Softsign Sqrt "
    "Square SquaredDifference StopGradient Sub Tan Tanh TruncateDiv TruncateMod Xdivy Xlogy ZerosLike"
)
_LOCAL = (
    "AvgPool AvgPool3D BiasAdd Conv2D Conv3D DepthToSpace DepthwiseConv2dNative LRN MaxPool MaxPool3D "
    "ResizeArea ResizeBicubic ResizeBilinear ResizeNearestNeighbor SpaceToDepth"
)
_REDUCTIONS = "All Any ArgMax ArgMin Cumprod Cumsum EuclideanNorm Max Mean Min Prod ReverseV2 Sum"


def _assign_rule(names: str, rule: _Rule) -> dict[str, _Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, _Rule] = {
    **_assign_rule(_ELEMENTWISE, _broadcasts_rows),
    **_assign_rule(_LOCAL, _has_only_rows_first),
    **_assign_rule(_REDUCTIONS, _make_axis_rule(1)),
    **_assign_rule("Softmax LogSoftmax TopKV2", _works_inside_rows),
    **_assign_rule("Conv2DBackpropInput Conv3DBackpropInputV2", _has_rows_behind_weights),
    **_assign_rule("BatchMatMul BatchMatMulV2 BatchMatMulV3", _multiplies_inside_rows),
    **_assign_rule("Pad PadV2 MirrorPad", _make_first_value_rule(1, (0, 0))),
    **_assign_rule("GatherV2 ResourceGather", _looks_up_rows),
    "ConcatV2": _joins_along_other_axis,
    "Einsum": _contracts_inside_rows,
    "ExpandDims": _make_axis_rule(1, added_rank=1),
    "FusedBatchNormV3": _normalizes_with_weights,
    "MatMul": _multiplies_rows,
    "Pack": _make_attribute_rule("axis", added_rank=1),
    "Reshape": _keeps_rows_together,
    "Split": _make_axis_rule(0, data=1),
    "SplitV": _make_axis_rule(2),
    "Squeeze": _make_attribute_rule("squeeze_dims"),
    "StridedSlice": _slices_inside_rows,
    "Tile": _make_first_value_rule(1, (1,)),
    "Transpose": _make_first_value_rule(1, (0,)),
    "Unpack": _make_attribute_rule("axis"),
}
"""The rule of each operation that can keep the rows of a batch apart."""
