#!/usr/bin/env python3
"""Writes tiny-random.gguf, the built-in model: random ternary weights and a small byte-level BPE of our own.

    python3 make_builtin.py

It exists so that `cargo run --release` answers before anything is downloaded. Its text means nothing. Needs nothing but
Python; the output is the same on every machine.
"""
import random
import re
import struct
from pathlib import Path

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, CONTEXT = 128, 2, 2, 1, 256, 2048
MERGES = 253
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
TEMPLATE = ("{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}")
TEXT = """
This model holds random numbers, so the words it says have no meaning. It is here to show that the server works: that a
request arrives, is tokenized, runs through every layer with ternary weights and eight bit activations, and that each new
token is sampled, decoded and streamed back to you. When you pass a real model with the option for a model file, the same
server answers with real sentences. The user asks a question, the assistant gives an answer, and the system tells both
how to behave. There are many small words in the English language, and the most frequent of them are the, of, and, to, in,
that, is, was, he, for, it, with, as, his, on, be, at, by, had, not, are, but, from, or, have, an, they, which, one, you,
were, her, all, she, there, would, their, we, him, been, has, when, who, will, more, no, if, out, so, said, what, up, its,
about, into, than, them, can, only, other, new, some, could, time, these, two, may, then, do, first, any, my, now, such,
like, our, over, man, me, even, most, made, after, also, did, many, before, must, through, back, years, where, much, your,
way, well, down, should, because, each, just, those, people, how, too, little, state, good, very, make, world, still,
own, see, men, work, long, get, here, between, both, life, being, under, never, day, same, another, know, while, last,
might, us, great, old, year, off, come, since, against, go, came, right, used, take, three.
"""


def byte_alphabet():
    """The printable stand-in of each byte, as byte-level BPE vocabularies write it."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {b: chr(b) for b in plain}
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + len(table) - len(plain))
    return [table[b] for b in range(256)]


def train(alphabet):
    """The most frequent pairs of TEXT, merged one after another; ties go to the lesser pair."""
    words = [[alphabet[b] for b in word.encode()] for word in re.findall(r" ?\w+|[^\w\s]+|\s+", TEXT)]
    merges = []
    while len(merges) < MERGES:
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = ["".join(best)]
                i += 1
    return merges


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(v):
    """A metadata value with its type: u32, f32, bool, string, or an array of strings, i32 or f32."""
    if isinstance(v, bool):
        return struct.pack("<I?", 7, v)
    if isinstance(v, int):
        return struct.pack("<II", 4, v)
    if isinstance(v, float):
        return struct.pack("<If", 6, v)
    if isinstance(v, str):
        return struct.pack("<I", 8) + string(v)
    if isinstance(v[0], str):
        return struct.pack("<IIQ", 9, 8, len(v)) + b"".join(map(string, v))
    return struct.pack("<IIQ", 9, 5, len(v)) + struct.pack(f"<{len(v)}i", *v)


def i2_s(rng, rows, cols):
    """Random trits, I2_S layout A: 128 values in 32 bytes; then the scale in a 32-byte tail."""
    codes = bytes(sum(rng.randrange(3) << shift for shift in (0, 2, 4, 6)) for _ in range(rows * cols // 4))
    return codes + struct.pack("<f28x", (cols * 2 / 3) ** -0.5)


def main():
    rng = random.Random(158)
    alphabet = byte_alphabet()
    merges = train(alphabet)
    tokens = alphabet + ["".join(m) for m in merges] + SPECIALS
    bos, eos, eot = (tokens.index(s) for s in SPECIALS)
    arch = "bitnet-b1.58"
    metadata = {
        "general.architecture": arch,
        "general.name": "tiny-random",
        f"{arch}.vocab_size": len(tokens),
        f"{arch}.context_length": CONTEXT,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.block_count": LAYERS,
        f"{arch}.feed_forward_length": FFN,
        f"{arch}.rope.dimension_count": HIDDEN // HEADS,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 500000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in SPECIALS else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(m) for m in merges],
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.ggml.eot_token_id": eot,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATE,
    }

    f32, f16, ternary = 0, 1, 36
    ones = lambda n: struct.pack(f"<{n}f", *[1.0] * n)
    embedding = struct.pack(f"<{len(tokens) * HIDDEN}e", *(rng.gauss(0, 0.06) for _ in range(len(tokens) * HIDDEN)))
    tensors = [("token_embd.weight", (HIDDEN, len(tokens)), f16, embedding), ("output_norm.weight", (HIDDEN,), f32, ones(HIDDEN))]
    kv = KV_HEADS * HIDDEN // HEADS
    for i in range(LAYERS):
        tensors += [(f"blk.{i}.{name}.weight", (n,), f32, ones(n)) for name, n in
                    (("attn_norm", HIDDEN), ("attn_sub_norm", HIDDEN), ("ffn_norm", HIDDEN), ("ffn_sub_norm", FFN))]
        tensors += [(f"blk.{i}.{name}.weight", (cols, rows), ternary, i2_s(rng, rows, cols)) for name, rows, cols in
                    (("attn_q", HIDDEN, HIDDEN), ("attn_k", kv, HIDDEN), ("attn_v", kv, HIDDEN), ("attn_output", HIDDEN, HIDDEN),
                     ("ffn_gate", FFN, HIDDEN), ("ffn_up", FFN, HIDDEN), ("ffn_down", HIDDEN, FFN))]

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(string(k) + value(v) for k, v in metadata.items())
    data = b""
    for name, shape, kind, raw in tensors:
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    out = Path(__file__).with_name("tiny-random.gguf")
    out.write_bytes(head + bytes(-len(head) % 32) + data)
    print(f"{out.name}: {out.stat().st_size} bytes, {len(tokens)} tokens")


if __name__ == "__main__":
    main()
