"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all, making its folder first if it does not exist.

    The data goes to a partial file in the same folder. That file's name holds the process's id, so
    that two runs do not write to the same one. Once the data is on the disk, the partial file takes
    the final name.

    Args:
        path: the file to write. An existing one is replaced.
        data: its content.

    Raises:
        OSError: it cannot be written; the file is named.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        # A full disk is reported without the file's name.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise
