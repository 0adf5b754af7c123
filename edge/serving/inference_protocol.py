"""Messages of the Open Inference Protocol (KServe v2) over gRPC, made at import from a table.

Names and numbers are those of the protocol's published grpc_service.proto and model_config.proto; only fields that
this server reads or writes are declared, and all others that a client sends are skipped. The descriptors lie in a pool
of their own, as clients of the protocol register the same names in protobuf's default pool.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE: Final = "inference.GRPCInferenceService"
HEALTH_SERVICE: Final = "grpc.health.v1.Health"

_PACKAGE: Final = "inference"
# name=number:type; ``*`` repeated, ``%`` a map from string to that message, upper case a message of this table.
_TABLE: Final = """
ServerLiveResponse live=1:bool
ServerReadyResponse ready=1:bool
ServerMetadataResponse name=1:string version=2:string extensions=3:*string
ModelRequest name=1:string version=2:string
ModelReadyResponse ready=1:bool
TensorMetadata name=1:string datatype=2:string shape=3:*int64
ModelMetadataResponse name=1:string versions=2:*string platform=3:string inputs=4:*TensorMetadata \
outputs=5:*TensorMetadata
InferParameter bool_param=1:bool int64_param=2:int64 string_param=3:string double_param=4:double uint64_param=5:uint64
InferTensorContents bool_contents=1:*bool int_contents=2:*int32 int64_contents=3:*int64 uint_contents=4:*uint32 \
uint64_contents=5:*uint64 fp32_contents=6:*float fp64_contents=7:*double bytes_contents=8:*bytes
InferInputTensor name=1:string datatype=2:string shape=3:*int64 parameters=4:%InferParameter \
contents=5:InferTensorContents
InferRequestedOutputTensor name=1:string parameters=2:%InferParameter
ModelInferRequest model_name=1:string model_version=2:string id=3:string parameters=4:%InferParameter \
inputs=5:*InferInputTensor outputs=6:*InferRequestedOutputTensor raw_input_contents=7:*bytes
InferOutputTensor name=1:string datatype=2:string shape=3:*int64
ModelInferResponse model_name=1:string model_version=2:string id=3:string outputs=5:*InferOutputTensor \
raw_output_contents=6:*bytes
ModelStreamInferResponse error_message=1:string infer_response=2:ModelInferResponse
ModelInput name=1:string data_type=2:int32 dims=4:*int64
ModelTensorReshape shape=1:*int64
ModelOutput name=1:string data_type=2:int32 dims=3:*int64 reshape=5:ModelTensorReshape
ModelParameter string_value=1:string
ModelDynamicBatching max_queue_delay_microseconds=2:uint64
ModelConfig name=1:string platform=2:string max_batch_size=4:int32 input=5:*ModelInput output=6:*ModelOutput \
dynamic_batching=11:ModelDynamicBatching parameters=14:%ModelParameter backend=17:string
ModelConfigResponse config=1:ModelConfig
StatisticDuration count=1:uint64 ns=2:uint64
InferStatistics success=1:StatisticDuration fail=2:StatisticDuration queue=3:StatisticDuration \
compute_infer=5:StatisticDuration
ModelStatistics name=1:string version=2:string last_inference=3:uint64 inference_count=4:uint64 \
execution_count=5:uint64 inference_stats=6:InferStatistics
ModelStatisticsResponse model_stats=1:*ModelStatistics
HealthCheckRequest service=1:string
HealthCheckResponse status=1:int32
"""


def _messages() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="fedge/open_inference.proto", package=_PACKAGE, syntax="proto3"
    )
    lines = [line.split() for line in _TABLE.strip().splitlines()]
    for name, *fields in lines:
        message = file.message_type.add(name=name)
        for field in fields:
            _add_field(message, field)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name, *_ in lines
    }


def _add_field(message: Any, text: str) -> None:
    label, type_of = descriptor_pb2.FieldDescriptorProto, descriptor_pb2.FieldDescriptorProto.Type
    name, _, rest = text.partition("=")
    number, _, kind = rest.partition(":")
    field = message.field.add(name=name, number=int(number), label=label.LABEL_OPTIONAL)
    if kind[0] in "*%":
        field.label = label.LABEL_REPEATED
    kind = kind.lstrip("*")
    if kind.startswith("%"):
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _add_field(entry, "key=1:string")
        _add_field(entry, f"value=2:{kind[1:]}")
        kind = f"{message.name}.{entry.name}"
    if kind[0].isupper():
        field.type = type_of.Value("TYPE_MESSAGE")
        field.type_name = f".{_PACKAGE}.{kind}"
    else:
        field.type = type_of.Value(f"TYPE_{kind.upper()}")


_MESSAGES: Final = _messages()


def message(name: str) -> Any:
    """The class of a message, by its name in the table."""
    return _MESSAGES[name]


def varint(value: int) -> bytes:
    """Encode a non-negative integer as a varint of Protocol Buffers."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
