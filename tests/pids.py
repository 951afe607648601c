"""Whether processes still run, as /proc tells."""

import time
from pathlib import Path

import pytest


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to look for processes in")


def alive(pid: int) -> bool:
    """Whether a process runs or sleeps."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pid: int) -> bool:
    """Whether a process ends within 15 seconds."""
    for _ in range(300):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False
