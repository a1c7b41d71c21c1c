#!/usr/bin/env python3
"""Runs dylm, llama.cpp, transformers and mlx-lm on the same models, on the same machine, in one go, and prints who is how fast.

Each MODEL is a folder with a Hugging Face checkpoint in bf16. Its other forms are looked for beside it, in it, or in a folder `gguf`
beside it: NAME-mlx-8bit, NAME-mlx-4bit (or NAME-8bit, NAME-4bit) as mlx_lm.convert writes them; NAME-BF16.gguf, NAME-Q8_0.gguf,
NAME-Q4_0.gguf, NAME-Q4_K_M.gguf (or NAME.Q4_0.gguf ..) as llama.cpp does. Programs and forms that are not there are left out, and
named. Everything is repeated, one program after the other, every second time in the opposite order, so that what else the machine does
meanwhile befalls all of them alike; how much that was stands beside the figures.

  prefill, decode   tokens/s of a prompt alone, and of generation from an empty cache
  start             seconds from the start of a process to its end after one token, the files being in the page cache; peak memory
  depth             decode behind so many tokens of random text
  batch             decode of several sequences at once, behind a prompt of 128 tokens each

  tests/bench/side_by_side.py ~/models/SmolLM2-135M-Instruct --llama-bin ~/llama.cpp/build/bin
  tests/bench/side_by_side.py ~/models/* --tests prefill,decode --bits 4 --reps 5 --json >figures.json
"""

import argparse
import json
import os
import re
import shlex
import signal
import sys

from machine import Machine, run
from models import Model
from programs import left_out, programs
from table import Figures, report

TESTS = ["prefill", "decode", "start", "depth", "batch"]


def numbers(text):
    return [int(part) for part in text.split(",") if part]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folder of a checkpoint in bf16")
    add("--tests", default=",".join(TESTS), help="of %(default)s, these")
    add("--bits", type=numbers, default=[16, 8, 4], help="bits a weight: 16,8,4 are all")
    add("--growth-bits", type=numbers, default=[4], help="the same for depth and batch [4]")
    add("--reps", type=int, default=3, help="repetitions of everything [%(default)s]")
    add("--trials", type=int, default=3, help="measurements of each, each time [%(default)s]")
    add("-p", "--prompt-tokens", type=int, default=512, help="of prefill [%(default)s]")
    add("-g", "--generation-tokens", type=int, default=128, help="of decode [%(default)s]")
    add("-d", "--depths", type=numbers, default=[512, 8192, 32768], help="of depth, as far as a model's context goes [512,8192,32768]")
    add("-b", "--batches", type=numbers, default=[1, 4, 16], help="of batch [1,4,16]")
    add("--device", choices=["auto", "cpu"], default="auto", help="auto is the GPU where a program has one [%(default)s]")
    add("--threads", type=int, default=cpus(), help="of every program [all CPUs: %(default)s]")
    add("--mlx-tokens", type=numbers, default=None, metavar="P,G", help="prompt and generation of mlx-lm, which takes minutes for the "
        "usual ones on a CPU that is not Apple's [64,8 there]")
    here = os.path.dirname(os.path.abspath(__file__))
    built = os.path.normpath(os.path.join(here, "../../target/release/dylm"))
    env = os.environ.get
    add("--dylm", default=env("DYLM") or (built if os.access(built, os.X_OK) else "dylm"), help="[$DYLM, target/release/dylm, dylm]")
    add("--llama-bin", default=env("LLAMA_BIN"), metavar="DIR", help="where llama-bench and its like are [$LLAMA_BIN, PATH]")
    add("--python", default=env("PEERS_PYTHON") or "python3", help="has transformers, mlx-lm [$PEERS_PYTHON, python3]")
    add("--under", type=shlex.split, default=[], metavar="COMMAND", help="runs every command, like 'taskset -c 0,1' or 'nice -n -5'")
    add("--limit", type=int, default=900, metavar="SECONDS", help="after which a program is stopped [%(default)s]")
    add("--only", type=re.compile, default="", metavar="REGEX", help="of lines like 'NAME 4-bit decode llama.cpp Q4_0' these")
    add("--list", action="store_true", help="print the commands and run none")
    add("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args()
    chosen.tests = [test for test in chosen.tests.split(",") if test]
    unknown = [test for test in chosen.tests if test not in TESTS]
    if unknown:
        parser.error(f"--tests {','.join(unknown)}: there are {','.join(TESTS)}")
    if chosen.mlx_tokens and len(chosen.mlx_tokens) != 2:
        parser.error("--mlx-tokens: two numbers, like 64,8")
    return chosen


def cpus():
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def jobs(chosen, present, models):
    """What is to be measured, in order: programs next to each other that are to be compared."""
    for model in models:
        for test in chosen.tests:
            for bits in chosen.growth_bits if test in ("depth", "batch") else chosen.bits:
                for size in model.sizes(test, chosen):
                    group = [job for program in present for job in program.jobs(model, test, bits, size)]
                    group = [job for job in group if re.search(chosen.only, job.line())]
                    if group:
                        yield group


def main():
    chosen = arguments()
    # As Ctrl-C: what was measured until then is printed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    models = [Model(folder) for folder in chosen.models]
    present = programs(chosen)
    groups = list(jobs(chosen, present, models))
    if chosen.list:
        for job in (job for group in groups for job in group):
            print(job.line(), "|", " ".join(job.command))
        return 0
    machine = Machine(chosen, present[0].command)
    figures = Figures(machine, present, left_out(chosen, present, models))
    total, done = chosen.reps * sum(map(len, groups)), 0
    try:
        for rep in range(chosen.reps):
            machine.measure()
            for group in groups:
                for job in group if rep % 2 == 0 else reversed(group):
                    done += 1
                    job.prepare()
                    for _ in range(job.runs):
                        work = lambda: run(job.command, job.env, chosen.limit, chosen.under)
                        # A virtual machine's share of the memory may double from one second to the next.
                        ran, read = machine.around(work) if job.test == "decode" else (work(), None)
                        said = figures.add(job, ran, read)
                    print(f"[{done}/{total}] {job.line()}: {said}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("stopped: what follows is what was measured until then", file=sys.stderr)
    if chosen.json:
        json.dump(figures.as_json(), sys.stdout, indent=1)
        print()
    else:
        print(report(figures))
    return 1 if figures.failed("dylm") else 0


if __name__ == "__main__":
    sys.exit(main())
