"""A checkpoint of a well-known shape with random weights, in the files and names that Hugging Face and MLX have.

usage: make_model.py {llama8b,llama1b,qwen3-30b-a3b} {bf16,4bit} FOLDER

The numbers come from one pool of random ones, so that tens of gigabytes are written as fast as the disk takes them. The tokenizer is a
stub that knows two words; `dylm bench` needs no more.
"""

import json
import os
import sys

import numpy as np

LLAMA = dict(model_type="llama", rms_norm_eps=1e-5, vocab_size=128256, rope_theta=500000.0, max_position_embeddings=131072)
SHAPES = {
    "llama8b": dict(LLAMA, hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, num_attention_heads=32,
                    num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
    "llama1b": dict(LLAMA, hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32,
                    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "qwen3-30b-a3b": dict(model_type="qwen3_moe", rms_norm_eps=1e-6, vocab_size=151936, rope_theta=1e6, max_position_embeddings=40960,
                          hidden_size=2048, num_hidden_layers=48, intermediate_size=6144, num_attention_heads=32,
                          num_key_value_heads=4, head_dim=128, tie_word_embeddings=False, num_experts=128, num_experts_per_tok=8,
                          decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True),
}
GROUP = 64


def tensors(c):
    """Names, shapes, and whether quantization packs them."""
    hidden, dim, heads, kv = c["hidden_size"], c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    yield "model.embed_tokens", [c["vocab_size"], hidden], True
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        yield p + "input_layernorm", [hidden], False
        yield p + "post_attention_layernorm", [hidden], False
        for name, rows in (("q", heads * dim), ("k", kv * dim), ("v", kv * dim)):
            yield f"{p}self_attn.{name}_proj", [rows, hidden], True
        yield p + "self_attn.o_proj", [hidden, heads * dim], True
        mlp, lead, width = p + "mlp.", [], c["intermediate_size"]
        if "num_experts" in c:
            yield p + "self_attn.q_norm", [dim], False
            yield p + "self_attn.k_norm", [dim], False
            yield p + "mlp.gate", [c["num_experts"], hidden], False
            mlp, lead, width = p + "mlp.switch_mlp.", [c["num_experts"]], c["moe_intermediate_size"]
        yield mlp + "gate_proj", lead + [width, hidden], True
        yield mlp + "up_proj", lead + [width, hidden], True
        yield mlp + "down_proj", lead + [hidden, width], True
    yield "model.norm", [hidden], False
    if not c["tie_word_embeddings"]:
        yield "lm_head", [c["vocab_size"], hidden], True


def bf16(x):
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def main():
    shape, kind, folder = sys.argv[1:4]
    config = dict(SHAPES[shape], torch_dtype="bfloat16", eos_token_id=1, bos_token_id=0)
    packed = kind == "4bit"
    if packed:
        config["quantization"] = {"group_size": GROUP, "bits": 4}
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(0)
    pools = {
        "weight": bf16(rng.standard_normal(1 << 24) * 0.02).tobytes(),
        "norm": bf16(1 + rng.standard_normal(1 << 16) * 0.1).tobytes(),
        "words": rng.integers(0, 2**32, 1 << 24, dtype=np.uint32).tobytes(),
        # 4 bits around 0, as wide as the plain weights.
        "scales": bf16(0.004 + rng.random(1 << 22) * 0.001).tobytes(),
        "biases": bf16(-0.034 + rng.random(1 << 22) * 0.001).tobytes(),
    }
    stored, at = [], 0
    for name, dims, can_pack in tensors(config):
        count, lead, width = int(np.prod(dims)), dims[:-1], dims[-1]
        if packed and can_pack:
            parts = [("weight", "U32", lead + [width // 8], count // 2, "words"),
                     ("scales", "BF16", lead + [width // GROUP], count // GROUP * 2, "scales"),
                     ("biases", "BF16", lead + [width // GROUP], count // GROUP * 2, "biases")]
        else:
            parts = [("weight", "BF16", dims, 2 * count, "norm" if len(dims) == 1 else "weight")]
        for part, dtype, part_dims, size, pool in parts:
            stored.append((f"{name}.{part}", dtype, part_dims, size, pools[pool], at))
            at += size
    header = {n: dict(dtype=t, shape=d, data_offsets=[o, o + size]) for n, t, d, size, _, o in stored}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    with open(os.path.join(folder, "model.safetensors"), "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for number, (_, _, _, size, pool, _) in enumerate(stored):
            # Each tensor begins elsewhere in the pool: equal ones would stay in caches.
            start = number * 8191 * 64 % len(pool)
            left = size
            while left:
                piece = pool[start:start + left]
                f.write(piece)
                left, start = left - len(piece), 0
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=1)
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
                 "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 1}, "unk_token": "<unk>"}}
    with open(os.path.join(folder, "tokenizer.json"), "w") as f:
        json.dump(tokenizer, f)
    print(f"{folder}: {at / 1e9:.2f} GB")


main()
