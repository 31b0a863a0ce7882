"""A C program for Windows, made by Clang and run by Wine: where both and MinGW's libraries are."""

import shutil
import subprocess
from pathlib import Path

MISSING = [
    name for name in ("clang", "x86_64-w64-mingw32-gcc", "wine") if shutil.which(name) is None
]


def flags_of_clang():
    """What makes Clang compile for Windows and link with MinGW's libraries."""
    command = ["x86_64-w64-mingw32-gcc", "-print-libgcc-file-name"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return ["--target=x86_64-w64-mingw32", f"-L{Path(done.stdout).parent}"]


def runner(folder):
    """The words before a program's name; what Wine writes, it writes to this folder."""
    return ["env", f"WINEPREFIX={folder / 'wine'}", "WINEDEBUG=-all", "wine"]
