"""From a torch module to what a device runs fastest: one fp32 ONNX graph, and fp16, INT8 and TensorRT engines of it.

``torch_module.bundle_module`` makes a signed bundle of a network that was trained anywhere. It stands on
``onnx_export.export_onnx``, ``parity.parity``, ``candidates.derived`` and ``tensorrt.build``; each can be called alone.
"""
