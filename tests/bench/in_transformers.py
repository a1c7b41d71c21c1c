"""in_transformers.py MODEL [-p P] [-g G] [-b B] [-n N]: tokens/s of transformers, one JSON object; --text TEXT: one token after it."""

import argparse
import json
import time

import torch
import transformers

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("-p", type=int, default=512)
parser.add_argument("-g", type=int, default=128)
parser.add_argument("-b", type=int, default=1)
parser.add_argument("-n", type=int, default=3)
parser.add_argument("--threads", type=int)
parser.add_argument("--device", default="auto")
parser.add_argument("--text")
args = parser.parse_args()

transformers.logging.set_verbosity_error()
if args.threads:
    torch.set_num_threads(args.threads)
device = args.device
if device == "auto":
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval().to(device)


def step(ids, cache=None):
    """The likeliest next tokens, computed to the end, and the cache."""
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    chosen = out.logits[:, -1:].argmax(-1)
    chosen.cpu()
    return chosen, out.past_key_values


def trial():
    prompt = torch.randint(0, model.config.vocab_size, (args.b, max(args.p, 1)), device=device)
    started = time.perf_counter()
    token, cache = step(prompt)
    read = time.perf_counter()
    for _ in range(args.g):
        token, cache = step(token, cache)
    ended = time.perf_counter()
    return args.b * args.p / (read - started), args.b * args.g / (ended - read)


with torch.inference_mode():
    if args.text is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        ids = torch.tensor([tokenizer.encode(args.text)], device=device)
        print(tokenizer.decode(step(ids)[0][0]))
    else:
        torch.manual_seed(0)
        trial()
        trials = [trial() for _ in range(args.n)]
        print(json.dumps({"prompt_tps": [prompt for prompt, _ in trials], "generation_tps": [after for _, after in trials]}))
