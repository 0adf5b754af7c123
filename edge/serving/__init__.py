"""The inference server of a device: the Open Inference Protocol over gRPC."""
