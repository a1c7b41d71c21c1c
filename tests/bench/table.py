"""Measurements -> medians, ratios, a table. A ratio above 1 always says that dylm is better."""

import json
import statistics

from models import bytes_of

MIB = 1 << 20
UNITS = {"start": "seconds"}


class Row:
    """All measurements of one program on one file in one test."""

    def __init__(self, job):
        self.job, self.dylm = job, job.program == "dylm"
        self.samples, self.peaks, self.loads, self.others, self.failure = [], [], [], [], None
        # Tokens for each GB/s at which memory was read around a run.
        self.for_the_read = []

    def median(self):
        return statistics.median(self.samples) if self.samples else None

    def better_by(self, other):
        """How many times better this median is than another row's."""
        mine, theirs = self.median(), other.median()
        return theirs / mine if self.job.test == "start" else mine / theirs


class Figures:
    """What was measured."""

    def __init__(self, machine, programs, left_out):
        self.machine, self.left_out = machine, left_out
        self.versions = {program.name: program.version for program in programs}
        self.rows = {}
        # What a token reads of the weights, by file: dylm tells it.
        self.bytes_a_token = {}

    def add(self, job, ran, read=None):
        """Takes a run's figures in, and how fast memory was read around it; says them in a few words."""
        row = self.rows.setdefault((job.line(), job.path), Row(job))
        row.loads.append(ran.load)
        row.others.append(ran.others)
        row.peaks.append(ran.peak)
        if ran.code != 0:
            ended = "ran past the limit" if ran.code is None else f"ended with {ran.code}"
            words = [line for line in ran.err.splitlines() if line.strip()][-1:]
            row.failure = ": ".join([ended, *words])
            return row.failure
        try:
            figures = job.read(ran)
        except (ValueError, KeyError, IndexError, TypeError) as e:
            row.failure = f"said something else than figures ({type(e).__name__}: {e})"
            return row.failure
        if not figures or min(figures) <= 0:
            row.failure = f"said {figures}"
            return row.failure
        row.samples += figures
        if read:
            row.for_the_read.append(statistics.median(figures) / read)
        if "build_commit" in ran.out:
            # llama-bench tells its version beside its figures alone.
            self.versions[job.program] = json.loads(ran.out)[0]["build_commit"]
        if row.dylm and job.test == "decode":
            self.learn_bytes(job, ran)
        return f"{statistics.median(figures):.4g} {UNITS.get(job.test, 'tokens/s')}"

    def learn_bytes(self, job, ran):
        told = json.loads(ran.out).get("weight_bytes_a_token")
        if told:
            self.bytes_a_token[job.path] = told

    def failed(self, program):
        return any(row.failure for row in self.rows.values() if row.job.program == program)

    def groups(self):
        """(model, test) -> rows, in the order of the first run."""
        found = {}
        for row in self.rows.values():
            found.setdefault((row.job.model, row.job.test), []).append(row)
        return found

    def best_peer(self, row, any_bits):
        """The best row of another program for the same model and size, with as many bits or any."""
        peers = [
            peer
            for peer in self.rows.values()
            if not peer.dylm and peer.samples and peer.job.model == row.job.model and peer.job.title() == row.job.title()
            and (any_bits or peer.job.bits == row.job.bits)
        ]
        best = None
        for peer in peers:
            best = peer if best is None or peer.better_by(best) > 1 else best
        return best

    def ratio(self, row, any_bits=False):
        """(times better than the best peer, that peer) of a row of dylm's; None for others."""
        peer = self.best_peer(row, any_bits) if row.dylm and row.samples else None
        return (row.better_by(peer), peer) if peer else None

    def growth(self, row):
        """The median as a part of the same program's at the smallest size; None where there is only one."""
        kin = [
            other for other in self.rows.values()
            if (other.job.model, other.job.test, other.job.program, other.job.path)
            == (row.job.model, row.job.test, row.job.program, row.job.path) and other.samples
        ]
        first = min(kin, key=lambda other: other.job.size, default=None)
        return row.median() / first.median() if first and row.samples and len(kin) > 1 else None

    def weights_read(self, row):
        """GB/s of weights that went by, for one sequence."""
        size = self.bytes_a_token.get(row.job.path)
        alone = row.job.test == "decode" or (row.job.test == "batch" and row.job.size == 1) or row.job.test == "depth"
        return size * row.median() / 1e9 if size and alone and row.samples else None

    def share_of_read(self, row):
        """Of how fast memory was read around each run, the part at which weights went by; of all reads where it was not measured then."""
        size, speed, bandwidth = self.bytes_a_token.get(row.job.path), self.weights_read(row), self.machine.bandwidth()
        if speed and row.for_the_read:
            return size / 1e9 * statistics.median(row.for_the_read)
        return speed / bandwidth if speed and bandwidth else None

    def as_json(self):
        rows = []
        for row in self.rows.values():
            job = row.job
            told = {
                "model": job.model, "bits": job.bits, "test": job.test, "size": job.size, "program": job.program, "file": job.label,
                "unit": UNITS.get(job.test, "tokens/s"), "median": row.median(), "samples": row.samples,
                "peak_bytes": max(row.peaks), "load": statistics.median(row.loads), "others": max(row.others),
                "weights_gb_per_s": self.weights_read(row), "share_of_read": self.share_of_read(row), "of_smallest": self.growth(row),
                "failure": row.failure,
                "file_bytes": bytes_of(job.path), "command": job.command,
            }
            for key, any_bits in (("times_best_peer", False), ("times_best_peer_of_any_bits", True)):
                ratio = self.ratio(row, any_bits)
                told[key] = ratio and ratio[0]
                told[key + "_which"] = ratio and f"{ratio[1].job.program} {ratio[1].job.label}"
            rows.append(told)
        return {"machine": self.machine.facts(), "programs": self.versions, "left_out": self.left_out, "rows": rows}


def report(figures):
    """The tables, in Markdown."""
    facts = figures.machine.facts()
    out = [
        f"{facts['cpu']}, {facts['cpus']} CPUs ({facts['threads']} threads), {facts['memory_bytes'] / (1 << 30):.0f} GiB, "
        f"{facts['system']}; {facts['started']}, load {facts['load_at_start']:.1f}",
        "; ".join(version if version.startswith(name) else f"{name} {version}" for name, version in figures.versions.items()),
    ]
    bandwidth = facts["bandwidth_gb_per_s"]
    if bandwidth:
        reads = facts["bandwidths_gb_per_s"]
        out.append(
            f"{facts['threads']} threads read {bandwidth:.1f} GB/s of memory ({min(reads):.1f}-{max(reads):.1f} in {len(reads)} measurements); "
            "decode: %, of the reads just before and after"
        )
    out += [f"left out: {line}" for line in figures.left_out]
    out += [
        "",
        f"Medians over all repetitions ({facts['reps']}, interleaved) and trials (mostly {facts['trials']} each), and the lowest and highest. "
        "x: how many times better dylm is than the best peer with as many bits a weight, and with any. load: the average over the minute "
        "before; others: CPUs that other work took meanwhile, at most.",
    ]
    out += summary(figures)
    for (model, test), rows in figures.groups().items():
        out += ["", f"## {model}: {test}, {UNITS.get(test, 'tokens/s')}", ""]
        out += table(figures, test, rows)
    return "\n".join(out)


def table(figures, test, rows):
    grows = test in ("depth", "batch")
    head = [test] if test != "start" else []
    head += ["bits", "program", "file", "median", "lowest-highest", "x", "x any bits"]
    head += [f"of {min(row.job.size for row in rows)}"] if grows else []
    head += ["weights GB/s"] if test != "start" else []
    head += ["peak MiB", "beyond its files"] if test == "start" else ["peak MiB"]
    head += ["load", "others"]
    body = []
    for row in rows:
        job = row.job
        cells = [str(job.size)] if test != "start" else []
        cells += [str(job.bits), job.program, job.label]
        if row.samples:
            cells += [shown(row.median()), f"{shown(min(row.samples))}-{shown(max(row.samples))}"]
        else:
            cells += ["-", row.failure or "-"]
        for any_bits in (False, True):
            ratio = figures.ratio(row, any_bits)
            cells.append(f"{ratio[0]:.2f} {ratio[1].job.program} {ratio[1].job.label}" if ratio else "")
        if grows:
            growth = figures.growth(row)
            cells.append(f"{growth:.2f}" if growth else "")
        if test != "start":
            speed, share = figures.weights_read(row), figures.share_of_read(row)
            part = f" ({100 * share:.0f} %)" if share else ""
            cells.append(f"{speed:.1f}{part}" if speed else "")
        peak = max(row.peaks)
        cells.append(f"{peak / MIB:.0f}")
        cells += [f"{(peak - bytes_of(job.path)) / MIB:.0f}"] if test == "start" else []
        cells += [f"{statistics.median(row.loads):.1f}", f"{max(row.others):.1f}"]
        body.append(cells)
        if row.failure and row.samples:
            body[-1][head.index("lowest-highest")] += f"; once {row.failure}"
    return lined_up(head, body)


def summary(figures):
    """dylm's best file against the best peer, for every model, test and number of bits; nothing where there are no peers."""
    best = {}
    for row in figures.rows.values():
        key = (row.job.model, row.job.title(), row.job.bits)
        if figures.ratio(row) and (key not in best or row.better_by(best[key]) > 1):
            best[key] = row
    body = []
    for (model, title, bits), row in best.items():
        times, peer = figures.ratio(row)
        ours, theirs = f"{row.job.label} {shown(row.median())}", f"{peer.job.program} {peer.job.label} {shown(peer.median())}"
        body.append([model, title, str(bits), ours, theirs, f"{times:.2f}"])
    head = ["model", "test", "bits", "dylm's best", "best peer", "x"]
    return ["", "## dylm's best beside the best peer", "", *lined_up(head, body)] if body else []


def lined_up(head, body):
    """A table in Markdown that can be read as it is."""
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in [head, *body]]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    return [f"| {line} |".replace("| -", "|--").replace("- |", "--|") if i == 1 else f"| {line} |" for i, line in enumerate(lines)]


def shown(number):
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"
