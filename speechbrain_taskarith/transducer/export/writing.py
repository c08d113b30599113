"""Modules to ONNX files, in float32, float16 or int8."""

import contextlib
import logging
import warnings

import torch

from speechbrain_taskarith.utils.optional import require

# Devices have older runtimes; this is onnxruntime's of 2023.
OPSET = 18
# What has most of the weights; the rest stays in float32.
_QUANTISED = ("MatMul", "Gemm", "LSTM", "Gather")
_ANY = 2**40


def needed(module="onnxruntime"):
    """Import one of the packages of the extra `export`."""
    return require(module, "export", "exporting a transducer")


def write_onnx(graph, path):
    """Write a module, with the names that it gives."""
    optimizer = needed("onnxscript.optimizer")
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph.eval(),
            graph.example,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=graph.shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        # An LSTM's weights are put into ONNX's order here, not in every call.
        optimizer.optimize_ir(
            program.model, input_size_limit=_ANY, output_size_limit=_ANY
        )
        # torch 2.11 gives an LSTM's states a dimension too many.
        given = {value.name: value for value in program.model.graph.inputs}
        states = {new: given[name] for name, new in graph.states.items()}
        for value in program.model.graph.outputs:
            if value.name in states:
                value.shape = states[value.name].shape
        # Where this machine keeps its code is nothing that others need.
        for part in (program.model.graph, *program.model.graph.all_nodes()):
            part.metadata_props.clear()
        program.save(str(path), external_data=False)


def halve(path):
    """Store the weights of an ONNX file in float16; what goes in stays.

    A CPU without such kernels computes in float32.
    """
    onnx = needed("onnx")
    float16 = needed("onnxruntime.transformers.float16")
    with _quiet():
        half = float16.convert_float_to_float16(
            onnx.load(str(path)), keep_io_types=True
        )
        onnx.save(half, str(path))


def quantise(path):
    """Round the weights of an ONNX file to int8, a scale for each column."""
    quantization = needed("onnxruntime.quantization")
    whole = path.with_suffix(".float32")
    path.rename(whole)
    with _quiet():
        quantization.quantize_dynamic(
            str(whole),
            str(path),
            op_types_to_quantize=list(_QUANTISED),
            nodes_to_exclude=_not_matrices(whole),
            per_channel=True,
            # 7 bits: processors without VNNI add two products in 16 bits, which
            # overflows with 8.
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
        )
    whole.unlink()


def _not_matrices(path):
    """Name what multiplies by a constant of more dimensions than a matrix.

    onnxruntime takes no scale a column there.
    """
    graph = needed("onnx").load(str(path)).graph
    tensors = {one.name for one in graph.initializer if len(one.dims) > 2}
    return [
        node.name
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
    ]


@contextlib.contextmanager
def _quiet():
    """Without what exporters say about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
