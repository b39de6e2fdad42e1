// Optimiser steps: one pass over a parameter, its gradient and its moments, in the storage that was given away.
import type { Kernel } from "@switchyard/core";
import type { Gpu, Part, WebgpuHandle } from "../device.ts";
import { type ParamType, type Program, program } from "../program.ts";
import {
  at,
  eachRange,
  FLAT_LANES,
  flatGroups,
  flatSteps,
  flatText,
  type Input,
  memo,
  only,
  type Result,
} from "./parts.ts";

const f32 = (count: number) => Array.from({ length: count }, () => "f32" as const);

interface Step {
  /** Tensors that are changed, and the place of each among the inputs; the gradient is input 1, the scale the last. */
  readonly states: Readonly<Record<string, number>>;
  readonly numbers: readonly string[];
  /** WGSL that sets the states from their old values and g, the scaled gradient; `number` is the type of all. */
  readonly code: string;
}
const steps = {
  adamw: {
    states: { param: 0, m: 2, v: 3 },
    numbers: ["beta1", "rest1", "beta2", "rest2", "eps", "decay", "step", "root2"],
    // The bound under the root is far below eps: sqrt(0) is left undefined by some drivers.
    code: `m = p.beta1 * m + p.rest1 * g;
  v = p.beta2 * v + p.rest2 * (g * g);
  param = param * p.decay - p.step * (m / (sqrt(max(v * p.root2, number(1e-37))) + p.eps));`,
  },
  sgd: {
    states: { param: 0, velocity: 2 },
    numbers: ["lr", "momentum", "weightDecay"],
    code: `let d = g + p.weightDecay * param;
  velocity = p.momentum * velocity + d;
  param = param - p.lr * velocity;`,
  },
  sgdNesterov: {
    states: { param: 0, velocity: 2 },
    numbers: ["lr", "momentum", "weightDecay"],
    code: `let d = g + p.weightDecay * param;
  velocity = p.momentum * velocity + d;
  param = param - p.lr * (d + p.momentum * velocity);`,
  },
} satisfies Readonly<Record<string, Step>>;

/** Width 4: n counts vec4s, and everything begins at the start of its buffer. Width 1: n counts elements, each buffer has its offset. */
const stepProgram = memo((name: keyof typeof steps, width: number, repeat: number): Program => {
  const { states, numbers, code }: Step = steps[name];
  const type = width === 4 ? "vec4<f32>" : "f32";
  const names = Object.keys(states);
  const buffers = [...names, "grad"];
  const params: Record<string, ParamType> = { n: "u32" };
  for (const number of numbers) params[number] = "f32";
  if (width === 1) for (const buffer of buffers) params[`${buffer}At`] = "u32";
  const place = (buffer: string): string => `${buffer}_[${width === 4 ? "i" : `i + p.${buffer}At`}]`;
  return program({
    key: `${name} x${width}, ${repeat} steps`,
    reads: { grad_: type, scale: "f32" },
    writes: Object.fromEntries(names.map((state) => [`${state}_`, type])),
    params,
    lanes: FLAT_LANES,
    code: () => `alias number = ${type};
${flatText(
  repeat,
  `let g = ${place("grad")} * scale[0];
  ${names.map((state) => `var ${state} = ${place(state)};`).join("\n  ")}
  ${code}
  ${names.map((state) => `${place(state)} = ${state};`).join("\n  ")}`,
)}`,
  });
});

/** The storage in which a state is changed: what was given away, else a copy. */
function ownStorage(gpu: Gpu, inputs: readonly Input[], which: number, result: Result): WebgpuHandle {
  const x = at(inputs, which).handle;
  if (result.reuse === x && inputs.every((other, i) => i === which || other.handle !== x)) return x;
  const y = gpu.alloc(result);
  eachRange([y, x], f32(2), ([to, from], [toAt = 0, fromAt = 0], _, count) => {
    if (from && to) gpu.copy(from, 4 * fromAt, to, 4 * toAt, 4 * count);
  });
  return y;
}

function step(
  gpu: Gpu,
  name: keyof typeof steps,
  inputs: readonly Input[],
  results: readonly Result[],
  numbers: Readonly<Record<string, number>>,
): readonly WebgpuHandle[] {
  const states = Object.entries(steps[name].states);
  const handles = states.map(([, which], i) => ownStorage(gpu, inputs, which, at(results, i)));
  const scale = at(inputs, inputs.length - 1).handle;
  const buffers = [...handles, at(inputs, 1).handle];
  const repeat = flatSteps(gpu);
  const bindings = [...states.map(([state]) => state), "grad"];
  eachRange(buffers, f32(buffers.length), (parts, offsets, _, count) => {
    // A last vec4 may reach beyond the tensor, but not into a part's next range, which would be updated twice.
    const width = parts.every((part) => part.bytes === 4 * count) ? 4 : 1;
    const n = Math.ceil(count / width);
    const params: Record<string, number> = { n, ...numbers };
    if (width === 1) {
      bindings.forEach((name, i) => {
        params[`${name}At`] = at(offsets, i);
      });
    }
    const writes: Record<string, Part> = {};
    states.forEach(([state], i) => {
      writes[`${state}_`] = at(parts, i);
    });
    const reads = { grad_: at(parts, parts.length - 1), scale };
    gpu.run(stepProgram(name, width, repeat), reads, writes, params, flatGroups(n, repeat));
  });
  return handles;
}

export function optimiserKernels(gpu: Gpu): Readonly<Record<"adamw" | "sgd", Kernel<WebgpuHandle>>> {
  const kernel = (body: Kernel<WebgpuHandle>): Kernel<WebgpuHandle> => Object.assign(body, { unsupported: only("f") });
  return {
    adamw: kernel((inputs, results, { lr, beta1, beta2, eps, weightDecay, correction1, correction2 }) =>
      step(gpu, "adamw", inputs, results, {
        beta1,
        rest1: 1 - beta1,
        beta2,
        rest2: 1 - beta2,
        eps,
        decay: 1 - lr * weightDecay,
        step: lr / correction1,
        root2: 1 / correction2,
      }),
    ),
    sgd: kernel((inputs, results, { lr, momentum, weightDecay, nesterov }) =>
      step(gpu, nesterov ? "sgdNesterov" : "sgd", inputs, results, { lr, momentum, weightDecay }),
    ),
  };
}
