"""Columns in one Arrow file, filled in any order and read back without copying.

The file is uncompressed Arrow IPC with one record batch, so that every column is one stretch of bytes: any Arrow reader opens it,
and here a column is a numpy array over the mapped file. Booleans are stored as bytes (uint8).
"""

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, Shaped

from offrl_models import storage
from offrl_models.schema import InputError

HOLE = 1 << 16  # buffers from this size on are left as holes of the file until they are filled


def _arrow_type(dtype: np.dtype, width: int | None) -> pa.DataType:
    plain = pa.uint8() if dtype == np.bool_ else pa.from_numpy_dtype(dtype)
    return plain if width is None else pa.list_(plain, width)


class _Sparse:
    """A file that skips over large buffers, which are all zero, instead of writing them."""

    def __init__(self, path: Path):
        self.file = path.open("wb")
        self.closed = False

    def write(self, data: bytes | pa.Buffer) -> int:
        if len(data) >= HOLE:
            self.file.seek(len(data), os.SEEK_CUR)
        else:
            self.file.write(data)
        return len(data)

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()
        self.closed = True


def _zeros(dtype: pa.DataType, rows: int) -> pa.Array:
    if pa.types.is_fixed_size_list(dtype):
        return pa.FixedSizeListArray.from_arrays(_zeros(dtype.value_type, rows * dtype.list_size), dtype.list_size)
    size = rows * dtype.bit_width // 8
    return pa.Array.from_buffers(dtype, rows, [None, pa.py_buffer(np.zeros(size, np.uint8))])


def _columns(data: np.ndarray) -> dict[str, np.ndarray]:
    """Every column as an array over `data`, the bytes of an Arrow file."""
    whole = pa.py_buffer(data)
    batch = pa.ipc.open_file(pa.BufferReader(whole)).get_batch(0)
    found = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        shape: tuple[int, ...] = (len(column),)
        if pa.types.is_fixed_size_list(field.type):
            shape, column = (len(column), field.type.list_size), column.flatten()
        dtype = np.dtype(np.bool_) if column.type == pa.uint8() else np.dtype(column.type.to_pandas_dtype())
        buffer = column.buffers()[1]
        start = (buffer.address - whole.address if buffer else 0) + column.offset * dtype.itemsize
        found[field.name] = data[start : start + len(column) * dtype.itemsize].view(dtype).reshape(shape)
    return found


class Columns:
    """An Arrow file of so many rows, all zero at first, to be filled; it takes its name when it is complete."""

    def __init__(self, path: Path, columns: Mapping[str, tuple[Any, int | None]], rows: int):
        """`columns` maps a name to its numpy type and, for a matrix, its number of columns."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rows, self.partial = path, rows, path.with_name(f".{path.name}.part")
        types = {name: _arrow_type(np.dtype(dtype), width) for name, (dtype, width) in columns.items()}
        sink = _Sparse(self.partial)
        batch = pa.record_batch([_zeros(dtype, rows) for dtype in types.values()], names=list(types))
        with pa.PythonFile(sink, mode="w") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        self.descriptor = os.open(self.partial, os.O_RDWR)
        self.map = mmap.mmap(self.descriptor, 0)
        self.data = np.frombuffer(self.map, np.uint8)
        self.views = _columns(self.data)

    def write(self, name: str, at: Int64[np.ndarray, "n"], values: Shaped[np.ndarray, "n ..."]) -> None:
        """Put `values` into the rows `at`. Rows that follow one another go to the file without being mapped."""
        if len(at) == 0:
            return
        view = self.views[name]
        if int(at[-1]) - int(at[0]) == len(at) - 1 and bool((np.diff(at) == 1).all()):
            width = view.itemsize * int(np.prod(view.shape[1:], dtype=np.int64))
            start = view.ctypes.data - self.data.ctypes.data + int(at[0]) * width
            content = np.ascontiguousarray(values, view.dtype).data.cast("B")
            while content:
                done = os.pwrite(self.descriptor, content, start)
                content, start = content[done:], start + done
        else:
            view[at] = values
            self.map.madvise(mmap.MADV_DONTNEED)  # what was written stays in the file; the memory is given back

    def blocks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """What a column holds by now, so many rows at a time, read from the file without mapping it."""
        view = self.views[name]
        start = view.ctypes.data - self.data.ctypes.data
        width = view.itemsize * int(np.prod(view.shape[1:], dtype=np.int64))
        for first in range(0, self.rows, rows):
            size = min(rows, self.rows - first) * width
            content = os.pread(self.descriptor, size, start + first * width)
            yield np.frombuffer(content, view.dtype).reshape(-1, *view.shape[1:])

    def sync(self) -> None:
        """Bring what was written to disk; the file takes its name when it is closed."""
        os.fsync(self.descriptor)

    def __enter__(self) -> "Columns":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.views, self.data = {}, np.zeros(0, np.uint8)
        self.map.close()
        if kind is None:
            self.sync()
        os.close(self.descriptor)
        if kind is None:
            self.partial.replace(self.path)
        else:
            self.partial.unlink()


def open_columns(path: Path) -> dict[str, np.ndarray]:
    """Every column of an Arrow file, over its mapped bytes. Writing into one changes memory only, never the file.

    Raises InputError when the file is missing or not whole.
    """
    try:
        if path.stat().st_size == 0:
            raise pa.ArrowInvalid("the file is empty")
        return _columns(np.memmap(path, np.uint8, mode="c").view(np.ndarray))
    except (pa.ArrowException, OSError, ValueError, IndexError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = str(error).splitlines()[0].rstrip(".")
    return InputError(f"{path} cannot be read as Arrow ({reason}); materialize the step that wrote it again.")


def write_table(path: Path, table: pa.Table) -> None:
    """A small table as an uncompressed Arrow file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    storage.write_bytes(path, sink.getvalue().to_pybytes())


def read_table(path: Path) -> pa.Table:
    """A table, mapped. Raises InputError when the file is missing or not whole."""
    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
