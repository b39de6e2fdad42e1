// onnxruntime-node (native) and onnxruntime-web (WebAssembly): MatMul, and its own fused `MoE` operator. Weights are constants of
// the model, so the runtime may pack them once at load, as ours does.
import { type Contender, layerData, productData, transposed } from "@switchyard/bench/kernels";
import { onnxModel } from "../onnx.ts";
import type { PeerSource } from "./peer.ts";

interface OrtTensor {
  readonly data: Float32Array;
  dispose(): void;
}
interface OrtSession {
  run(feeds: Record<string, OrtTensor>): Promise<Record<string, OrtTensor>>;
  release(): Promise<void>;
}
interface Ort {
  readonly InferenceSession: { create(model: Uint8Array, options: object): Promise<OrtSession> };
  readonly Tensor: new (type: "float32", data: Float32Array, shape: readonly number[]) => OrtTensor;
  readonly env: { readonly wasm: { numThreads?: number }; logLevel?: string };
}

type Feeds = Readonly<Record<string, readonly [data: Float32Array, shape: readonly number[]]>>;

const source = (name: string, range: string): PeerSource => ({
  name,
  packages: { [name]: range },
  async open({ threads, load, version }) {
    const module = (await load(name)) as Ort & { default?: Ort };
    const ort = module.default ?? module;
    ort.env.logLevel = "error";
    if (name === "onnxruntime-web") ort.env.wasm.numThreads = threads;

    const contender = async (model: Uint8Array, inputs: Feeds): Promise<Contender> => {
      const session = await ort.InferenceSession.create(model, { intraOpNumThreads: threads, interOpNumThreads: 1 });
      const feeds = Object.fromEntries(
        Object.entries(inputs).map(([key, [data, shape]]) => [key, new ort.Tensor("float32", data, shape)]),
      );
      const run = async (): Promise<OrtTensor> => (await session.run(feeds)).y as OrtTensor;
      return {
        name,
        run: async () => (await run()).dispose(),
        output: async () => (await run()).data,
        dispose: () => session.release(),
      };
    };

    return {
      name,
      version: version(name),
      threads,
      product(one) {
        const { tokens, inner, outer } = one;
        const { x, w } = productData(one);
        const model = onnxModel({
          nodes: [{ type: "MatMul", inputs: ["x", "w"], outputs: ["y"] }],
          weights: { w: { shape: [inner, outer], data: transposed(w, outer, inner) } },
          inputs: { x: ["tokens", inner] },
          outputs: { y: ["tokens", outer] },
        });
        return contender(model, { x: [x, [tokens, inner]] });
      },
      layer(one) {
        const { experts, width, hidden, k, tokens } = one;
        const { x, logits, gateUp, down } = layerData(one);
        // swiglu_fusion 1 wants gate and up rows in turn; alpha 1 and beta 0 make it plain SwiGLU.
        const interleaved = new Float32Array(gateUp.length);
        for (let e = 0; e < experts; e++) {
          for (let row = 0; row < 2 * hidden; row++) {
            const from = (e * 2 * hidden + row) * width;
            const to = (e * 2 * hidden + (row < hidden ? 2 * row : 2 * (row - hidden) + 1)) * width;
            interleaved.set(gateUp.subarray(from, from + width), to);
          }
        }
        const model = onnxModel({
          nodes: [
            {
              type: "MoE",
              domain: "com.microsoft",
              inputs: ["x", "logits", "gateUp", "", "down"],
              outputs: ["y"],
              integers: { k, normalize_routing_weights: 1, swiglu_fusion: 1 },
              floats: { activation_alpha: 1, activation_beta: 0 },
              strings: { activation_type: "swiglu" },
            },
          ],
          weights: {
            gateUp: { shape: [experts, 2 * hidden, width], data: interleaved },
            down: { shape: [experts, width, hidden], data: down },
          },
          inputs: { x: ["tokens", width], logits: ["tokens", experts] },
          outputs: { y: ["tokens", width] },
        });
        return contender(model, { x: [x, [tokens, width]], logits: [logits, [tokens, experts]] });
      },
    };
  },
});

export const onnxruntimeNode: PeerSource = source("onnxruntime-node", "^1.30.0");
export const onnxruntimeWeb: PeerSource = source("onnxruntime-web", "^1.30.0");
