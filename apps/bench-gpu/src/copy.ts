// What the memory of a device can do: a kernel that copies one buffer to another, 16 bytes per access, in the best of a few forms.
import type { Contender, Queue } from "@switchyard/bench/kernels";

const usage = { COPY_SRC: 4, COPY_DST: 8, STORAGE: 128 };
const lanes = 256;
/** Accesses of 16 bytes that one invocation makes. */
const forms = [1, 4, 16];

/** Something that reads and writes memory as fast as it can. */
export interface Copy extends Contender {
  /** Bytes read plus bytes written in one run. */
  readonly bytes: number;
}

/** Copies `size` bytes per run; the result of `output` is the first 64 KB of the copy. @throws Error where it does not fit. */
export async function copyKernel(device: GPUDevice, size: number, { stopwatch }: Queue): Promise<Copy> {
  const { maxStorageBufferBindingSize, maxBufferSize, maxComputeWorkgroupsPerDimension: most } = device.limits;
  const bytes = Math.floor(Math.min(size, maxStorageBufferBindingSize, maxBufferSize) / 16) * 16;
  const buffer = (flags: number): GPUBuffer => device.createBuffer({ size: bytes, usage: usage.STORAGE | flags });
  const from = buffer(usage.COPY_DST);
  const to = buffer(usage.COPY_SRC);
  fill(device, from, bytes);

  const dispatchOf = (form: number): ((pass: GPUComputePassEncoder) => void) => {
    const module = device.createShaderModule({
      code: `@group(0) @binding(0) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> result: array<vec4<u32>>;
@compute @workgroup_size(${lanes})
fn copy(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let first = (group.x + groups.x * group.y) * ${lanes * form}u + lane;
  for (var i = 0u; i < ${form}u; i++) {
    let at = first + i * ${lanes}u;
    if (at < ${bytes / 16}u) { result[at] = source[at]; }
  }
}`,
    });
    const pipeline = device.createComputePipeline({ layout: "auto", compute: { module, entryPoint: "copy" } });
    const group = device.createBindGroup({
      layout: pipeline.getBindGroupLayout(0),
      entries: [from, to].map((buffer, binding) => ({ binding, resource: { buffer } })),
    });
    const groups = Math.ceil(bytes / 16 / (lanes * form));
    const [x, y] = groups <= most ? [groups, 1] : [most, Math.ceil(groups / most)];
    return (pass) => {
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, group);
      pass.dispatchWorkgroups(x, y);
    };
  };

  const send = (dispatch: (pass: GPUComputePassEncoder) => void, runs: number): void => {
    const encoder = device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    for (let run = 0; run < runs; run++) dispatch(pass);
    pass.end();
    device.queue.submit([encoder.finish()]);
  };
  const timed = async (dispatch: (pass: GPUComputePassEncoder) => void): Promise<number> => {
    send(dispatch, 1); // compiles
    await device.queue.onSubmittedWorkDone();
    const start = performance.now();
    send(dispatch, 3);
    await device.queue.onSubmittedWorkDone();
    return performance.now() - start;
  };
  let best: { readonly dispatch: (pass: GPUComputePassEncoder) => void; readonly time: number } | undefined;
  for (const form of forms) {
    const dispatch = dispatchOf(form);
    const time = await timed(dispatch);
    if (!best || time < best.time) best = { dispatch, time };
  }
  const copy = best?.dispatch ?? dispatchOf(1);

  return {
    name: "copy kernel",
    bytes: 2 * bytes,
    async run() {
      send(copy, 1);
      await device.queue.onSubmittedWorkDone();
    },
    async many(runs) {
      const watch = stopwatch?.();
      for (let run = 0; run < runs; run += 8) send(copy, Math.min(8, runs - run));
      watch?.stop();
      await device.queue.onSubmittedWorkDone();
      return watch?.seconds;
    },
    async output() {
      send(copy, 1);
      const length = Math.min(bytes, 65_536);
      const read = device.createBuffer({ size: length, usage: 1 | usage.COPY_DST });
      const encoder = device.createCommandEncoder();
      encoder.copyBufferToBuffer(to, 0, read, 0, length);
      device.queue.submit([encoder.finish()]);
      await read.mapAsync(1);
      const words = new Uint32Array(read.getMappedRange().slice(0));
      read.destroy();
      return words;
    },
    dispose() {
      from.destroy();
      to.destroy();
    },
  };
}

/** Numbers that no hardware compresses: a block of them, again and again. */
function fill(device: GPUDevice, to: GPUBuffer, bytes: number): void {
  const block = copyPattern();
  for (let at = 0; at < bytes; at += block.byteLength) {
    device.queue.writeBuffer(to, at, block, 0, Math.min(block.length, (bytes - at) / 4));
  }
}

/** What the buffers hold: 1 MB of pseudo-random words (xorshift32), repeated. */
export function copyPattern(): Uint32Array<ArrayBuffer> {
  const words = new Uint32Array(2 ** 18);
  let state = 1;
  for (let i = 0; i < words.length; i++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    words[i] = state;
  }
  return words;
}
