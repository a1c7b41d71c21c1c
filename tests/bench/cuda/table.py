"""Tokens per second of three well-known shapes on an NVIDIA GPU, beside what its memory would allow, and the memory that they took.

usage: table.py DYLM FOLDER [SHAPE:KIND[:BATCH] ..]

DYLM is the program, with its plugins beside it; FOLDER takes one model at a time, up to 17 GB. Without rows, all of them are run: llama8b,
llama1b and qwen3-30b-a3b, bf16 or 4bit, for one sequence and for 8 and 32 at once. Decoding one sequence reads every weight of a token
once, so bytes a second say how far it is from the limit; a prompt is told in tokens alone. The models are make_model.py's.
"""

import json
import pathlib
import shutil
import subprocess
import sys

ROWS = ["llama1b:bf16", "llama1b:bf16:8", "llama1b:bf16:32", "llama1b:4bit", "llama1b:4bit:8", "llama1b:4bit:32", "llama8b:4bit",
        "llama8b:4bit:8", "llama8b:4bit:32", "qwen3-30b-a3b:4bit", "qwen3-30b-a3b:4bit:8", "qwen3-30b-a3b:4bit:32", "llama8b:bf16",
        "llama8b:bf16:8", "llama8b:bf16:32"]
HERE = pathlib.Path(__file__).parent


def bytes_of_a_token(folder):
    """Weights that one token reads: all but the embedding's other rows and the experts that were not chosen."""
    config = json.loads((folder / "config.json").read_text())
    with open(folder / "model.safetensors", "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    read = 0
    for name, tensor in header.items():
        start, end = tensor["data_offsets"]
        if "switch_mlp" in name:
            read += (end - start) * config["num_experts_per_tok"] // config["num_experts"]
        elif "embed_tokens" not in name or config["tie_word_embeddings"]:
            read += end - start
    return read


def bench(dylm, folder, prompt, generated, batch):
    command = [dylm, "bench", folder, "--device", "cuda", "-p", str(prompt), "-g", str(generated), "-b", str(batch), "-n", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1:])
    told = json.loads(done.stdout)
    if told["not_replayed"]:
        print(f"{folder.name}, {batch} at once: steps run op by op: {told['not_replayed']}", flush=True)
    return told["median"]


def main():
    dylm, work, rows = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:] or ROWS
    print(f"{'shape':<16}{'weights':<8}{'at once':>8}{'decode/s':>10}{'GB/s':>8}{'prefill 512/s':>15}{'prefill 2048/s':>16}{'peak GB':>9}")
    there = None
    for row in rows:
        shape, kind, batch = (row.split(":") + ["1"])[:3]
        folder = work / f"{shape}-{kind}"
        try:
            if folder != there:
                if there:
                    shutil.rmtree(there, ignore_errors=True)
                make = [sys.executable, HERE / "make_model.py", shape, kind, folder]
                subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
                there = folder
            one = batch == "1"
            short = bench(dylm, folder, 512 if one else 128, 128, batch)
            long = bench(dylm, folder, 2048, 16, batch)["prompt_tps"] if one else None
            decode, peak = short["generation_tps"], short["peak_memory_bytes"] / 1e9
            rate = f"{decode * bytes_of_a_token(folder) / 1e9:.0f}" if one else ""
            prefill = [f"{short['prompt_tps']:.0f}", f"{long:.0f}"] if one else ["", ""]
            print(f"{shape:<16}{kind:<8}{batch:>8}{decode:>10.1f}{rate:>8}{prefill[0]:>15}{prefill[1]:>16}{peak:>9.2f}", flush=True)
        except Exception as e:
            print(f"{shape:<16}{kind:<8}{batch:>8} failed: {e}", flush=True)
    if there:
        shutil.rmtree(there, ignore_errors=True)


main()
