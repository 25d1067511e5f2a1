"""GGUF files as values: what a file says, and its tensors, which stay on disk until they are written again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from depthprune.errors import OptionError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Field:
    """A value of the header, with GGUF's name of its type (``UINT32``), and of its members' where it is a list."""

    value: Any
    kind: str
    members: str = ""


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor, rows first, as the bytes of its type (``F32``, ``Q8_0``, …): quantized ones as rows of bytes."""

    data: Array
    kind: str


@dataclass(frozen=True, eq=False)
class File:
    """A GGUF file: its architecture, its other fields and its tensors, in their order."""

    architecture: str
    fields: Mapping[str, Field]
    tensors: Mapping[str, Tensor]

    def own(self, name: str) -> Any:
        """The value of a field of the architecture (``block_count``), None where there is none."""
        field = self.fields.get(f"{self.architecture}.{name}")
        return None if field is None else field.value


def library() -> ModuleType:
    """The package that reads and writes GGUF. Raises ``OptionError`` where it is missing."""
    try:
        import gguf
    except ImportError:
        raise OptionError("form gguf needs the package gguf: pip install 'depthprune[gguf]'") from None
    return gguf


def read(path: Path) -> File:
    """Read a file's header; tensors are views of the file, which has to stay."""
    reader = library().GGUFReader(path)
    fields = {
        name: Field(field.contents(), field.types[0].name, field.types[-1].name if len(field.types) > 1 else "")
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    architecture = fields.pop("general.architecture").value
    fields.pop("general.alignment", None)  # the writer has its own
    tensors = {tensor.name: Tensor(tensor.data, tensor.tensor_type.name) for tensor in reader.tensors}
    return File(architecture, fields, tensors)


def write(file: File, path: Path) -> Path:
    """Write a file, one tensor after the other."""
    gguf = library()
    kinds, types = gguf.GGUFValueType, gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, file.architecture)
    for name, field in file.fields.items():
        if field.kind != "ARRAY" or len(field.value):  # there is no way to write an empty list
            members = kinds[field.members] if field.members else None
            writer.add_key_value(name, field.value, kinds[field.kind], members)
    for name, tensor in file.tensors.items():
        data = tensor.data
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, types[tensor.kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in file.tensors.values():
        writer.write_tensor_data(np.ascontiguousarray(tensor.data))
    writer.close()
    return path


def zeros(*shape: int, kind: str = "F16") -> Tensor:
    """A tensor of zeros, in 16 bits unless told otherwise."""
    if kind in ("F16", "F32"):
        return Tensor(np.zeros(shape, np.float16 if kind == "F16" else np.float32), kind)
    gguf = library()
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return Tensor(np.zeros((*shape[:-1], shape[-1] // size * width), np.uint8), kind)
