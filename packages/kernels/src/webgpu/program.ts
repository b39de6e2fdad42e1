// A program is one WGSL kernel: its buffers, its numbers, its workgroup and its text. The declarations are made here, so that a
// template holds only what is particular to it.

/** Element type of a buffer in WGSL: "f32", "i32", "u32", "vec4<f32>", "f16", "atomic<u32>", ... */
export type Element = string;
/** Numbers of one dispatch, in a uniform buffer; at most 63. */
export type ParamType = "u32" | "i32" | "f32";

export interface Program<R extends string = string, W extends string = string, P extends string = string> {
  /** Programs with the same key have the same text: pipelines are cached by it. */
  readonly key: string;
  /** Buffers that are only read. One buffer may stand under several of these names. */
  readonly reads: Readonly<Record<R, Element>>;
  /** Buffers that are written (and may be read). None may stand under a second name. */
  readonly writes: Readonly<Record<W, Element>>;
  readonly params: Readonly<Record<P, ParamType>>;
  /** Invocations per workgroup. */
  readonly lanes: number;
  /** "shader-f16" programs: emits `enable f16;`. */
  readonly f16?: boolean;
  /**
   * WGSL with `fn main(group: u32, lane: u32)`; `group` counts workgroups in one dimension (large dispatches are folded before),
   * `lane` the invocation in its workgroup. Numbers are `p.name`. Called once per key.
   */
  code(): string;
}

/** Fixes the names of buffers and numbers, so that `gpu.run` can check them. */
export const program = <R extends string, W extends string, P extends string>(
  definition: Program<R, W, P>,
): Program<R, W, P> => definition;

/** What every program may call. WGSL may take NaN and infinities for absent, and refuses them as constants: both go by their bits. */
const prelude = `
fn float_of(bits: u32) -> f32 { return bitcast<f32>(bits); }
fn infinity() -> f32 { return float_of(0x7f800000u); }
fn not_a_number() -> f32 { return float_of(0x7fc00000u); }
fn is_nan(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }
fn is_infinite(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) == 0x7f800000u; }
// Monotonic in x: -inf < ... < inf < NaN, for sorting and exact comparison. -0 and 0 are equal.
fn order_of(x: f32) -> u32 {
  if (is_nan(x)) { return 0xffffffffu; }
  let bits = bitcast<u32>(x);
  if ((bits & 0x7fffffffu) == 0u) { return 0x80000000u; }
  return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}
`;

/** The whole shader of a program. */
export function shaderText(one: Program): string {
  const buffers = [
    ...Object.entries(one.reads).map(([name, element]) => ({ name, element, access: "read" })),
    ...Object.entries(one.writes).map(([name, element]) => ({ name, element, access: "read_write" })),
  ].map(
    ({ name, element, access }, i) => `@group(0) @binding(${i}) var<storage, ${access}> ${name}: array<${element}>;`,
  );
  const params = Object.entries(one.params).map(([name, type]) => `${name}: ${type},`);
  return `${one.f16 ? "enable f16;\n" : ""}// ${one.key}
struct Params { groups_: u32, ${params.join(" ")} }
${buffers.join("\n")}
@group(0) @binding(${buffers.length}) var<uniform> p: Params;
${prelude}
${one.code()}
@compute @workgroup_size(${one.lanes})
fn entry(
  @builtin(workgroup_id) workgroup: vec3u,
  @builtin(num_workgroups) workgroups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let group = workgroup.x + workgroups.x * (workgroup.y + workgroups.y * workgroup.z);
  if (group >= p.groups_) { return; }
  main(group, lane);
}
`;
}
