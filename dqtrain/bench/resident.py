"""Memory of a process, as Linux counts it."""

import re
from pathlib import Path


def resident(name: str, restart: bool = False, process: int | str = "self") -> int:
    """Bytes of /proc/PROCESS/status: VmRSS, what is resident, or VmHWM, the most that ever was; 0 for a process that has ended.

    `restart` lets the high-water mark begin anew with what is resident. It is not getrusage's ru_maxrss, which begins with what the parent held.
    """
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    if restart:
        Path(f"/proc/{process}/clear_refs").write_text("5")
    return 1024 * int(found[1]) if found else 0
