#!/usr/bin/env python3
"""Golden values of the codec, by a simulation that shares no code with the library. Prints real.json.

    pip install torch numpy gguf tokenizers
    A=bench-a-f16.gguf S=SmolLM2-135M-Instruct.Q4_1.gguf
    python3 real.py LLAMA_CPP_SOURCES --run $A 2.0 1 8 --run $A 2.0 512 8 --run $S 2.4 64 3 > real.json

Of each run: the model (architectures llama and qwen2), bits per element of a coded row with everything in it counted, tokens
of a step, and chunks.

Text, tokens and judged positions are those of llama-perplexity: the files of TEXT one after another, BOS in front where the
model asks for one; chunk i is tokens [2048 i, 2048 (i + 1)), its first one replaced by BOS where there is one, judged from 1024
to 2046. Tokens up to the fit, which is in the step behind that of its last row, see exact rows.

Weights as the file has them, in f32; attention in f32, fits in f64; rows are really quantised, but codes are not packed and
bases not rounded.
"""
import argparse
import heapq
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGUFReader
from gguf.quants import dequantize

TEXT = ["docs/build.md", "docs/multi-gpu.md", "docs/speculative.md", "docs/function-calling.md", "CONTRIBUTING.md"]
LENGTH, FIRST = 2048, 1024
# Signs of eigenvectors are arbitrary, and what mixed coefficients look like depends on them: results are means over some choices.
DRAWS, SIGNS = 4, torch.Generator()
CODEC = dict(
    tile=64, frame=256, window=128, sinks=4,
    # Rows.
    widths=[0, 1, 2, 3, 4, 5, 6, 8], key_cut=4, value_cut=3, mixed=16.0, gain_octaves=16.0, gain_bend=5.0, again_from=6,
    # Fine rows: how many of a tile, bits of their residual, steps tried for it, and whose attention chooses them.
    fine_rows=2, fine_bits=4, fine_steps=[0.7, 0.85, 1.0, 1.2, 1.5, 2.0], witness_stride=8, witness_distance=[32, 128],
    # Fits: rows, and queries that are kept of them.
    fit=1024, queries=64, distances=[64, 128, 192, 320, 512, 768, 1024, 1536, 2048],
    damp=1e-3, other=1e-3, other_keys=0.03, power=0.7, least=0.5, most=8.0,
)
C = argparse.Namespace(**CODEC)


# ---------------------------------------------------------------- models
class Model:
    """Keys and queries leave `qkv` before RoPE, as [head, position, element]."""

    def __init__(self, path):
        reader = GGUFReader(path)

        def get(key, default=None):
            return reader.fields[key].contents() if key in reader.fields else default

        arch = get("general.architecture")
        self.layers = get(f"{arch}.block_count")
        self.heads, self.kv_heads = get(f"{arch}.attention.head_count"), get(f"{arch}.attention.head_count_kv")
        self.d = get(f"{arch}.attention.key_length", get(f"{arch}.embedding_length") // self.heads)
        self.group = self.heads // self.kv_heads
        self.base, self.eps, self.neox = get(f"{arch}.rope.freq_base"), get(f"{arch}.attention.layer_norm_rms_epsilon"), arch != "llama"
        self.weights = {}
        for t in reader.tensors:
            data = np.array(dequantize(t.data, t.tensor_type), dtype=np.float32)
            self.weights[t.name] = torch.from_numpy(data).view(*[int(n) for n in reversed(t.shape)])
        self.tokens, self.merges = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.merges")
        self.pre = get("tokenizer.ggml.pre")
        self.bos = get("tokenizer.ggml.bos_token_id") if get("tokenizer.ggml.add_bos_token", False) else None

    def encode(self, text):
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers as p

        qwen = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        words = {
            "gpt-2": [p.ByteLevel(add_prefix_space=False)],
            "smollm": [p.Digits(individual_digits=True), p.ByteLevel(add_prefix_space=False)],
            "qwen2": [p.Split(Regex(qwen), "isolated"), p.ByteLevel(add_prefix_space=False, use_regex=False)],
        }
        vocabulary = {t: i for i, t in enumerate(self.tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(m.split(" ")) for m in self.merges]))
        tokenizer.pre_tokenizer = p.Sequence(words[self.pre])
        ids = tokenizer.encode(text).ids
        return ids if self.bos is None else [self.bos] + ids

    def rms(self, x, name):
        return F.rms_norm(x, (x.shape[-1],), self.weights[name], self.eps)

    def rotate(self, x, pos):
        angle = pos.double()[:, None] * (self.base ** (-torch.arange(0, self.d, 2).double() / self.d))[None]
        c, s = angle.cos().float(), angle.sin().float()
        if self.neox:
            u, v = x.chunk(2, -1)
            return torch.cat([u * c - v * s, v * c + u * s], -1)
        u, v = x[..., 0::2], x[..., 1::2]
        return torch.stack([u * c - v * s, v * c + u * s], -1).flatten(-2)

    def qkv(self, layer, x):
        h = self.rms(x, f"blk.{layer}.attn_norm.weight")

        def one(name):
            y = h @ self.weights[f"blk.{layer}.{name}.weight"].T + self.weights.get(f"blk.{layer}.{name}.bias", 0)
            return y.view(len(x), -1, self.d).transpose(0, 1)

        return one("attn_q"), one("attn_k"), one("attn_v")

    def output(self, layer):
        return self.weights[f"blk.{layer}.attn_output.weight"]

    def rest(self, layer, x, attention):
        """A layer behind its attention."""
        def w(name):
            return self.weights[f"blk.{layer}.{name}.weight"]

        x = x + attention.transpose(0, 1).reshape(len(x), -1) @ self.output(layer).T
        h = self.rms(x, f"blk.{layer}.ffn_norm.weight")
        return x + (F.silu(h @ w("ffn_gate").T) * (h @ w("ffn_up").T)) @ w("ffn_down").T

    def head(self, x):
        w = self.weights.get("output.weight", self.weights["token_embd.weight"])
        return (self.rms(x, "output_norm.weight") @ w.T).log_softmax(-1)

    def attend(self, q, first, k, v, kh, vh, step, block=256):
        """Attention of queries from position `first` on, roped like k and kh.

        Rows of tiles that were behind the window before a step come from kh and vh."""
        out = torch.empty_like(q)
        _, last, _ = tiles(k.shape[1])
        for h in range(self.kv_heads):
            group = slice(h * self.group, (h + 1) * self.group)
            for b in range(first, first + q.shape[1], block):
                e = min(first + q.shape[1], b + block)
                queries = q[group, b - first:e - first] / math.sqrt(self.d)
                i, j = torch.arange(b, e)[:, None], torch.arange(e)[None]
                exact = (i // step * step - 1 - last[None, :e] < C.window) | (j < C.sinks)
                scores = torch.where(exact, queries @ k[h, :e].T, queries @ kh[h, :e].T)
                p = scores.masked_fill(j > i, -1e30).softmax(-1)
                out[group, b - first:e - first] = (p * exact) @ v[h, :e] + (p * ~exact) @ vh[h, :e]
        return out


def tiles(n):
    """Of each position: first and last one of its tile, and the one whose frame its key lies in. Tiles begin behind the sinks."""
    first = torch.div(torch.arange(n) - C.sinks, C.tile, rounding_mode="floor") * C.tile + C.sinks
    anchor = torch.div(first + C.tile // 2, C.frame, rounding_mode="floor") * C.frame + C.frame // 2
    return first, first + C.tile - 1, anchor


# ---------------------------------------------------------------- quantisers
class Levels:
    """Nearest levels, and the mean squared error that they make of N(0,1)."""

    def __init__(self, levels):
        self.levels, self.bounds = levels.float(), ((levels[1:] + levels[:-1]) / 2).float()
        mass, mean = normal_parts((levels[1:] + levels[:-1]) / 2, 1.0)
        self.distortion = (1 - 2 * (levels * mean).sum() + (levels ** 2 * mass).sum()).item()

    def __call__(self, z):
        return self.levels[torch.bucketize(z, self.bounds)]


def normal_parts(bounds, deviation):
    """Of each interval between bounds: the share of N(0, deviation^2) in it, and the integral of x over it."""
    x = torch.cat([torch.tensor([-60.0]), bounds, torch.tensor([60.0])]).double() / deviation
    cdf, density = (1 + torch.erf(x / math.sqrt(2))) / 2, torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return cdf[1:] - cdf[:-1], deviation * (density[:-1] - density[1:])


def lloyd_max(bits, tail):
    """Levels for a Gaussian of which the share `tail` has twice the deviation."""
    n = 2 ** bits
    levels = math.sqrt(2) * torch.erfinv(2 * (torch.arange(n).double() + 0.5) / n - 1)
    for _ in range(4000):
        bounds = (levels[1:] + levels[:-1]) / 2
        (mass, mean), (more, far) = normal_parts(bounds, 1.0), normal_parts(bounds, 2.0)
        levels = ((1 - tail) * mean + tail * far) / ((1 - tail) * mass + tail * more)
    return levels


def cubic():
    """8 bits: even steps in the middle, and 8 deviations at the ends."""
    c = torch.arange(-127, 128).double()
    return c * (0.025 + (8 - 0.025 * 127) / 127 ** 3 * c * c)


LEVELS = {b: Levels(lloyd_max(b, 1 / 20 if b == 6 else 0)) for b in range(1, 7)} | {8: Levels(cubic())}
DISTORTION = {0: 1.0} | {b: q.distortion for b, q in LEVELS.items()}


def stored_gain(gain):
    """A byte: the logarithm on a scale bent by sinh."""
    bend = math.sinh(C.gain_bend)
    code = 128 + 127 / C.gain_bend * torch.asinh(gain.clamp(min=1e-9).log2() * bend / C.gain_octaves)
    bent = (code.round().clamp(1, 255) - 128) / 127
    return torch.exp2(C.gain_octaves * torch.sinh(C.gain_bend * bent) / bend)


def hadamard(n):
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(n)


def q4_0(x):
    y = x.reshape(-1, 32)
    d = (y.gather(1, y.abs().argmax(1, True)) / -8).half().float()
    inverse = torch.where(d == 0, d, 1 / d)
    return (((y * inverse + 8.5).floor().clamp(0, 15) - 8) * d).reshape(x.shape)


# ---------------------------------------------------------------- one head
class Transform:
    """Keys: centred, weighted by a second moment of queries. Values: directions, without a mean."""

    def __init__(self, rows, moment=None):
        d = rows.shape[1]
        root = inverse = torch.eye(d).double()
        if moment is None:
            norm = rows.double().norm(dim=1, keepdim=True)
            self.mean, x = torch.zeros(d), rows / norm * norm.log().mean().exp()
            covariance = x.T @ x / len(x)
            covariance += C.other * covariance.diagonal().mean() * torch.eye(d)
        else:
            self.mean = rows.mean(0)
            x = (rows - self.mean).double()
            covariance = x.T @ x / len(x)
            covariance += C.other_keys * covariance.diagonal().mean() * torch.eye(d)
            values, u = torch.linalg.eigh(moment.double())
            values = (values + C.damp * values.mean()).sqrt()
            root, inverse = (u * values) @ u.T, (u / values) @ u.T
        variance, u = torch.linalg.eigh(root @ covariance @ root)
        u = u * (2 * torch.randint(0, 2, (d,), generator=SIGNS) - 1)
        self.variance, u = variance.flip(0).clamp(min=1e-12 * variance[-1]), u.flip(1)
        self.encode, self.decode = root @ u / self.variance.sqrt(), self.variance.sqrt()[:, None] * (u.T @ inverse)


def allocate(variance, bits):
    """Widths of coefficients by greatest gain per bit."""
    variance, widths, left, heap = variance.tolist(), [0] * len(variance), int(bits * len(variance) + 1e-6), []

    def push(j, rung):
        if rung + 1 < len(C.widths):
            cost = C.widths[rung + 1] - C.widths[rung]
            heapq.heappush(heap, (-variance[j] * (DISTORTION[C.widths[rung]] - DISTORTION[C.widths[rung + 1]]) / cost, j, rung))

    for j in range(len(variance)):
        push(j, 0)
    while heap:
        _, j, rung = heapq.heappop(heap)
        cost = C.widths[rung + 1] - C.widths[rung]
        if cost <= left:
            widths[j], left = C.widths[rung + 1], left - cost
            push(j, rung + 1)
    return torch.tensor(widths)


def cosine(n):
    """The orthonormal cosine transform, a column a frequency."""
    k, j = torch.arange(n).double()[None], torch.arange(n).double()[:, None]
    x = (math.pi * (j + 0.5) * k / n).cos() * math.sqrt(2 / n)
    x[:, 0] /= math.sqrt(2)
    return x


class Coder:
    """What spends so many bits per element on the coefficients of a transform; coefficients of one width are mixed."""

    def __init__(self, transform, bits, cut):
        self.mean, self.widths = transform.mean, allocate(transform.variance, bits)
        self.wide = self.widths >= cut
        self.weight, mix = transform.variance.clone(), torch.eye(len(self.widths)).double()
        for width in set(self.widths.tolist()) - {0}:
            left = (self.widths == width).nonzero().flatten()
            while len(left):
                alike = transform.variance[left] * C.mixed > transform.variance[left[0]]
                n = int(alike.long().cumprod(0).sum())
                some, left = left[:n], left[n:]
                mix[some[:, None], some[None]] = cosine(n)
                self.weight[some] = transform.variance[some].mean()
        self.encode, self.decode = (transform.encode @ mix).float(), (mix.T @ transform.decode).float()
        self.weight = (self.weight / transform.variance[0]).float()

    def code(self, rows, fine):
        """Rows as they come back; `fine` ones have a residual."""
        z = (rows - self.mean) @ self.encode
        out = torch.zeros_like(z)
        for part in (self.wide, ~self.wide & (self.widths > 0)):
            if part.any():
                out[:, part] = self.part(z[:, part], self.widths[part], self.weight[part])
        if fine.any():
            out[fine] += self.residual((z[fine] - out[fine]) * self.weight.sqrt()) / self.weight.sqrt()
        return out @ self.decode + self.mean

    def part(self, z, widths, weight):
        """Coefficients with a gain of their own, which makes the product of a row with its coded form that with itself."""
        def levels(y):
            out = torch.zeros_like(y)
            for width in set(widths.tolist()):
                out[:, widths == width] = LEVELS[width](y[:, widths == width])
            return out

        scale = z.pow(2).mean(1, True).sqrt().clamp(min=1e-6)
        coded = levels(z / scale)
        unbiased = (z * z * weight).sum(1, True) / (z * coded * weight).sum(1, True).clamp(min=1e-30)
        gain = stored_gain(unbiased)
        # Wide codes make up for what the byte cannot say of the gain.
        return gain * torch.where(widths >= C.again_from, levels(z / (scale * gain / unbiased)), coded)

    def residual(self, x):
        """The step is the best of some by least squares."""
        best, out = torch.zeros(len(x), 1), torch.zeros_like(x)
        scale = x.pow(2).mean(1, True).sqrt().clamp(min=1e-30)
        for factor in C.fine_steps:
            coded = LEVELS[C.fine_bits](x / (scale * factor))
            product, power = (x * coded).sum(1, True), (coded * coded).sum(1, True)
            gain, step = product ** 2 / power, (product / power).half().float()
            out, best = torch.where(gain > best, coded * step, out), torch.maximum(gain, best)
        return out


def draw_attention(q, k):
    """The rows of a tile that draw most attention of some queries, softmax among them alone; q [group, query, element], scaled."""
    return ((q @ k.T).softmax(-1) ** 2).sum((0, 1))


def measure(q, positions, k, v, kh, vh, output, power):
    """Relative squared errors in the residual stream that coded keys, and coded values, make; what the head adds to it, likewise.

    q [group, query, element] roped like k and scaled; `output` the columns of the projection; `power` |x|^2 before the attention."""
    distance = positions[:, None] - torch.arange(len(k))[None]
    coded = (distance >= C.window) & (torch.arange(len(k))[None] >= C.sinks)
    exact = (q @ k.T).masked_fill(distance < 0, -1e30)
    p = exact.softmax(-1)
    changed = torch.where(coded, q @ kh.T, exact).softmax(-1)

    def relative(x):
        return ((x.transpose(0, 1).reshape(len(positions), -1) @ output.T).pow(2).sum(-1) / power).mean().item()

    return relative((changed - p) @ v), relative((p * coded) @ (vh - v)), relative(p @ v)


def share(errors, elements, bits):
    """Bits per element: `bits` in the mean over all elements, more where the error is larger."""
    want, elements = C.power * 0.5 * np.log2(np.array(errors) + 1e-30), np.array(elements)
    low, high = -40.0, 40.0
    for _ in range(60):
        level = (low + high) / 2
        total = (np.clip(want + level, min(C.least, bits), C.most) * elements).sum()
        low, high = (level, high) if total < bits * elements.sum() else (low, level)
    return np.clip(want + low, min(C.least, bits), C.most)


# ---------------------------------------------------------------- caches: code(layer, q, k, v) -> roped keys and values as they come back
class Stock:
    """llama.cpp's q4_0 behind its Hadamard rotation, in the same window."""

    def __init__(self, model):
        self.model, self.h = model, hadamard(model.d)

    def code(self, _layer, _q, k, v):
        return q4_0(self.model.rotate(k, torch.arange(k.shape[1])) @ self.h) @ self.h.T, q4_0(v @ self.h) @ self.h.T


def code_bits(bits, d):
    """What gains of two parts of K and of V, and fine rows, leave of the bits per element of a tile, which is whole words of 8 bytes."""
    fine = C.fine_rows * (1 + 2 * (2 + d // 2))
    overhead = -(-(4 * C.tile + fine) // 8) * 8
    return bits - overhead * 8 / (C.tile * 2 * d)


class Spectral:
    def __init__(self, model, trace, bits):
        self.model, rate = model, code_bits(bits, model.d)
        trace = [(x[:C.fit], q[:, :C.fit], k[:, :C.fit], v[:, :C.fit]) for x, q, k, v in trace]
        transforms, errors = {}, {}
        for layer, (_, q, k, v) in enumerate(trace):
            for h in range(model.kv_heads):
                transforms[layer, h] = self.fit(h, q, k[h], v[h])
        self.coders = {key: self.spend(t, (rate, rate)) for key, t in transforms.items()}
        for layer, (x, q, k, v) in enumerate(trace):
            errors |= self.errors(layer, x, q, k, v)
        rates = share([e for pair in errors.values() for e in pair], [model.d] * 2 * len(errors), rate).reshape(-1, 2)
        self.coders = {key: self.spend(transforms[key], pair) for key, pair in zip(errors, rates)}

    @staticmethod
    def spend(transforms, rates):
        return Coder(transforms[0], rates[0], C.key_cut), Coder(transforms[1], rates[1], C.value_cut)

    @staticmethod
    def kept(n):
        """Queries that are kept for a fit on n rows."""
        return torch.arange(0, n, n // C.queries)

    def fit(self, h, q, k, v):
        model, n = self.model, k.shape[0]
        _, _, anchor = tiles(n)
        keys, at = model.rotate(k, torch.arange(n) - anchor), self.kept(n)
        moment = torch.zeros(model.d, model.d)
        for i, distance in enumerate(C.distances):
            # Rows there lie in frames of anchors before and behind them.
            scatter = (torch.arange(len(at)) * 37 + i * 23 + h * 11) % C.frame - C.frame // 2 + C.tile // 2
            y = model.rotate(q[h * model.group:(h + 1) * model.group, at], distance + scatter).reshape(-1, model.d)
            moment += y.T @ y
        return Transform(keys[C.sinks:], moment), Transform(v[C.sinks:])

    def fine(self, q, k):
        """Which rows are fine, by KV head; q, k roped."""
        model, n = self.model, k.shape[1]
        fine = torch.zeros(model.kv_heads, n, dtype=torch.bool)
        for first in range(C.sinks, n - C.tile + 1, C.tile):
            last = first + C.tile - 1
            near, far = (last + distance for distance in C.witness_distance)
            witnesses = torch.tensor([i for i in range(near, min(n, far + 1)) if i % C.witness_stride == 0], dtype=torch.long)
            for h in range(model.kv_heads if len(witnesses) else 0):
                queries = q[h * model.group:(h + 1) * model.group, witnesses] / math.sqrt(model.d)
                fine[h, first + draw_attention(queries, k[h, first:last + 1]).topk(C.fine_rows).indices] = True
        return fine

    def code(self, layer, q, k, v):
        model, n = self.model, k.shape[1]
        pos, (_, _, anchor) = torch.arange(n), tiles(n)
        framed, fine = model.rotate(k, pos - anchor), self.fine(model.rotate(q, pos), model.rotate(k, pos))
        coders = [self.coders[layer, h] for h in range(model.kv_heads)]
        keys = torch.stack([c[0].code(framed[h], fine[h]) for h, c in enumerate(coders)])
        return model.rotate(keys, anchor), torch.stack([c[1].code(v[h], fine[h]) for h, c in enumerate(coders)])

    def errors(self, layer, x, q, k, v):
        """Relative squared errors in the residual stream behind the attention, of keys and of values by head."""
        model, n = self.model, k.shape[1]
        kh, vh = self.code(layer, q, k, v)
        at = self.kept(n)
        at = at[at >= n // 2]
        queries, keys = model.rotate(q[:, at], at) / math.sqrt(model.d), model.rotate(k, torch.arange(n))
        found = {}
        for h in range(model.kv_heads):
            group, width = slice(h * model.group, (h + 1) * model.group), model.group * model.d
            output = model.output(layer)[:, h * width:(h + 1) * width]
            found[layer, h] = measure(queries[group], at, keys[h], v[h], kh[h], vh[h], output, x[at].pow(2).sum(-1))
        behind = 1 + sum(added for _, _, added in found.values())
        return {key: (ek / behind, ev / behind) for key, (ek, ev, _) in found.items()}


# ---------------------------------------------------------------- what is judged
def run(model, tokens, bits, step):
    """KL divergence to exact, and agreement about the likeliest token, in a chunk: of some spectral caches, and of a stock one."""
    pos, start = torch.arange(LENGTH), -(-C.fit // step) * step
    x, trace = model.weights["token_embd.weight"][torch.tensor(tokens)], []
    for layer in range(model.layers):
        q, k, v = model.qkv(layer, x)
        trace.append((x, q, k, v))
        keys = model.rotate(k, pos)
        x = model.rest(layer, x, model.attend(model.rotate(q, pos), 0, keys, v, keys, v, 1))
    exact = model.head(x[FIRST:LENGTH - 1])

    def judged(cache):
        x = trace[0][0][start:]
        for layer in range(model.layers):
            q, k, v = (torch.cat([old[:, :start], new], 1) for old, new in zip(trace[layer][1:], model.qkv(layer, x)))
            kh, vh = cache.code(layer, q, k, v)
            queries = model.rotate(q[:, start:], pos[start:])
            x = model.rest(layer, x, model.attend(queries, start, model.rotate(k, pos), v, kh, vh, step))
        got = model.head(x[FIRST - start:-1])
        kl, same = (exact.exp() * (exact - got)).sum(-1).mean().item(), (exact.argmax(-1) == got.argmax(-1)).float().mean().item()
        print(f"{type(cache).__name__}: KL {kl:.6f}, same top-1 {same:.4f}", file=sys.stderr, flush=True)
        return kl, same

    return [judged(Spectral(model, trace, bits)) for _ in range(DRAWS)], judged(Stock(model))


def judge(path, text, bits, step, chunks):
    SIGNS.manual_seed(0)
    model = Model(path)
    tokens, kl, same, stock = model.encode(text), [], [], []
    for i in range(chunks):
        chunk = tokens[LENGTH * i:LENGTH * (i + 1)]
        if model.bos is not None:
            chunk[0] = model.bos
        draws, (stock_kl, _) = run(model, chunk, bits, step)
        kl.append([kl for kl, _ in draws])
        same += [same for _, same in draws]
        stock.append(stock_kl)

    def means(x):
        return [round(mean, 6) for mean in np.mean(x, -1, keepdims=np.ndim(x) == 1).tolist()]

    return {
        "model": Path(path).name, "bits": bits, "step": step, "chunks": chunks,
        "kl": means(np.ravel(kl))[0], "kl_by_chunk": means(kl), "kl_by_draw": means(np.transpose(kl)),
        "same_top1": means(same)[0], "q4_0_hadamard_kl": means(stock)[0],
    }


# ---------------------------------------------------------------- single steps
def noise(n, seed):
    """Numbers of about unit variance, four uniform ones each: the last steps of MurmurHash3 over a counter."""
    i = np.arange(4 * n, dtype=np.uint64) + np.uint64(4 * n * seed)
    mask = np.uint64(0xFFFFFFFF)
    i = ((i ^ i >> np.uint64(16)) * np.uint64(0x85EBCA6B)) & mask
    i = ((i ^ i >> np.uint64(13)) * np.uint64(0xC2B2AE35)) & mask
    uniform = ((i ^ i >> np.uint64(16)).astype(np.float64) / 2.0 ** 32).reshape(n, 4)
    return torch.from_numpy((uniform.sum(1) - 2) * math.sqrt(3)).float()


RATES, HEADS = (1.0, 2.0, 4.0), 16


def one_head(seed):
    """Random rows that have a mean, a spectrum and uneven sizes, without RoPE; two query heads, a query every tenth position.

    Of K and V by rate: what coding leaves of rows, and of fine ones. What is measured at 2 bits."""
    rows, d, group = 1280, 32, 2
    spectrum = 0.85 ** torch.arange(d)

    def draw(seed):
        size = torch.exp(0.5 * noise(rows, seed + 1))
        return noise(rows * d, seed).view(rows, d) * spectrum * size[:, None]

    k, v = draw(seed) + noise(d, seed + 2), draw(seed + 3) + 0.3 * noise(d, seed + 5)
    positions = torch.arange(0, rows, 10)
    q = 2 * noise(group * len(positions) * d, seed + 6).view(len(positions), group, d).transpose(0, 1) * spectrum.flip(0).sqrt()
    output, flat = noise(48 * group * d, seed + 7).view(48, group * d), q.reshape(-1, d)
    keys, values = Transform(k[C.sinks:], flat.T @ flat), Transform(v[C.sinks:])

    def coded(bits, fine):
        return Coder(keys, bits, C.key_cut).code(k, fine), Coder(values, bits, C.value_cut).code(v, fine)

    fine, losses = (torch.arange(rows) % C.tile)[:, None].eq(torch.tensor([11, 40])).any(1), []
    for bits in RATES:
        kh, vh = coded(bits, fine)
        for some in (~fine, fine):
            scores = ((kh - k)[some] @ flat.T).pow(2).sum() / ((k - k.mean(0))[some] @ flat.T).pow(2).sum()
            losses += [scores, (vh - v)[some].pow(2).sum() / v[some].pow(2).sum()]
    later = positions >= rows // 2
    scaled, power = q[:, later] / math.sqrt(d), torch.ones(int(later.sum()))
    return losses, measure(scaled, positions[later], k, v, *coded(2.0, torch.zeros(rows, dtype=torch.bool)), output, power)


def steps():
    """Means over some heads."""
    SIGNS.manual_seed(0)
    losses, measured = zip(*(one_head(8 * head) for head in range(HEADS) for _ in range(DRAWS)))

    def means(x):
        return [float(f"{m:.4g}") for m in torch.tensor(x).double().mean(0).tolist()]

    errors, elements, losses = [1e-1, 1e-3, 1e-5, 1e-9, 2e-3], [64, 64, 128, 64, 128], means(losses)
    coded = [{"bits": bits, "rows": losses[4 * i:4 * i + 2], "fine": losses[4 * i + 2:4 * i + 4]} for i, bits in enumerate(RATES)]
    return {
        "heads": HEADS, "coded": coded, "measured": means(measured),
        "errors": errors, "elements": elements, "shares": [round(float(b), 6) for b in share(errors, elements, 2.0)],
    }


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--run", nargs=4, action="append", default=[], metavar=("FILE", "BITS", "STEP", "CHUNKS"))
    args = parser.parse_args()
    text = "".join((args.sources / name).read_bytes().decode() for name in TEXT)
    runs = [judge(file, text, float(bits), int(step), int(chunks)) for file, bits, step, chunks in args.run]
    found = json.dumps({
        "what": "mean KL divergence to exact of the simulated codec, and of q4_0 in the same window; single steps",
        "how": "real.py, which says more", "text": TEXT, "codec": CODEC, "runs": runs, "steps": steps(),
    }, indent=2)
    # Lists of numbers or names on one line.
    print(re.sub(r"\[[^][{}]*\]", lambda x: " ".join(x[0].split()).replace("[ ", "[").replace(" ]", "]"), found))


if __name__ == "__main__":
    main()
