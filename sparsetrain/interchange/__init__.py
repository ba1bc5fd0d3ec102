"""Models and weights from other programs, and for them."""

from sparsetrain.interchange import peers
from sparsetrain.interchange.keras import from_keras
from sparsetrain.interchange.onnx_file import read_onnx, write_onnx
from sparsetrain.interchange.state import load_state, read_state, to_scipy, write_state, zeros_to_structure

__all__ = [
    "from_keras", "load_state", "peers", "read_onnx", "read_state", "to_scipy", "write_onnx", "write_state",
    "zeros_to_structure",
]  # fmt: skip
