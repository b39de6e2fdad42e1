// The device under the kernels: buffers, order of uploads and commands, folding, splitting, and that no number comes out of a device
// that failed.
import { DeviceError, type Spec, UnsupportedError } from "@switchyard/core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { findGpu } from "../../test/gpu.ts";
import { createGpu, type GpuOptions, type OwnedGpu, type WebgpuHandle } from "./device.ts";
import { program } from "./program.ts";
import { requestDevice } from "./request.ts";

const source = await findGpu();
const f32 = (...shape: readonly number[]): Spec => ({ shape, dtype: "f32" });
const LANES = 64;

/** y[i] = x[i] + by. */
const shift = program({
  key: "test shift",
  reads: { x: "f32" },
  writes: { y: "f32" },
  params: { n: "u32", by: "f32" },
  lanes: LANES,
  code: () => `fn main(group: u32, lane: u32) {
    let i = group * ${LANES}u + lane;
    if (i < p.n) { y[i] = x[i] + p.by; }
  }`,
});
/** Three workgroup counts for an indirect dispatch. */
const counts = program({
  key: "test counts",
  reads: {},
  writes: { y: "u32" },
  params: { n: "u32" },
  lanes: 1,
  code: () => "fn main(group: u32, lane: u32) { y[0] = p.n; y[1] = 1u; y[2] = 1u; }",
});
const broken = program({
  key: "test broken",
  reads: {},
  writes: { y: "f32" },
  params: {},
  lanes: 1,
  code: () => "fn main(group: u32, lane: u32) { y[0] = nowhere; }",
});

const fill = (n: number, value: number): Float32Array => new Float32Array(n).fill(value);
const upload = (gpu: OwnedGpu, data: Float32Array): WebgpuHandle => gpu.upload(data, f32(data.length));
const read = async (gpu: OwnedGpu, handle: WebgpuHandle, n: number): Promise<number[]> => [
  ...(await gpu.download({ ...f32(n), handle })),
];
const shifted = (gpu: OwnedGpu, x: WebgpuHandle, n: number, by: number): WebgpuHandle => {
  const y = gpu.alloc(f32(n));
  gpu.run(shift, { x }, { y }, { n, by }, Math.ceil(n / LANES));
  return y;
};

describe.skipIf(source === undefined)("the WebGPU device", () => {
  let device: GPUDevice;
  const fresh = (): Promise<GPUDevice> => requestDevice(source ? { gpu: source } : {});
  const make = (options: Partial<GpuOptions> = {}): OwnedGpu => createGpu(device, { idle: 2 ** 20, ...options });
  beforeAll(async () => {
    device = await fresh();
  });
  afterAll(() => device.destroy());

  it("runs commands in order, in one command buffer", async () => {
    const gpu = make();
    let submits = 0;
    const submit = device.queue.submit.bind(device.queue);
    device.queue.submit = (buffers) => {
      submits++;
      return submit(buffers);
    };
    let x = upload(gpu, fill(10, 0));
    for (let i = 0; i < 300; i++) {
      const y = shifted(gpu, x, 10, 1);
      gpu.free(x);
      x = y;
    }
    expect(submits).toBe(0);
    // More dispatches than one page of uniforms has room for.
    expect(await read(gpu, x, 10)).toEqual([...fill(10, 300)]);
    expect(submits).toBe(1);
    device.queue.submit = submit;
    gpu.free(x);
    expect(gpu.memory().used).toBe(0);
  });

  it("an upload does not overtake commands that still need the buffer it could take", async () => {
    const gpu = make();
    const x = upload(gpu, fill(8, 1));
    const y = shifted(gpu, x, 8, 1);
    gpu.free(x);
    const z = upload(gpu, fill(8, 100));
    expect(await read(gpu, y, 8)).toEqual([...fill(8, 2)]);
    expect(await read(gpu, z, 8)).toEqual([...fill(8, 100)]);
  });

  it("buffers come back into use, and only so many are kept", async () => {
    const gpu = make({ idle: 4096 });
    for (let i = 0; i < 50; i++) gpu.free(upload(gpu, fill(64, i)));
    expect(gpu.memory()).toEqual({ used: 0, held: 256 });
    const many = Array.from({ length: 40 }, (_, i) => upload(gpu, fill(64, i)));
    expect(gpu.memory().used).toBe(40 * 256);
    // A command that uses one of them is still open while they are destroyed.
    const y = shifted(gpu, many[7] as WebgpuHandle, 64, 0.5);
    for (const x of many) gpu.free(x);
    expect(await read(gpu, y, 64)).toEqual([...fill(64, 7.5)]);
    expect(gpu.memory().held).toBeLessThanOrEqual(4096 + 256);
  });

  it.each([1, 2, 3, 10])("folds many workgroups where a dimension takes %d", async (most) => {
    const gpu = make({ limits: { maxComputeWorkgroupsPerDimension: most } });
    const n = most === 1 ? 60 : most ** 3 >= 8 ? Math.min(most ** 3, 20) * LANES - 3 : 60;
    const y = shifted(gpu, upload(gpu, fill(n, 1)), n, 1);
    expect(await read(gpu, y, n)).toEqual([...fill(n, 2)]);
  });

  it("takes workgroup counts from the device", async () => {
    const gpu = make();
    const n = 3 * LANES;
    const args = gpu.scratch(3);
    gpu.run(counts, {}, { y: args }, { n: 2 }, 1);
    const x = upload(gpu, fill(n, 1));
    const y = gpu.alloc(f32(n));
    gpu.clear(y);
    gpu.run(shift, { x }, { y }, { n, by: 1 }, { indirect: args });
    expect(await read(gpu, y, n)).toEqual([...fill(2 * LANES, 2), ...fill(LANES, 0)]);
  });

  it("splits what one binding cannot hold along the first dimension, and copies both ways", async () => {
    const gpu = make({ limits: { maxStorageBufferBindingSize: 1024 } });
    const spec = f32(11, 50); // 200 bytes an entry, 5 entries a part
    const data = Float32Array.from({ length: 550 }, (_, i) => i);
    const handle = gpu.upload(data, spec);
    expect(handle.parts.map(({ first, count, bytes }) => [first, count, bytes])).toEqual([
      [0, 5, 1000],
      [5, 5, 1000],
      [10, 1, 200],
    ]);
    expect([...(await gpu.download({ ...spec, handle }))]).toEqual([...data]);
    const y = gpu.alloc(f32(4));
    expect(() => gpu.run(shift, { x: handle }, { y }, { n: 4, by: 1 }, 1)).toThrow(UnsupportedError);
    // One part is as good as a tensor.
    gpu.run(shift, { x: handle.parts[1] ?? handle }, { y }, { n: 4, by: 0 }, 1);
    expect(await read(gpu, y, 4)).toEqual([250, 251, 252, 253]);
    expect(() => gpu.alloc(f32(2, 300))).toThrow(/binds at most 1024 bytes/);
    gpu.free(handle);
    gpu.free(y);
    expect(gpu.memory().used).toBe(0);
  });

  it.each([0, 1, 3, 5, 1021])("moves %d bytes and halves exactly", async (n) => {
    const gpu = make();
    const bytes = Uint8Array.from({ length: n }, (_, i) => (i * 37) & 255);
    const u8: Spec = { shape: [n], dtype: "u8" };
    expect(await gpu.download({ ...u8, handle: gpu.upload(bytes, u8) })).toEqual(bytes);
    const halves = Uint16Array.from({ length: n }, (_, i) => i);
    const f16: Spec = { shape: [n], dtype: "f16" };
    expect(await gpu.download({ ...f16, handle: gpu.upload(halves, f16) })).toEqual(halves);
  });

  it("takes shared memory from the host", async () => {
    const gpu = make();
    const shared = new Float32Array(new SharedArrayBuffer(16));
    shared.fill(3);
    expect(await read(gpu, upload(gpu, shared), 4)).toEqual([3, 3, 3, 3]);
  });

  it("refuses data that do not fill the shape", () => {
    expect(() => make().upload(fill(3, 0), f32(2, 2))).toThrow(/\[2, 2\] needs 4 elements, found 3/);
  });

  it("an invalid shader gives an error that shows its line, and no numbers from then on", async () => {
    const gpu = make();
    const x = upload(gpu, fill(4, 1));
    const y = gpu.alloc(f32(4));
    gpu.run(broken, {}, { y }, {}, 1);
    await expect(read(gpu, y, 4)).rejects.toThrow(/invalid command.*test broken.*unresolved value 'nowhere'/s);
    await expect(read(gpu, x, 4)).rejects.toThrow(DeviceError);
    expect(() => upload(gpu, fill(1, 1))).toThrow(DeviceError);
    expect(() => gpu.flush()).toThrow(DeviceError);
    expect(gpu.failure()).toBeInstanceOf(DeviceError);
  });

  it("what ran before an error is delivered only if its own commands were good", async () => {
    const gpu = make();
    const good = read(gpu, upload(gpu, fill(4, 1)), 4);
    const y = gpu.alloc(f32(4));
    gpu.run(broken, {}, { y }, {}, 1);
    const bad = read(gpu, y, 4);
    const [first, second] = await Promise.allSettled([good, bad]);
    expect(second.status).toBe("rejected");
    if (first.status === "fulfilled") expect(first.value).toEqual([1, 1, 1, 1]);
  });

  /** The device, with error scopes that report what a full one would after an allocation of more than 100 kB, `late` ms later. */
  function fullDevice(late: number): GPUDevice {
    let asked = false;
    return new Proxy(device, {
      get(target, name) {
        const value = Reflect.get(target, name, target);
        if (name === "popErrorScope") {
          return async () => {
            const [full, error] = [asked, await target.popErrorScope()];
            if (late > 0) await new Promise((resolve) => setTimeout(resolve, late));
            return full ? { message: "no room" } : error;
          };
        }
        if (name === "createBuffer") {
          return (descriptor: GPUBufferDescriptor) => {
            asked ||= descriptor.size > 100_000;
            return target.createBuffer(descriptor);
          };
        }
        return typeof value === "function" ? value.bind(target) : value;
      },
    });
  }

  it("an allocation that the device refuses ends in an out-of-memory error", async () => {
    const gpu = createGpu(fullDevice(0), { idle: 0 });
    expect(await read(gpu, upload(gpu, fill(4, 2)), 4)).toEqual([2, 2, 2, 2]);
    const big = gpu.alloc(f32(200, 200));
    await expect(read(gpu, big, 4)).rejects.toThrow(
      /while allocating \d+ bytes for a tensor \[200, 200\] f32.*no room/s,
    );
    await expect(read(gpu, big, 4)).rejects.toThrow(DeviceError);
  });

  it("a read that is ready waits for error scopes that answer late", async () => {
    const gpu = createGpu(fullDevice(200), { idle: 0 });
    const x = upload(gpu, fill(4, 2));
    gpu.alloc(f32(200, 200));
    await expect(read(gpu, x, 4)).rejects.toThrow(/no room/);
  });

  it("more than one buffer may hold is refused before it is asked for", () => {
    expect(() => make({ limits: { maxBufferSize: 1000 } }).alloc(f32(1, 300))).toThrow(/at most 1000 bytes/);
  });

  it("a lost device ends reads under way and everything after, with its reason", async () => {
    const mortal = await fresh();
    const gpu = createGpu(mortal, { idle: 0 });
    const x = upload(gpu, fill(4, 1));
    const reads = [read(gpu, x, 4), read(gpu, shifted(gpu, x, 4, 1), 4)];
    mortal.destroy();
    for (const one of await Promise.allSettled(reads)) {
      expect(one.status).toBe("rejected");
      if (one.status === "rejected") expect(String(one.reason)).toMatch(/DeviceError: webgpu: the device was lost/);
    }
    expect(() => upload(gpu, fill(1, 1))).toThrow(/recover\(\)/);
  });

  it("after dispose everything is refused", async () => {
    const gpu = make();
    const x = upload(gpu, fill(4, 1));
    gpu.dispose();
    expect(() => upload(gpu, fill(4, 1))).toThrow(/disposed of/);
    await expect(read(gpu, x, 4)).rejects.toThrow(/disposed of/);
  });
});
