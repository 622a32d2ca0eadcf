"""onnxruntime's names of the kernels that compute a layer, by what they compute in.

Owns the names alone: `effective.py` looks for them in a graph, `profiled_precisions.py` in what
a device executed. Nothing is imported here, so that a service need not load onnx for a name.
"""

INTEGER_KERNELS = frozenset(
    {
        "QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger",
        "ConvInteger",
    }
)  # fmt: skip
BLOCK_KERNELS = frozenset({"MatMulNBits"})
"""They take packed weights with a scale per block."""
FLOAT_CONVOLUTIONS = frozenset({"Conv", "FusedConv", "NhwcFusedConv"})
FLOAT_PRODUCTS = frozenset({"Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
FLOAT_KERNELS = FLOAT_CONVOLUTIONS | FLOAT_PRODUCTS
