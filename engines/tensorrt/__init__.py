"""TensorRT engines for NVIDIA GPUs: ONNX networks, plans built from them, kernels for what lies between."""
