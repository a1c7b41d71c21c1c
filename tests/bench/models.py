"""A model in the forms that lie about: which files stand for how many bits a weight."""

import json
import os

# What a file is called after the model's name, by bits; the first one there is what depth and batch are measured with.
GGUF = {16: ["BF16"], 8: ["Q8_0"], 4: ["Q4_0", "Q4_K_M"]}
MLX = {8: ["-mlx-8bit", "-8bit"], 4: ["-mlx-4bit", "-4bit"]}
# Tokens that are generated behind a filled cache, and the prompts and generations of several sequences.
BEHIND = 32
PROMPT_OF_BATCH, GENERATION_OF_BATCH = 128, 32


class Model:
    def __init__(self, folder):
        self.folder = os.path.abspath(folder)
        self.name = os.path.basename(self.folder)
        try:
            with open(os.path.join(self.folder, "config.json")) as file:
                self.config = json.load(file)
        except (OSError, ValueError) as e:
            raise SystemExit(f"{folder}: {e}: give folders that have a config.json")
        self.config = self.config.get("text_config") or self.config

    def folders(self, bits):
        """(label, path) of the folders with safetensors."""
        if bits == 16:
            stated = str(self.config.get("torch_dtype") or self.config.get("dtype") or "bfloat16")
            short = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
            return [(short.get(stated, stated), self.folder)]
        there = [(suffix.strip("-"), self.folder + suffix) for suffix in MLX.get(bits, [])]
        return [(label, path) for label, path in there if os.path.isdir(path)][:1]

    def ggufs(self, bits):
        """(label, path) of the GGUF files."""
        beside = os.path.dirname(self.folder)
        found = []
        for form in GGUF.get(bits, []):
            places = [
                os.path.join(folder, f"{self.name}{mark}{form}.gguf")
                for folder in (os.path.join(beside, "gguf"), beside, self.folder)
                for mark in "-."
            ]
            found += [(form, path) for path in places if os.path.isfile(path)][:1]
        return found

    def sizes(self, test, chosen):
        """What a test is repeated over: prompts, generations, depths, numbers of sequences."""
        if test == "depth":
            context = self.config.get("max_position_embeddings") or max(chosen.depths)
            return sorted({min(depth, max(context - BEHIND, 0)) for depth in chosen.depths})
        return {
            "prefill": [chosen.prompt_tokens], "decode": [chosen.generation_tokens], "start": [1], "batch": chosen.batches,
        }[test]


def bytes_of(path):
    """Bytes of the files of a model."""
    return sum(os.path.getsize(file) for file in weights(path))


def weights(path):
    if os.path.isfile(path):
        return [path]
    names = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
    return [os.path.join(path, name) for name in names]


def warm(path):
    """Brings a model's files into the page cache."""
    for name in weights(path):
        with open(name, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
