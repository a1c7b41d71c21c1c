"""in_mlx_lm.py MODEL [-p P] [-g G] [-n N]: tokens/s of mlx-lm, one JSON object; of the prompt as it counts them itself."""

import argparse
import json
import random
import time

import mlx.core as mx
from mlx_lm import load, stream_generate

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("-p", type=int, default=512)
parser.add_argument("-g", type=int, default=128)
parser.add_argument("-n", type=int, default=3)
parser.add_argument("--threads", type=int, help="mlx decides itself")
parser.add_argument("--device", default="auto")
args = parser.parse_args()

if args.device == "cpu":
    mx.set_default_device(mx.cpu)
model, tokenizer = load(args.model)
# Nothing ends a text early.
tokenizer._eos_token_ids = set()
chance = random.Random(0)
words = len(tokenizer.get_vocab())


def trial(prompt, generated):
    ids = [chance.randrange(words) for _ in range(max(prompt, 1))]
    times = []
    for response in stream_generate(model, tokenizer, ids, max_tokens=max(generated, 1) + 1):
        times.append(time.perf_counter())
    # The first token came with the prompt; mlx-lm's own figure counts it, which is much where few are generated.
    return response.prompt_tps, (len(times) - 1) / (times[-1] - times[0])


# Pages the weights in.
trial(8, 1)
trials = [trial(args.p, args.g) for _ in range(args.n)]
print(json.dumps({"prompt_tps": [prompt for prompt, _ in trials], "generation_tps": [after for _, after in trials]}))
