"""Networks as files that other programs run: NIR, ONNX and PyTorch's .pt2; and NIR files of others on our kernels."""

from .nir_check import NIRReport
from .nir_read import NIRNetwork, read_nir
from .nir_write import graph_input, nir_graph, write_nir
from .onnx import write_onnx
from .program import compile_package, export_program, write_program
from .report import ExportReport

__all__ = [
    "ExportReport",
    "NIRNetwork",
    "NIRReport",
    "compile_package",
    "export_program",
    "graph_input",
    "nir_graph",
    "read_nir",
    "write_nir",
    "write_onnx",
    "write_program",
]
