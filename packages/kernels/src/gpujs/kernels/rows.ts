// Rows and elements by id. A thread of gpu.js writes one element and no other, so what scatters elsewhere gathers here:
// the host turns ids into lists of who adds to each place.
import type { Kernel } from "@switchyard/core";
import { at, type Calls, type GpujsHandle, lastOf, only, sizeOf, type Value, type Work } from "../calls.ts";
import { dispatch, floatsElse, onHost, placesOf } from "../host.ts";
import { divide, type Program, split } from "../program.ts";

const take: Program = {
  name: "takeRows",
  arrays: ["x", "ids"],
  sizes: ["rows", "width"],
  body: `
  ${split("row", "column", "i", "width")}
  const id = ids[row];
  let y = 0;
  if (id >= 0 && id < rows) { y = x[id * width + column]; }
  return y;`,
};

/** `lists` is what placesOf makes, for `places` places. */
const sumLists: Program = {
  name: "addRows",
  arrays: ["x", "lists"],
  sizes: ["places", "width"],
  body: `
  ${split("place", "column", "i", "width")}
  const first = lists[place];
  const count = lists[place + 1] - first;
  let sum = 0;
  for (let p = 0; p < count; p++) { sum += x[lists[places + 1 + first + p] * width + column]; }
  return sum;`,
};

const gather: Program = {
  name: "gatherLast",
  arrays: ["x", "ids"],
  sizes: ["k", "n"],
  body: `
  ${divide("row", "i", "k")}
  const id = ids[i];
  let y = 0;
  if (id >= 0 && id < n) { y = x[row * n + id]; }
  return y;`,
};

const scatter: Program = {
  name: "scatterLast",
  arrays: ["x", "ids"],
  sizes: ["k", "n"],
  body: `
  ${split("row", "column", "i", "n")}
  let sum = 0;
  for (let p = 0; p < k; p++) {
    if (ids[row * k + p] == column) { sum += x[row * k + p]; }
  }
  return sum;`,
};

/** y[token] = sum over its list of weights[slot of row] * out[row] */
const combine: Program = {
  name: "combineRows",
  arrays: ["out", "weights", "slots", "lists"],
  sizes: ["tokens", "width"],
  body: `
  ${split("token", "column", "i", "width")}
  const first = lists[token];
  const count = lists[token + 1] - first;
  let sum = 0;
  for (let p = 0; p < count; p++) {
    const row = lists[tokens + 1 + first + p];
    sum += weights[slots[row]] * out[row * width + column];
  }
  return sum;`,
};

const combineGrad: Program = {
  name: "combineRowsGrad",
  arrays: ["weights", "slots", "dy"],
  sizes: ["all", "k", "width"],
  body: `
  ${split("row", "column", "i", "width")}
  const slot = slots[row];
  let y = 0;
  if (slot >= 0 && slot < all) {
    ${divide("token", "slot", "k")}
    y = weights[slot] * dy[token * width + column];
  }
  return y;`,
};

/** Of each row, its output times the gradient of its token. */
const rowDots: Program = {
  name: "combineRowsDots",
  arrays: ["out", "slots", "dy"],
  sizes: ["all", "k", "width"],
  body: `
  const slot = slots[i];
  let sum = 0;
  if (slot >= 0 && slot < all) {
    ${divide("token", "slot", "k")}
    for (let p = 0; p < width; p++) { sum += out[i * width + p] * dy[token * width + p]; }
  }
  return sum;`,
};

/** x [m, width] summed into [places, width] by ids. */
async function addTo(work: Work, x: Value, ids: Value, places: number, width: number): Promise<Value> {
  const lists = await work.derive(ids, `places ${places}`, (data) => placesOf(data, places, (id) => id));
  return work.run(sumLists, places * width, [x, lists], { places, width });
}

type Primitive = "takeRows" | "addRows" | "topkIndices" | "argsort" | "blockEnds";

export function rowKernels(
  calls: Calls,
): Readonly<Record<string, Kernel<GpujsHandle>>> & { readonly [P in Primitive]: Kernel<GpujsHandle> } {
  return {
    takeRows: calls.kernel(
      "takeRows",
      floatsElse("takeRows", async ([x, ids], [y], _, work) => {
        if (!x || !ids || !y) return [];
        const sizes = { rows: at(x.shape, 0), width: sizeOf(x.shape.slice(1)) };
        return [await work.run(take, sizeOf(y.shape), [x.value, ids.value], sizes)];
      }),
    ),
    addRows: calls.kernel(
      "addRows",
      async ([x, ids], [y], { rows }: { rows: number }, work) =>
        x && ids && y ? [await addTo(work, x.value, ids.value, rows, sizeOf(y.shape.slice(1)))] : [],
      only("fi"),
    ),
    gatherLast: calls.kernel(
      "gatherLast",
      async ([x, ids], [y], _, work) => {
        if (!x || !ids || !y) return [];
        return [await work.run(gather, sizeOf(y.shape), [x.value, ids.value], { k: lastOf(ids), n: lastOf(x) })];
      },
      only("fi"),
    ),
    scatterLast: calls.kernel(
      "scatterLast",
      async ([x, ids], [y], _, work) => {
        if (!x || !ids || !y) return [];
        return [await work.run(scatter, sizeOf(y.shape), [x.value, ids.value], { k: lastOf(ids), n: lastOf(y) })];
      },
      only("fi"),
    ),

    topkIndices: calls.kernel("topkIndices", onHost("topkIndices")),
    argsort: calls.kernel("argsort", onHost("argsort")),
    blockEnds: calls.kernel("blockEnds", onHost("blockEnds")),
    dispatch: calls.kernel("dispatch", dispatch, only("i")),

    combineRows: calls.kernel(
      "combineRows",
      async ([out, weights, slots], [y], _, work) => {
        if (!out || !weights || !slots || !y) return [];
        const [tokens, k] = [at(weights.shape, 0), lastOf(weights)];
        const lists = await work.derive(slots.value, `tokens ${tokens} ${k}`, (data) =>
          placesOf(data, tokens, (slot) => Math.floor(slot / k)),
        );
        const values = [out.value, weights.value, slots.value, lists];
        return [await work.run(combine, sizeOf(y.shape), values, { tokens, width: lastOf(out) })];
      },
      only("ffi"),
    ),
    combineRowsGrad: calls.kernel(
      "combineRowsGrad",
      async ([out, weights, slots, dy], [dout], _, work) => {
        if (!out || !weights || !slots || !dy || !dout) return [];
        const all = sizeOf(weights.shape);
        const sizes = { all, k: lastOf(weights), width: lastOf(out) };
        const dots = await work.run(rowDots, at(out.shape, 0), [out.value, slots.value, dy.value], sizes);
        return [
          await work.run(combineGrad, sizeOf(dout.shape), [weights.value, slots.value, dy.value], sizes),
          await addTo(work, dots, slots.value, all, 1),
        ];
      },
      only("ffif"),
    ),
  };
}
