"""Sizes that the records of an `array_record` file have once they are decompressed.

Some kB can hold gigabytes of zeros, and array_record decompresses all that it is asked for.
"""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The format of Riegeli, of which array_record files are a case: chunks one after another,
# with a header of each block between their bytes.
_BLOCK, _BLOCK_HEADER = 2**16, 24
_CHUNK_HEADER = struct.Struct("<8xQ8xQQ")  # data size, type and records, decoded size
_MOST_BYTES = 2**30  # of a chunk; TFDS puts one record into each


class Chunk(NamedTuple):
    """Records that are compressed together."""

    num_records: int
    num_bytes: int  # when decompressed


def largest_record(path: Path) -> int:
    """Return the bytes of the largest record of a file, at most; 0 if there is none.

    The mean over a chunk stands for each of its records. A file that is damaged is read as
    far as it goes.

    Raises:
      OSError: a chunk has more than a gigabyte, or the file cannot be read.
    """
    largest = 0
    for chunk in _chunks(path):
        if chunk.num_bytes > _MOST_BYTES:
            raise OSError(
                f"damaged or missing records in {path}: one has {chunk.num_bytes:,} bytes, "
                f"expected at most {_MOST_BYTES:,}"
            )
        if chunk.num_records:
            largest = max(largest, -(-chunk.num_bytes // chunk.num_records))
    return largest


def _chunks(path: Path) -> Iterator[Chunk]:
    """Yield the chunks of a file, in order, up to the first damaged one."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:  # which cannot be mapped
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            place = 0
            while place < len(content):
                header = _gather(content, place, _CHUNK_HEADER.size)
                if len(header) < _CHUNK_HEADER.size:
                    return
                size, kind_and_records, num_bytes = _CHUNK_HEADER.unpack(header)
                yield Chunk(kind_and_records >> 8, num_bytes)
                place = _end(place, _CHUNK_HEADER.size + size)


def _gather(content: mmap.mmap, place: int, size: int) -> bytes:
    """Return `size` bytes from a place on, without the headers of blocks."""
    found = b""
    while len(found) < size and place < len(content):
        place = _after_header(place)
        end = min(place + size - len(found), _next_block(place))
        found += content[place:end]
        place = end
    return found


def _end(place: int, size: int) -> int:
    """Return the place after `size` bytes that the headers of blocks interrupt."""
    place = _after_header(place)
    room = _next_block(place) - place
    if size <= room:
        return place + size
    blocks, rest = divmod(size - room, _BLOCK - _BLOCK_HEADER)
    place = _next_block(place) + blocks * _BLOCK
    return place + _BLOCK_HEADER + rest if rest else place


def _after_header(place: int) -> int:
    """Return the place, or the end of the header of a block if it lies in one."""
    start = place // _BLOCK * _BLOCK
    return max(place, start + _BLOCK_HEADER)


def _next_block(place: int) -> int:
    return (place // _BLOCK + 1) * _BLOCK
