"""What a run left, for tests that compare two of them byte for byte."""

from fastunlearn.files.run_folder import RECORD


def files_of(folder, without=(RECORD,)):
    """Bytes of every file below a folder, by its path from there; files of the names ``without`` are left out."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in without)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
