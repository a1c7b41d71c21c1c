"""Runs commands one at a time, and knows what the machine was busy with meanwhile."""

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple

# code: of the process, or None if it ran past the limit; peak: bytes; others: CPUs that were busy with something else; load: the average
# over a minute, before.
Ran = namedtuple("Ran", "code out err seconds peak others load")


def run(command, env, limit, under=()):
    """Runs a command to its end, with nothing to read and its output kept; `under` a wrapper, whose own time is not the command's."""
    load, busy = os.getloadavg()[0], busy_seconds()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.NamedTemporaryFile() as told:
        whole = [*under, sys.executable, os.path.abspath(__file__), told.name, *command] if under else command
        started = time.monotonic()
        try:
            child = subprocess.Popen(whole, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, **env})
        except OSError as e:
            return Ran(127, "", str(e), 0.0, 0, 0.0, load)
        late = threading.Event()
        # A wrapper is to end what it runs.
        watches = [threading.Timer(limit, lambda: (late.set(), child.terminate())), threading.Timer(limit + 10, child.kill)]
        for watch in watches:
            watch.start()
        try:
            code, seconds, peak, own = ended(child, started)
        except BaseException:
            child.terminate()
            raise
        finally:
            for watch in watches:
                watch.cancel()
        others = 0.0
        if busy is not None and seconds > 0:
            others = max(0.0, (busy_seconds() - busy - own) / seconds)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
        if under:
            try:
                code, seconds, peak, _ = json.load(told)
            except ValueError:
                # The wrapper never came to run it.
                code = code or 1
    return Ran(None if late.is_set() else code, *texts, seconds, peak, others, load)


def ended(child, started):
    """(code, seconds, peak bytes, CPU seconds) of a process, once it has ended."""
    # wait4 tells the peak of this very process; the seconds end where it does.
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - started
    child.returncode = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    # macOS counts bytes, where other systems count KiB.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return child.returncode, seconds, peak, usage.ru_utime + usage.ru_stime


def busy_seconds():
    """CPU seconds since the start of the system that were not idle, those taken by other virtual machines too; None if it does not tell."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(part) for part in file.readline().split()[1:9]]
    except OSError:
        return None
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


class Machine:
    """What it is, and how fast its memory was read by dylm's own measure, once a repetition and around what waits for it."""

    def __init__(self, chosen, dylm):
        self.chosen, self.dylm = chosen, dylm
        self.bandwidths = []
        self.load = os.getloadavg()[0]
        self.started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())

    def measure(self):
        """GB/s; None if it could not be measured."""
        threads = {"RAYON_NUM_THREADS": str(self.chosen.threads)}
        ran = run([self.dylm, "bench", "--bandwidth", "--json"], threads, 120, self.chosen.under)
        try:
            self.bandwidths.append(json.loads(ran.out)["bandwidth"]["gb_per_s"])
            return self.bandwidths[-1]
        except (ValueError, KeyError, TypeError):
            print(f"no memory bandwidth: {ran.err.strip()[-200:]}", file=sys.stderr)
            return None

    def around(self, work):
        """(what `work` gives back, how fast memory was read just before and after it, on average)."""
        before, given, after = self.measure(), work(), self.measure()
        return given, (before + after) / 2 if before and after else None

    def bandwidth(self):
        """The median; None if it could not be measured."""
        return statistics.median(self.bandwidths) if self.bandwidths else None

    def name(self):
        try:
            with open("/proc/cpuinfo") as file:
                names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        except OSError:
            names = []
        return names[0] if names else platform.processor() or platform.machine()

    def facts(self):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {
            "started": self.started, "cpu": self.name(), "cpus": os.cpu_count(), "threads": self.chosen.threads,
            "memory_bytes": memory, "system": f"{platform.system()} {platform.release()}", "load_at_start": self.load,
            "reps": self.chosen.reps, "trials": self.chosen.trials,
            "bandwidth_gb_per_s": self.bandwidth(), "bandwidths_gb_per_s": self.bandwidths,
        }


def main():
    """machine.py FILE COMMAND..: runs the command and writes how it went into the file; the inner end of a wrapper."""
    started = time.monotonic()
    child = subprocess.Popen(sys.argv[2:])
    signal.signal(signal.SIGTERM, lambda *_: child.kill())
    told = ended(child, started)
    with open(sys.argv[1], "w") as file:
        json.dump(told, file)
    return told[0] if told[0] >= 0 else 1


if __name__ == "__main__":
    sys.exit(main())
