// Kernels over whole rows: softmax and its relatives, norms, cross entropy, rotary positions, the choice of experts. One pass over memory each.
import type { Kernel } from "@switchyard/core";
import { at, bits, type Device, lastOf, only, rowsOf, sizeOf } from "../device.ts";
import type { Block } from "../heap.ts";
import { sumMiddle } from "./reduce.ts";

/** As in assembly/rows.ts: rows whose contributions to a gradient of [n] are summed by one unit. */
const NORM_BLOCK = 32;

export function rowKernels(device: Device): Readonly<Record<string, Kernel<Block>>> {
  const one = (name: string): Kernel<Block> =>
    device.kernel(
      name,
      ([x], [spec]) => {
        if (!x || !spec) return [];
        const y = device.result(spec);
        device.launch(name, [x.handle.ptr, y.ptr, lastOf(x), 0], rowsOf(x), sizeOf(x.shape) * 2);
        return [y];
      },
      only("f"),
    );
  const gradient = (name: string): Kernel<Block> =>
    device.kernel(
      name,
      ([y, dy], [spec]) => {
        if (!y || !dy || !spec) return [];
        const dx = device.result(spec);
        device.launch(name, [y.handle.ptr, dx.ptr, lastOf(y), dy.handle.ptr], rowsOf(y), sizeOf(y.shape));
        return [dx];
      },
      only("f"),
    );
  const norm = (name: string): Kernel<Block> =>
    device.kernel(
      name,
      ([x, w, b], [spec], { eps }: { eps: number }) => {
        if (!x || !w || !spec) return [];
        const y = device.result(spec);
        const rows = rowsOf(x);
        const job = [x.handle.ptr, w.handle.ptr, b?.handle.ptr ?? 0, y.ptr, lastOf(x), rows, bits(eps), 0, 0, 0];
        device.launch("norm", job, rows, sizeOf(x.shape));
        return [y];
      },
      only("f"),
    );
  const normGrad = (name: string): Kernel<Block> =>
    device.kernel(
      name,
      ([x, w, dy], [dxSpec, dwSpec, dbSpec], { eps }: { eps: number }) => {
        if (!x || !w || !dy || !dxSpec || !dwSpec) return [];
        const [rows, n] = [rowsOf(x), lastOf(x)];
        const [dx, dw] = [device.result(dxSpec), device.result(dwSpec)];
        const db = dbSpec && device.result(dbSpec);
        const blocks = Math.ceil(rows / NORM_BLOCK);
        const partialW = device.temporary(blocks * n * 4).ptr;
        const partialB = db ? device.temporary(blocks * n * 4).ptr : 0;
        const job = [x.handle.ptr, w.handle.ptr, 0, dx.ptr, n, rows, bits(eps), dy.handle.ptr, partialW, partialB];
        device.launch("normGrad", job, blocks, sizeOf(x.shape) * 2);
        sumMiddle(device, partialW, dw.ptr, 1, blocks, n);
        if (db) sumMiddle(device, partialB, db.ptr, 1, blocks, n);
        return db ? [dx, dw, db] : [dx, dw];
      },
      only("f"),
    );

  return {
    softmax: one("softmax"),
    logSoftmax: one("logSoftmax"),
    softmaxGrad: gradient("softmaxGrad"),
    logSoftmaxGrad: gradient("logSoftmaxGrad"),
    rmsNorm: norm("rmsNorm"),
    layerNorm: norm("layerNorm"),
    rmsNormGrad: normGrad("rmsNormGrad"),
    layerNormGrad: normGrad("layerNormGrad"),

    crossEntropy: device.kernel(
      "crossEntropy",
      ([logits, labels], [lossSpec, lseSpec]) => {
        if (!logits || !labels || !lossSpec || !lseSpec) return [];
        const [loss, lse] = [device.result(lossSpec), device.result(lseSpec)];
        const job = [logits.handle.ptr, labels.handle.ptr, lse.ptr, loss.ptr, 0, lastOf(logits)];
        device.launch("crossEntropy", job, rowsOf(logits), sizeOf(logits.shape) * 1.5);
        return [loss, lse];
      },
      only("fi"),
    ),
    crossEntropyGrad: device.kernel(
      "crossEntropyGrad",
      ([logits, labels, lse, dloss], [spec]) => {
        if (!logits || !labels || !lse || !dloss || !spec) return [];
        const dlogits = device.result(spec);
        const pointers = [logits, labels, lse, dloss].map((x) => x.handle.ptr);
        device.launch(
          "crossEntropyGrad",
          [...pointers, dlogits.ptr, lastOf(logits)],
          rowsOf(logits),
          sizeOf(logits.shape) * 1.5,
        );
        return [dlogits];
      },
      only("fiff"),
    ),

    rope: device.kernel(
      "rope",
      (
        [x, cos, sin],
        [spec],
        { interleaved = false, inverse = false }: { interleaved?: boolean; inverse?: boolean },
      ) => {
        if (!x || !cos || !sin || !spec) return [];
        const y = device.result(spec);
        const [batch, sequence, heads, d] = x.shape as readonly [number, number, number, number];
        const pointers = [x.handle.ptr, y.ptr, cos.handle.ptr, sin.handle.ptr];
        const sizes = [rowsOf(cos), heads, d, lastOf(cos), interleaved ? 1 : 0, bits(inverse ? -1 : 1)];
        device.launch("rope", [...pointers, ...sizes], batch * sequence, sizeOf(x.shape));
        return [y];
      },
      only("f"),
    ),

    softmaxTopk: device.kernel(
      "softmaxTopk",
      ([logits], specs, { k, order }: { k: number; order: string }) => {
        if (!logits) return [];
        const results = specs.map((spec) => device.result(spec));
        const n = lastOf(logits);
        const orders = ["softmax-topk-renormalise", "softmax-topk", "topk-softmax"];
        const job = [logits.handle.ptr, ...results.map((y) => y.ptr), n, k, orders.indexOf(order)];
        device.launch("softmaxTopk", job, at(logits.shape, 0), sizeOf(logits.shape) * (2 + 2 * k));
        return results;
      },
      (inputs, { k, order }: { k: number; order: string }) =>
        only("f")(inputs, {}) ??
        (k > 64 ? `k = ${k} is more than 64` : undefined) ??
        (["softmax-topk-renormalise", "softmax-topk", "topk-softmax"].includes(order) ? undefined : `order "${order}"`),
    ),
  };
}
