// The encoder against a reader written from the protobuf wire format.
import { describe, expect, it } from "vitest";
import { onnxModel } from "./onnx.ts";

type Field = readonly [number, number | Uint8Array];

const fields = (bytes: Uint8Array): Field[] => {
  let at = 0;
  const varint = (): number => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      const byte = bytes[at++] as number;
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  const take = (n: number): Uint8Array => {
    at += n;
    return bytes.subarray(at - n, at);
  };
  const all: Field[] = [];
  while (at < bytes.length) {
    const tag = varint();
    const kind = tag & 7;
    if (![0, 2, 5].includes(kind)) throw new Error(`wire type ${kind} at ${at}`);
    all.push([tag >> 3, kind === 0 ? varint() : take(kind === 5 ? 4 : varint())]);
  }
  return all;
};
const every = (bytes: Uint8Array, field: number): (number | Uint8Array)[] =>
  fields(bytes).flatMap(([number, value]) => (number === field ? [value] : []));
const message = (bytes: Uint8Array, field: number, i = 0): Uint8Array => {
  const value = every(bytes, field)[i];
  if (!(value instanceof Uint8Array)) throw new Error(`field ${field}, ${i} is no message`);
  return value;
};
const text = (bytes: Uint8Array, field: number, i = 0): string => new TextDecoder().decode(message(bytes, field, i));

describe("onnxModel", () => {
  const model = onnxModel({
    nodes: [
      {
        type: "MoE",
        domain: "com.microsoft",
        inputs: ["x", "", "w"],
        outputs: ["y"],
        integers: { k: 300 },
        floats: { alpha: 1.5 },
        strings: { act: "swiglu" },
      },
    ],
    weights: { w: { shape: [2, 1], data: Float32Array.of(0.5, -2) } },
    inputs: { x: ["tokens", 128] },
    outputs: { y: ["tokens", 1] },
  });
  const graph = message(model, 7);

  it("names both operator sets and the IR version", () => {
    expect(every(model, 1)).toEqual([10]);
    expect([text(message(model, 8, 0), 1), every(message(model, 8, 0), 2)]).toEqual(["", [18]]);
    expect([text(message(model, 8, 1), 1), every(message(model, 8, 1), 2)]).toEqual(["com.microsoft", [1]]);
  });

  it("writes nodes with all kinds of attributes", () => {
    const node = message(graph, 1);
    expect([0, 1, 2].map((i) => text(node, 1, i))).toEqual(["x", "", "w"]);
    expect([text(node, 2), text(node, 4), text(node, 7)]).toEqual(["y", "MoE", "com.microsoft"]);
    const [k, alpha, act] = [0, 1, 2].map((i) => message(node, 5, i)) as [Uint8Array, Uint8Array, Uint8Array];
    expect([text(k, 1), every(k, 3), every(k, 20)]).toEqual(["k", [300], [2]]);
    const float = message(alpha, 2);
    expect(new DataView(float.buffer, float.byteOffset).getFloat32(0, true)).toBe(1.5);
    expect([text(act, 1), text(act, 4), every(act, 20)]).toEqual(["act", "swiglu", [3]]);
  });

  it("writes weights as raw little-endian floats, and shapes with sizes or names", () => {
    const weight = message(graph, 5);
    expect([every(weight, 1), every(weight, 2), text(weight, 8)]).toEqual([[2, 1], [1], "w"]);
    const raw = message(weight, 9);
    const view = new DataView(raw.buffer, raw.byteOffset, raw.byteLength);
    expect([raw.length, view.getFloat32(0, true), view.getFloat32(4, true)]).toEqual([8, 0.5, -2]);
    const shape = message(message(message(message(graph, 11), 2), 1), 2);
    expect([text(message(shape, 1, 0), 2), every(message(shape, 1, 1), 1)]).toEqual(["tokens", [128]]);
    expect(text(message(graph, 12), 1)).toBe("y");
  });
});
