"""WHAT is run: ONNX files and ONNX-to-ONNX transforms. Knows no runtime."""
