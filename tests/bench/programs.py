"""The programs that are compared: how each is asked for a measurement, and what it answers.

Every program does the same work: a prompt of random tokens whose last logits alone are computed; or tokens one after the other, from an
empty cache, from one that holds random tokens, or in several sequences at once.
"""

import json
import os
import shutil
import subprocess
import sys

from models import BEHIND, GENERATION_OF_BATCH, PROMPT_OF_BATCH, warm

HERE = os.path.dirname(os.path.abspath(__file__))
# What start is measured with: taken as it is, without a chat template.
TEXT = (
    "The history of the lighthouse begins with fires that were lit on hills, and goes on with towers of stone that kept the fire out "
    "of the rain. The first of them that is known by name stood at"
)
# A context for programs that otherwise make room for all that a model was trained on.
CONTEXT = "512"
# Processes a repetition, where a single one is over in a second.
STARTS = 3


class Job:
    """One command, and how to find its figures: `read` makes a list of numbers of what it printed."""

    def __init__(self, program, model, test, bits, size, label, path, command, read, env=None):
        self.program, self.model, self.test, self.bits, self.size = program, model.name, test, bits, size
        self.label, self.path, self.command, self.read = label, path, [str(part) for part in command], read
        self.env = env or {}
        # Times that the command is run in a repetition.
        self.runs = 1

    def title(self):
        return {"prefill": f"prefill {self.size}", "decode": f"decode {self.size}", "start": "start"}.get(
            self.test, f"{self.test} {self.size}"
        )

    def line(self):
        return f"{self.model} {self.bits}-bit {self.title()} {self.program} {self.label}"

    def prepare(self):
        if self.test == "start":
            warm(self.path)


class Program:
    """Has a name, a `command`, and jobs for each test; `missing` says why it is left out, if it is."""

    missing = None
    version = ""

    def __init__(self, chosen):
        self.chosen = chosen
        self.gpu = chosen.device != "cpu"

    def jobs(self, model, test, bits, size):
        files = self.files(model, bits)
        if test in ("depth", "batch"):
            files = files[: self.of_growth]
        for label, path in files:
            asked = getattr(self, test)(path, size)
            for variant, command, read in asked if isinstance(asked, list) else [asked]:
                job = Job(variant or self.name, model, test, bits, size, label, path, command, read, self.env())
                job.runs = self.starts if test == "start" else 1
                yield job

    starts = STARTS
    # How many files of a kind depth and batch are measured with.
    of_growth = 1

    def env(self):
        return {}

    def nothing(self, _path, _size):
        return []

    prefill = decode = start = depth = batch = nothing


class Dylm(Program):
    name = "dylm"
    of_growth = 2

    def __init__(self, chosen):
        super().__init__(chosen)
        self.command = shutil.which(chosen.dylm)
        if not self.command:
            raise SystemExit(f"there is no {chosen.dylm}: cargo build --release, or say where it is with --dylm")
        self.version = said([self.command, "--version"]).replace("dylm ", "")

    def files(self, model, bits):
        return model.folders(bits) + model.ggufs(bits)

    def env(self):
        return {"RAYON_NUM_THREADS": str(self.chosen.threads)}

    def bench(self, path, key, trials=None, **flags):
        command = [self.command, "bench", path, "--json", "-n", trials or self.chosen.trials]
        command += [part for flag, value in flags.items() for part in (f"-{flag}", value)]
        return None, command + self.device(), lambda ran: [trial[key] for trial in json.loads(ran.out)["trials"]]

    def device(self):
        return [] if self.gpu else ["--device", "cpu"]

    def prefill(self, path, tokens):
        return self.bench(path, "prompt_tps", p=tokens, g=0)

    def decode(self, path, tokens):
        return self.bench(path, "generation_tps", p=0, g=tokens)

    def depth(self, path, tokens):
        return self.bench(path, "generation_tps", p=0, g=BEHIND, d=tokens)

    def batch(self, path, count):
        # Once, as llama-batched-bench does.
        return self.bench(path, "generation_tps", trials=1, p=PROMPT_OF_BATCH, g=GENERATION_OF_BATCH, b=count)

    def start(self, path, tokens):
        command = [self.command, "generate", "--model", path, "--ignore-chat-template", "--prompt", TEXT, "-m", tokens]
        return None, command + ["--verbose", "false"] + self.device(), seconds


class LlamaCpp(Program):
    name = "llama.cpp"

    def __init__(self, chosen):
        super().__init__(chosen)
        self.command = self.find("llama-bench")
        if not self.command:
            self.missing = "no llama-bench: say where it is with --llama-bin"
            return
        self.others = {name: self.find(name) for name in ("llama-batched-bench", "llama-simple", "llama-completion")}
        self.threads = ["-t", chosen.threads] + ([] if self.gpu else ["-ngl", 0])

    def find(self, name):
        return shutil.which(name, path=self.chosen.llama_bin or None)

    def files(self, model, bits):
        return model.ggufs(bits)

    def bench(self, path, *flags):
        command = [self.command, "-m", path, "-r", self.chosen.trials, "-o", "json", *self.threads, *flags]
        return None, command, lambda ran: json.loads(ran.out)[0]["samples_ts"]

    def prefill(self, path, tokens):
        return self.bench(path, "-p", tokens, "-n", 0)

    def decode(self, path, tokens):
        return self.bench(path, "-p", 0, "-n", tokens)

    def depth(self, path, tokens):
        return self.bench(path, "-p", 0, "-n", BEHIND, "-d", tokens)

    def batch(self, path, count):
        program = self.others["llama-batched-bench"]
        context = count * (PROMPT_OF_BATCH + GENERATION_OF_BATCH)
        command = [program, "-m", path, "-npp", PROMPT_OF_BATCH, "-ntg", GENERATION_OF_BATCH, "-npl", count, "-c", context]
        command += ["--output-format", "jsonl", *self.threads]
        return [(None, command, last("speed_tg"))] if program else []

    def start(self, path, tokens):
        simple, whole = self.others["llama-simple"], self.others["llama-completion"]
        small = [simple, "-m", path, "-n", tokens] + ([] if self.gpu else ["-ngl", 0]) + [TEXT]
        large = [whole, "-m", path, "-n", tokens, "-c", CONTEXT, "-no-cnv", "--temp", 0, "-p", TEXT, *self.threads]
        both = [("llama-simple", small, seconds), (f"llama-completion -c {CONTEXT}", large, seconds)]
        return [asked for asked, program in zip(both, (simple, whole)) if program]


class InPython(Program):
    """A program that is a Python package, driven by a script beside this one."""

    starts = 1

    def __init__(self, chosen):
        super().__init__(chosen)
        self.command = shutil.which(chosen.python)
        look = "import importlib.metadata as m, sys; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ')"
        self.version = said([self.command, "-c", look, *self.packages]) if self.command else ""
        if not self.version:
            self.missing = f"{chosen.python} has no {' and '.join(self.packages)}: name another with --python"
        self.device = [] if self.gpu else ["--device", "cpu"]

    def env(self):
        threads = str(self.chosen.threads)
        return {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

    def measure(self, path, key, *flags, trials=None):
        command = [self.command, os.path.join(HERE, self.script), path, "-n", trials or self.chosen.trials]
        return None, command + ["--threads", self.chosen.threads, *self.device, *flags], last(key)


class Transformers(InPython):
    name, script, packages = "transformers", "in_transformers.py", ["transformers", "torch"]

    def files(self, model, bits):
        return model.folders(bits) if bits == 16 else []

    def prefill(self, path, tokens):
        return self.measure(path, "prompt_tps", "-p", tokens, "-g", 0)

    def decode(self, path, tokens):
        return self.measure(path, "generation_tps", "-p", 0, "-g", tokens)

    def depth(self, path, tokens):
        return self.measure(path, "generation_tps", "-p", tokens, "-g", BEHIND)

    def batch(self, path, count):
        return self.measure(path, "generation_tps", "-p", PROMPT_OF_BATCH, "-g", GENERATION_OF_BATCH, "-b", count, trials=1)

    def start(self, path, tokens):
        return None, [self.command, os.path.join(HERE, self.script), path, "--text", TEXT, *self.device], seconds


class MlxLm(InPython):
    name, script, packages = "mlx-lm", "in_mlx_lm.py", ["mlx-lm", "mlx"]

    def __init__(self, chosen):
        super().__init__(chosen)
        self.short = chosen.mlx_tokens or (None if sys.platform == "darwin" else [64, 8])

    def files(self, model, bits):
        # Packed weights take it minutes a token on CPUs that are not Apple's.
        return model.folders(bits) if bits == 16 or sys.platform == "darwin" else []

    def briefly(self, path, key, flags, tokens, short):
        if not self.short:
            return self.measure(path, key, *flags, tokens)
        _, command, read = self.measure(path, key, *flags, short, trials=1)
        return [(f"mlx-lm, {short} tokens", command, read)]

    def prefill(self, path, tokens):
        return self.briefly(path, "prompt_tps", ["-g", 0, "-p"], tokens, self.short and self.short[0])

    def decode(self, path, tokens):
        return self.briefly(path, "generation_tps", ["-p", 0, "-g"], tokens, self.short and self.short[1])

    def start(self, path, tokens):
        command = [self.command, "-m", "mlx_lm", "generate", "--model", path, "--ignore-chat-template", "-p", TEXT, "-m", tokens]
        return None, command, seconds


def seconds(ran):
    return [ran.seconds]


def last(key):
    """The numbers under `key` in the last line that is a JSON object."""

    def read(ran):
        figures = json.loads([line for line in ran.out.splitlines() if line.startswith("{")][-1])[key]
        return figures if isinstance(figures, list) else [figures]

    return read


def said(command):
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=120).stdout.decode().strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def programs(chosen):
    """Those that are there, dylm first."""
    everyone = [kind(chosen) for kind in (Dylm, LlamaCpp, Transformers, MlxLm)]
    chosen.absent = [program for program in everyone if program.missing]
    return [program for program in everyone if not program.missing]


def left_out(chosen, present, models):
    """A line for everything that could have been measured and is not there."""
    lines = [f"{program.name}: {program.missing}" for program in chosen.absent]
    for program in present:
        for name, path in getattr(program, "others", {}).items():
            lines += [] if path else [f"{name}: not beside llama-bench"]
    for model in models:
        for bits in chosen.bits:
            kinds = [("MLX folder", model.folders(bits))] if bits < 16 else []
            for kind, files in kinds + [("GGUF", model.ggufs(bits))]:
                lines += [] if files else [f"{model.name}, {bits} bits: no {kind} beside it"]
    return lines
