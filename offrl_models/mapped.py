"""Columns in one Arrow file, filled in any order and read back without copying.

The file is uncompressed Arrow IPC with one record batch, so that every column is one stretch of bytes: any Arrow reader opens it,
and here a column is a numpy array over the mapped file. Booleans are stored as bytes (uint8).
"""

import itertools
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, Shaped

from offrl_models import storage
from offrl_models.schema import InputError

STRETCH = 64  # rows that follow one another, on average, from which on writing beats mapping
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
            shape, column = (len(column), field.type.list_size), column.values
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

    def write(self, at: Int64[np.ndarray, "n"], columns: Mapping[str, Shaped[np.ndarray, "n ..."]]) -> None:
        """Put the values of some columns into the rows `at`, which rise."""
        if len(at) == 0:
            return
        cuts = [0, *(np.flatnonzero(np.diff(at) != 1) + 1).tolist(), len(at)]  # rows between them follow one another
        for name, values in columns.items():
            if len(cuts) * STRETCH <= len(at) + 2 * STRETCH:
                for low, high in itertools.pairwise(cuts):
                    self.fill(name, int(at[low]), values[low:high])
                continue
            self.views[name][at] = values
            first, end = self._place(name, int(at[0])), self._place(name, int(at[-1]) + 1)
            first -= first % mmap.PAGESIZE  # what was written stays in the file; the memory is given back
            self.map.madvise(mmap.MADV_DONTNEED, first, end - first)

    def fill(self, name: str, start: int, values: Shaped[np.ndarray, "n ..."]) -> None:
        """Put `values` into the rows from `start` on; they go to the file without being mapped."""
        position = self._place(name, start)
        content = np.ascontiguousarray(values, self.views[name].dtype).data.cast("B")
        while content:
            done = os.pwrite(self.descriptor, content, position)
            content, position = content[done:], position + done

    def read(self, name: str, start: int, rows: int) -> np.ndarray:
        """What a column holds by now from the row `start` on, read from the file without mapping it."""
        view, first = self.views[name], self._place(name, start)
        content = os.pread(self.descriptor, self._place(name, min(start + rows, self.rows)) - first, first)
        return np.frombuffer(content, view.dtype).reshape(-1, *view.shape[1:])

    def _place(self, name: str, row: int) -> int:
        """Byte of the file at which a row begins."""
        view = self.views[name]
        return view.ctypes.data - self.data.ctypes.data + row * view.itemsize * math.prod(view.shape[1:])

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
