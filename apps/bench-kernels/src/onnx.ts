// The few ONNX messages the benchmarks need, written as protobuf by hand (onnx.proto3, IR version 10).
// A message is a list of fields; a field is a tag (number and wire type) and a value.

const utf8 = new TextEncoder();

/** Base-128, low bits first. */
function varint(value: number): number[] {
  const bytes: number[] = [];
  let rest = value;
  while (rest >= 128) {
    bytes.push((rest % 128) + 128);
    rest = Math.floor(rest / 128);
  }
  bytes.push(rest);
  return bytes;
}

const join = (parts: readonly Uint8Array[]): Uint8Array<ArrayBuffer> => {
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
};

const integer = (field: number, value: number): Uint8Array => Uint8Array.from([...varint(field * 8), ...varint(value)]);
const bytes = (field: number, value: Uint8Array): Uint8Array =>
  join([Uint8Array.from([...varint(field * 8 + 2), ...varint(value.length)]), value]);
const text = (field: number, value: string): Uint8Array => bytes(field, utf8.encode(value));
const message = (field: number, fields: readonly Uint8Array[]): Uint8Array => bytes(field, join(fields));
const float = (field: number, value: number): Uint8Array => {
  const view = new DataView(new ArrayBuffer(4));
  view.setFloat32(0, value, true);
  return join([Uint8Array.from(varint(field * 8 + 5)), new Uint8Array(view.buffer)]);
};

export interface OnnxNode {
  readonly type: string;
  /** "" is the standard operator set, "com.microsoft" onnxruntime's own. */
  readonly domain?: string;
  /** "" leaves an optional input out. */
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly integers?: Readonly<Record<string, number>>;
  readonly floats?: Readonly<Record<string, number>>;
  readonly strings?: Readonly<Record<string, string>>;
}

export interface OnnxModel {
  readonly nodes: readonly OnnxNode[];
  /** Constants, f32. */
  readonly weights: Readonly<Record<string, { readonly shape: readonly number[]; readonly data: Float32Array }>>;
  /** f32; a string is a named size that may change from run to run. */
  readonly inputs: Readonly<Record<string, readonly (number | string)[]>>;
  readonly outputs: Readonly<Record<string, readonly (number | string)[]>>;
}

const FLOAT = 1; // TensorProto.DataType.FLOAT
const attributeTypes = { float: 1, integer: 2, string: 3 } as const;

/** AttributeProto: name 1, f 2, i 3, s 4, type 20; field 5 of NodeProto. */
const attribute = (name: string, value: Uint8Array, type: keyof typeof attributeTypes): Uint8Array =>
  message(5, [text(1, name), value, integer(20, attributeTypes[type])]);

/** NodeProto: input 1, output 2, op_type 4, attribute 5, domain 7; field 1 of GraphProto. */
const node = (one: OnnxNode): Uint8Array =>
  message(1, [
    ...one.inputs.map((name) => text(1, name)),
    ...one.outputs.map((name) => text(2, name)),
    text(4, one.type),
    ...Object.entries(one.integers ?? {}).map(([name, value]) => attribute(name, integer(3, value), "integer")),
    ...Object.entries(one.floats ?? {}).map(([name, value]) => attribute(name, float(2, value), "float")),
    ...Object.entries(one.strings ?? {}).map(([name, value]) => attribute(name, text(4, value), "string")),
    text(7, one.domain ?? ""),
  ]);

/** ValueInfoProto: name 1, type 2 { tensor_type 1 { elem_type 1, shape 2 { dim 1 { dim_value 1 | dim_param 2 } } } }. */
const valueInfo = (field: number, name: string, shape: readonly (number | string)[]): Uint8Array => {
  const sizes = shape.map((n) => message(1, [typeof n === "number" ? integer(1, n) : text(2, n)]));
  return message(field, [text(1, name), message(2, [message(1, [integer(1, FLOAT), message(2, sizes)])])]);
};

/** The bytes of a .onnx file. Operator sets: standard 18, com.microsoft 1. */
export function onnxModel(model: OnnxModel): Uint8Array<ArrayBuffer> {
  const graph = [
    ...model.nodes.map(node),
    text(2, "benchmark"),
    // TensorProto: dims 1, data_type 2, name 8, raw_data 9 (little-endian)
    ...Object.entries(model.weights).map(([name, { shape, data }]) =>
      message(5, [
        ...shape.map((n) => integer(1, n)),
        integer(2, FLOAT),
        text(8, name),
        bytes(9, new Uint8Array(data.buffer, data.byteOffset, data.byteLength)),
      ]),
    ),
    ...Object.entries(model.inputs).map(([name, shape]) => valueInfo(11, name, shape)),
    ...Object.entries(model.outputs).map(([name, shape]) => valueInfo(12, name, shape)),
  ];
  return join([
    integer(1, 10),
    message(7, graph),
    message(8, [text(1, ""), integer(2, 18)]),
    message(8, [text(1, "com.microsoft"), integer(2, 1)]),
  ]);
}
