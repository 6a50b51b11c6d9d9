"""Dequantize a GGUF file to F16, so that llama.cpp computes with the weights of the other peers.

Usage: python f16_gguf.py MODEL.gguf MODEL-F16.gguf   (it needs the package gguf)
"""

from __future__ import annotations

import sys

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize


def main() -> None:
    source, target = sys.argv[1:]
    reader = GGUFReader(source)
    writer = GGUFWriter(target, arch=reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue  # the writer's own
        value_type, *element_type = field.types
        writer.add_key_value(name, field.contents(), value_type, *element_type[-1:])
    writer.add_key_value("general.file_type", LlamaFileType.MOSTLY_F16, GGUFValueType.UINT32)
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        if tensor.tensor_type != GGMLQuantizationType.F32:
            weights = weights.astype(np.float16)
        writer.add_tensor(tensor.name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
