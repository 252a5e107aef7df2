"""Graph readings and transforms, ONNX in and ONNX out."""
