"""Running the codec fast, and outside PyTorch."""

from dac_fast.inference.export import export, export_onnx

__all__ = ["export", "export_onnx"]
