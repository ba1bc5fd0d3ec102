"""Whether others use the machine while something is measured. Linux tells; elsewhere it stays unknown."""

import os
import time
from pathlib import Path

# Of one core, used by other processes or taken by the hypervisor: more spoils a measurement.
MAX_OTHERS = 0.05


class Load:
    """CPU time that others take from its making on, as a share of one core.

    others: every process but this one and those of process_ids, which live until taken().
    """

    def __init__(self, process_ids=()):
        self.process_ids = process_ids
        self.start = self._now()

    def taken(self):
        """{"others": other processes, "stolen": the hypervisor, "seconds": so far, "load_average"}.

        None where there is no /proc/stat.
        """
        if self.start is None:
            return None
        seconds, busy, stolen, ours = (now - then for now, then in zip(self._now(), self.start, strict=True))
        return {
            "others": round(max(0.0, busy - ours) / seconds, 4),
            "stolen": round(stolen / seconds, 4),
            "seconds": round(seconds, 2),
            "load_average": os.getloadavg()[0],
        }

    def _now(self):
        try:
            first = Path("/proc/stat").read_text().splitlines()[0]
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, stolen = map(int, first.split()[1:9])
        ours = 0
        for process_id in ("self", *self.process_ids):
            # Fields 14 and 15 of man 5 proc; the name, which ends in a bracket, is field 2.
            fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
            ours += int(fields[11]) + int(fields[12])
        hertz = os.sysconf("SC_CLK_TCK")
        busy = user + nice + system + irq + softirq
        return time.monotonic(), busy / hertz, stolen / hertz, ours / hertz


def idle(seconds):
    """What others take while we sleep, as Load.taken()."""
    load = Load()
    time.sleep(seconds)
    return load.taken()


def too_busy(taken):
    """A line that says how busy others were, or None where that is little or unknown."""
    if taken is None or max(taken["others"], taken["stolen"]) <= MAX_OTHERS:
        return None
    return (
        f"others took {taken['others']:.0%} of a core and the hypervisor {taken['stolen']:.0%}"
        f" (at most {MAX_OTHERS:.0%}), load average {taken['load_average']:.2f}"
    )
