"""From one fp32 ONNX graph to what a target runs fastest: fp16, INT8, TensorRT engines."""
