"""Running the codec fast, and outside PyTorch."""

from dac_fast.inference.export import export, export_onnx, write_aoti, write_onnx, write_pt2
from dac_fast.inference.parts import Decode, Encode

__all__ = ["Decode", "Encode", "export", "export_onnx", "write_aoti", "write_onnx", "write_pt2"]
