"""The training step of packages/bench/src/cases/training-step.ts in PyTorch, as a server: one line in, one line out.

"losses N" runs N steps and prints their losses, "run" runs one. Arguments: data file, its JSON header, threads.
"""

import json
import sys

import torch
import torch.nn.functional as F

with open(sys.argv[2], encoding="utf-8") as file:
    header = json.load(file)
torch.set_num_threads(int(sys.argv[3]))
raw = bytearray(open(sys.argv[1], "rb").read())


def array(name, dtype):
    entry = header["arrays"][name]
    count = 1
    for size in entry["shape"]:
        count *= size
    return torch.frombuffer(raw, dtype=dtype, offset=entry["offset"], count=count).reshape(entry["shape"]).clone()


case = header["case"]
layers, width, heads, experts, k = (case[key] for key in ("layers", "width", "heads", "experts", "k"))
batch, sequence = case["batch"], case["sequence"]
d = width // heads
fixed = ("ids", "labels", "cos", "sin")
params = {name: array(name, torch.float32).requires_grad_() for name in header["arrays"] if name not in fixed}
ids, labels = (array(name, torch.int32).long() for name in ("ids", "labels"))
cos, sin = (array(name, torch.float32).reshape(1, sequence, 1, d // 2) for name in ("cos", "sin"))
options = header["adamw"]
optimiser = torch.optim.AdamW(
    params.values(),
    lr=options["lr"],
    betas=(options["beta1"], options["beta2"]),
    eps=options["eps"],
    weight_decay=options["weightDecay"],
)


def norm(x, w):
    return F.rms_norm(x, (width,), w, header["normEps"])


def turn(x):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def moe(x, layer):
    weights, chosen = torch.topk(torch.softmax(x @ params[f"{layer}.router"].T, -1), k)
    weights = weights / weights.sum(-1, keepdim=True)
    order = torch.argsort(chosen.flatten(), stable=True)
    sizes = torch.bincount(chosen.flatten(), minlength=experts).tolist()
    tokens = order // k
    outputs = []
    for e, rows in enumerate(x[tokens].split(sizes)):
        gate, up = F.linear(rows, params[f"{layer}.gateUp"][e]).chunk(2, -1)
        outputs.append(F.linear(F.silu(gate) * up, params[f"{layer}.down"][e]))
    rows = torch.cat(outputs) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, tokens, rows)


def loss():
    x = F.embedding(ids, params["embedding"])
    for layer in range(layers):
        rows = norm(x, params[f"{layer}.attentionNorm"])
        q, key, v = (F.linear(rows, params[f"{layer}.{n}"]).reshape(batch, sequence, heads, d) for n in "qkv")
        q, key, v = (t.transpose(1, 2) for t in (turn(q), turn(key), v))
        mixed = F.scaled_dot_product_attention(q, key, v, is_causal=True)
        x = x + F.linear(mixed.transpose(1, 2).reshape(-1, width), params[f"{layer}.o"])
        x = x + moe(norm(x, params[f"{layer}.moeNorm"]), layer)
    return F.cross_entropy(F.linear(norm(x, params["norm"]), params["head"]), labels)


def step():
    optimiser.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    optimiser.step()
    return value.item()


print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
for line in sys.stdin:
    command, *arguments = line.split()
    steps = int(arguments[0]) if arguments else 1
    print(json.dumps([step() for _ in range(steps)]), flush=True)
