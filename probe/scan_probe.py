"""The scan of a head a warp: present and new forms by turns.

    PYTHONPATH=... python3 probe/scan_probe.py --out rows.json
"""
from __future__ import annotations
import argparse, json, subprocess, sys, time, traceback
from dataclasses import replace
from importlib import import_module
from pathlib import Path
HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent / "benchmarks"):
    sys.path.insert(0, str(folder))
import torch
import step_kernels as sk
from aim_export.cuda.tuning import TUNING
from aim_runtime.engines.cuda.plan import Repeat

G = sk.SIZES["L"]
CONFIGS = [("int8-state8", 32), ("fp16-state8", 128), ("fp16-state8", 64), ("fp16-state8", 32), ("fp16-state8", 16)]
# name: module, constants instead of the launch's own
VARIANTS = {
    "present": ("k_present_warp_scan", {"PAD": 0}),
    "new": ("k_new_warp_scan", {"PAD": 0, "BULK": False}),
    "weak": ("k_weak_warp_scan", {"PAD": 0, "BULK": False}),
    "bulk": ("k_new_warp_scan", {"PAD": 0, "BULK": True}),
    "weakbulk": ("k_weak_warp_scan", {"PAD": 0, "BULK": True}),
}
PADDED = {
    **{f"present-{n}": ("k_present_warp_scan", {"PAD": p}) for n, p in ((1, 72), (2, 32), (3, 16))},
    "new-2": ("k_new_warp_scan", {"PAD": 32, "BULK": False}),
}
POSITIONS = (8, 40, 62, 100)

def variants_of(precision, rows):
    return VARIANTS | (PADDED if rows == 32 else {})

def changed(launch, module, constants):
    old = dict(launch.kernel.constants)
    old.pop("BULK", None)
    function = import_module(module).scan_of_bytes
    new = {**old, **constants}
    kernel = replace(launch.kernel, function=function, constants=tuple(new.items()))
    return replace(launch, kernel=kernel)

def bucket_with(bucket, variant):
    step = []
    for item in bucket.step:
        if isinstance(item, Repeat):
            body = tuple(changed(l, *variant) if l.kernel.function.__name__ == "scan_of_bytes" else l for l in item.body)
            item = replace(item, body=body)
        step.append(item)
    return replace(bucket, step=tuple(step))

def scan_of(bucket, times):
    for item in bucket.step:
        if isinstance(item, Repeat):
            for launch in item.body:
                if launch.kernel.function.__name__ == "scan_of_bytes":
                    return (Repeat(times, (launch,), item.strides),)
    raise AssertionError("no scan")

OUT = ("gated", "squares", "past_x", "past_b", "past_decay", "past_c", "ring")

def check(precision, rows, names):
    """How results differ from the present kernel's; of random memory, rows at several positions."""
    g = replace(G, L=2)
    base = sk.bucket_of(g, precision, rows, TUNING[rows])
    weights = sk.random_weights(g, precision)
    torch.manual_seed(1)
    memory = weights | sk.allocate(dict(base.buffers))
    def put(name, value):
        dtype = getattr(torch, base.buffers[name].dtype)
        memory[name] = value.to(dtype).contiguous().view(-1).view(torch.uint8)
    shape = {n: b.shape for n, b in base.buffers.items()}
    for name in ("projected", "ring", "past_x", "past_b"):
        put(name, torch.randn(shape[name], device="cuda"))
    put("state", torch.randint(-127, 128, shape["state"], device="cuda"))
    put("state_scale", torch.rand(shape["state_scale"], device="cuda") * 0.05)
    put("column_scale", torch.rand(shape["column_scale"], device="cuda") + 0.5)
    put("past_decay", -(torch.rand(shape["past_decay"], device="cuda") * 0.1).cumsum(-1))
    at = torch.randint(0, 256, (rows,), device="cuda")
    at[:8] = torch.tensor([0, 5, 16, 31, 32, 48, 63, 100], device="cuda")
    put("position", at)
    found = {}
    rowsout = []
    for name, variant in names.items():
        try:
            mine = {n: v.clone() for n, v in memory.items()}
            program = scan_of(bucket_with(base, variant), 2)
            sk.run(program, mine)
            torch.cuda.synchronize()
            first = {n: mine[n].clone() for n in OUT}
            mine = {n: v.clone() for n, v in memory.items()}
            sk.run(program, mine)
            torch.cuda.synchronize()
            again = all(torch.equal(first[n], mine[n]) for n in OUT)
            found[name] = first
            report = {}
            for n in OUT:
                dtype = getattr(torch, base.buffers[n].dtype)
                a, b = (found[k][n].view(dtype).double() for k in ("present", name))
                scale = a.norm().item() or 1.0
                report[n] = ((a - b).norm().item() / scale, bool(torch.equal(found["present"][n], first[n])))
            rowsout.append({"check": name, "precision": precision, "rows": rows, "stable": again, "of": report})
            text = " ".join(f"{n} {e:.1e}{'=' if same else ''}" for n, (e, same) in report.items())
            print(f"check {precision} {rows} {name:10} {'stable' if again else 'NOT STABLE'} {text}", flush=True)
        except Exception as error:
            traceback.print_exc()
            rowsout.append({"check": name, "precision": precision, "rows": rows, "error": str(error)[:300]})
    good = {r["check"] for r in rowsout if "of" in r and r["stable"] and all(e < 1e-3 for e, _ in r["of"].values())}
    return rowsout, {n: v for n, v in names.items() if n in good}

def timed(work, repeats):
    times = []
    for _ in range(repeats):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        yield_before = work(None)
        a.record(); work(True); b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return sorted(times)[len(times) // 2]

def measure(precision, rows, names, rounds, until):
    base = sk.bucket_of(G, precision, rows, TUNING[rows])
    weights = sk.random_weights(G, precision)
    memory = sk.prepare(G, base, weights)
    position = memory["position"].view(torch.int64)
    graphs = {}
    for name, variant in names.items():
        try:
            bucket = bucket_with(base, variant)
            position.fill_(100)
            alone = scan_of(bucket, G.L - 1)
            graphs[name] = (
                sk.capture(lambda: sk.run(alone, memory)),
                sk.capture(lambda: sk.run(bucket.step, memory)),
            )
        except Exception:
            traceback.print_exc()
    found = {name: {} for name in graphs}
    for turn in range(rounds):
        if time.time() > until and turn:
            break
        for name, (alone, step) in graphs.items():
            for at in POSITIONS:
                def one(go, graph=alone, at=at):
                    if go: graph.replay()
                    else: position.fill_(at)
                us = timed(one, 9) / (G.L - 1) * 1e3
                found[name].setdefault(f"scan {at}", []).append(us)
                def two(go, graph=step, at=at):
                    if go:
                        graph.replay(); graph.replay()
                    else: position.fill_(at)
                found[name].setdefault(f"step {at}", []).append(timed(two, 9) / 2 * 1e3)
            if not name.startswith("present-") or turn < 1:
                def image(go, graph=step):
                    if go:
                        for _ in range(G.T): graph.replay()
                    else: position.fill_(0)
                found[name].setdefault("image", []).append(timed(image, 1) / G.T * 1e3)
    out = []
    for name, figures in found.items():
        middle = {k: sorted(v)[len(v) // 2] for k, v in figures.items()}
        out.append({"variant": name, "precision": precision, "rows": rows, "us": middle, "all": figures})
        print(f"{precision} {rows:3} {name:10} " + " ".join(f"{k} {v:.2f}" if k[1] == "c" else f"{k} {v:.0f}" for k, v in middle.items()), flush=True)
    return out

def warm(index):
    precision, rows = CONFIGS[index]
    names = variants_of(precision, rows)
    g = replace(G, L=2)
    base = sk.bucket_of(g, precision, rows, TUNING[rows])
    memory = sk.prepare(g, base, sk.random_weights(g, precision))
    sk.run(base.step, memory)
    for name, variant in names.items():
        try:
            sk.run(scan_of(bucket_with(base, variant), 1), memory)
            torch.cuda.synchronize()
        except Exception:
            print("warm", name); traceback.print_exc()

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=False)
    parser.add_argument("--warm", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.warm is not None:
        return warm(options.warm)
    begin = time.time()
    jobs = [subprocess.Popen([sys.executable, __file__, "--warm", str(i)]) for i in range(len(CONFIGS))]
    for job in jobs:
        try: job.wait(150)
        except subprocess.TimeoutExpired: job.kill()
    print(f"compiled in {time.time() - begin:.0f} s", torch.cuda.get_device_name(), flush=True)
    rows_out = []
    for precision, rows in CONFIGS:
        try:
            checked, good = check(precision, rows, variants_of(precision, rows))
            rows_out += checked
            rows_out += measure(precision, rows, good, options.rounds, begin + 150)
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()
        if options.out:
            Path(options.out).write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows_out}, indent=1))
    print(f"{time.time() - begin:.0f} s")

if __name__ == "__main__":
    main()
