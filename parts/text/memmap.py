"""Arrays in one memory-mapped file, so that the ranks of a node share its pages.

A file has a line of JSON (offsets of the arrays, and other data), then the arrays. Checksums detect damaged files.
"""

import json
import zlib
from pathlib import Path

import numpy as np

from parts.files import atomic_path

READ_BYTES = 2**24  # bytes per read


class StringArray:
    """Many strings as two arrays: concatenated UTF-8, and the offset of each. A list of strings takes ten times the
    memory."""

    def __init__(self, content: np.ndarray, starts: np.ndarray):
        self.content, self.offsets = content, starts  # (B,) uint8, (n+1,) int64

    @classmethod
    def of(cls, texts: list[str]) -> "StringArray":
        encoded = [text.encode(errors="surrogateescape") for text in texts]
        starts = np.cumsum([0, *map(len, encoded)]).astype(np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), starts)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.content[self.offsets[i] : self.offsets[i + 1]].tobytes().decode(errors="surrogateescape")


def save_arrays(path: Path, arrays: dict[str, np.ndarray], rest: dict) -> None:
    """Write flat arrays and a JSON object to a file, atomically."""
    index, offset, crc = {}, 0, 0
    for name, array in arrays.items():
        content = np.ascontiguousarray(array).view(np.uint8).data
        index[name] = [array.dtype.str, len(array), offset]
        crc, offset = zlib.crc32(content, crc), offset + array.nbytes
    header = json.dumps({"arrays": index, "crc": crc, "rest": rest}).encode()
    with atomic_path(path) as new, open(new, "wb") as f:
        f.write(b"%08x %s\n" % (zlib.crc32(header), header))
        for array in arrays.values():
            f.write(np.ascontiguousarray(array).view(np.uint8).data)


def map_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict] | None:
    """The data that `save_arrays` wrote, with arrays mapped read-only; None if the file is missing or damaged."""
    try:
        with open(path, "rb") as f:
            line = f.readline()
            header_crc, header_json = line.split(b" ", 1)
            header = json.loads(header_json)
            body_crc = 0
            while block := f.read(READ_BYTES):
                body_crc = zlib.crc32(block, body_crc)
            if int(header_crc, 16) != zlib.crc32(header_json.rstrip(b"\n")) or body_crc != header["crc"]:
                return None
        arrays = {}
        for name, (dtype, n, offset) in header["arrays"].items():
            empty = np.zeros(0, dtype)  # cannot be mapped
            arrays[name] = np.memmap(path, dtype, "r", len(line) + offset, (n,)) if n else empty
        return arrays, header["rest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
