// gpu.js in its mode "webgpu", used the way that is fastest there: weights are constants, which stay on the device; what flows between
// kernels stays there too (pipelines). It has neither sorting nor scattering, so the host chooses and sorts, from logits that it holds
// anyway, and the shares come back by a gather. It has no gradients.
import { type Contender, hostDispatch, type LayerCase, layerData } from "@switchyard/bench/kernels";
import type { PeerSource } from "./peer.ts";

const name = "gpu.js";

/** What this uses of gpu.js, whose own types are too narrow for sources as text and too wide for results. */
interface GpuJs {
  readonly GPU: new (settings: { readonly mode: "webgpu" }) => Gpu;
  input(data: Float32Array, size: readonly number[]): object;
}
interface Gpu {
  createKernel(source: string, settings: object): GpuKernel;
  destroy(): Promise<void>;
}
interface GpuKernel {
  (...args: unknown[]): Promise<OnDevice>;
  readonly kernel: { readonly constructor: { readonly mode?: string }; readonly fallbackReason?: string };
}
interface OnDevice {
  delete(): void;
  toArray(): Promise<readonly Float32Array[]>;
}

/** One dot product with the gate, one with the up matrix of the row's expert: [rows, hidden]. */
const gateUp = `function(x, tokens, experts) {
  const row = this.thread.y;
  const column = this.thread.x;
  const token = tokens[row];
  const e = experts[row];
  let gate = 0;
  let up = 0;
  for (let i = 0; i < this.constants.width; i++) {
    const value = x[token][i];
    gate += value * this.constants.gateUp[e][column][i];
    up += value * this.constants.gateUp[e][column + this.constants.hidden][i];
  }
  return gate / (1 + Math.exp(-gate)) * up;
}`;
const down = `function(h, experts) {
  const row = this.thread.y;
  const column = this.thread.x;
  const e = experts[row];
  let sum = 0;
  for (let i = 0; i < this.constants.hidden; i++) { sum += h[row][i] * this.constants.down[e][column][i]; }
  return sum;
}`;
const combine = `function(rows, places, shares) {
  let sum = 0;
  for (let j = 0; j < this.constants.k; j++) {
    sum += shares[this.thread.y][j] * rows[places[this.thread.y][j]][this.thread.x];
  }
  return sum;
}`;

export const gpujs: PeerSource = {
  name,
  async open() {
    const module: object = await import("gpu.js");
    const { GPU, input } = ("default" in module ? module.default : module) as GpuJs;
    const { default: manifest } = await import("gpu.js/package.json", { with: { type: "json" } });
    return {
      name,
      version: manifest.version,
      layer: async (one) => layer(new GPU({ mode: "webgpu" }), input, one),
    };
  },
};

/** The k largest logits of each token, lower id first among equals, and the softmax over them. */
export function chooseOnHost(
  logits: Float32Array,
  experts: number,
  k: number,
): { readonly ids: Int32Array; readonly shares: Float32Array } {
  const tokens = logits.length / experts;
  const ids = new Int32Array(tokens * k);
  const shares = new Float32Array(tokens * k);
  for (let token = 0; token < tokens; token++) {
    const row = logits.subarray(token * experts, (token + 1) * experts);
    let total = 0;
    for (let j = 0; j < k; j++) {
      const taken = ids.subarray(token * k, token * k + j);
      let best = -1;
      for (let e = 0; e < experts; e++) {
        if (!taken.includes(e) && (best < 0 || (row[e] ?? 0) > (row[best] ?? 0))) best = e;
      }
      ids[token * k + j] = best;
      const share = Math.exp((row[best] ?? 0) - (row[ids[token * k] ?? 0] ?? 0));
      shares[token * k + j] = share;
      total += share;
    }
    for (let j = token * k; j < (token + 1) * k; j++) shares[j] = (shares[j] ?? 0) / total;
  }
  return { ids, shares };
}

function layer(gpu: Gpu, input: GpuJs["input"], one: LayerCase): Contender {
  const { experts, width, hidden, k, tokens } = one;
  const data = layerData(one);
  const x = input(data.x, [width, tokens]);
  const rows = tokens * k;
  const kernel = (source: string, output: readonly number[], constants: object): GpuKernel =>
    gpu.createKernel(source, {
      output,
      constants,
      pipeline: true,
      immutable: true,
      precision: "single",
      // The default would stop loops after 1000 rounds, without a word.
      loopMaxIterations: Math.max(width, hidden, k),
    });
  const kernels = {
    gateUp: kernel(gateUp, [hidden, rows], {
      width,
      hidden,
      gateUp: input(data.gateUp, [width, 2 * hidden, experts]),
    }),
    down: kernel(down, [width, rows], { hidden, down: input(data.down, [hidden, width, experts]) }),
    combine: kernel(combine, [width, tokens], { k }),
  };
  const enqueue = async (): Promise<OnDevice> => {
    const { ids, shares } = chooseOnHost(data.logits, experts, k);
    const { tokens: sorted, places } = hostDispatch(ids, experts, k);
    const expertOfRow = new Float32Array(rows);
    for (const [slot, place] of places.entries()) expertOfRow[place] = ids[slot] ?? 0;
    const inner = await kernels.gateUp(x, Float32Array.from(sorted), expertOfRow);
    const outputs = await kernels.down(inner, expertOfRow);
    inner.delete();
    const y = await kernels.combine(outputs, input(Float32Array.from(places), [k, tokens]), input(shares, [k, tokens]));
    outputs.delete();
    return y;
  };
  const finish = async (y: OnDevice): Promise<Float32Array> => {
    const lines = await y.toArray();
    y.delete();
    const flat = new Float32Array(tokens * width);
    for (const [i, line] of lines.entries()) flat.set(line, i * width);
    return flat;
  };
  return {
    name,
    note: "chosen and sorted on the host",
    run: async () => finish(await enqueue()),
    async many(runs) {
      for (let run = 1; run < runs; run++) (await enqueue()).delete();
      await finish(await enqueue());
      return undefined;
    },
    async output() {
      const y = await finish(await enqueue());
      for (const { kernel } of Object.values(kernels)) {
        if (kernel.constructor.mode !== "webgpu")
          throw new Error(`it fell back to mode "${kernel.constructor.mode}": ${kernel.fallbackReason ?? "no reason"}`);
      }
      return y;
    },
    dispose: () => gpu.destroy(),
  };
}
