// The device's queue as the harness wants it, with the device's own clock (timestamp-query) where it has one.
import type { Queue } from "@switchyard/bench/kernels";

// Usage flags by value: the globals that name them do not exist everywhere.
const usage = { MAP_READ: 1, COPY_SRC: 4, COPY_DST: 8, STORAGE: 128, QUERY_RESOLVE: 512 };

/** `flush` sends what a backend has recorded. */
export function queueOf(device: GPUDevice, flush: () => void): Queue {
  if (!device.features.has("timestamp-query")) return { flush };
  const marks = device.createQuerySet({ type: "timestamp", count: 2 });
  const resolved = device.createBuffer({ size: 16, usage: usage.QUERY_RESOLVE | usage.COPY_SRC });
  const word = device.createBuffer({ size: 4, usage: usage.STORAGE });
  const module = device.createShaderModule({
    code: `@group(0) @binding(0) var<storage, read_write> word: array<u32>;
@compute @workgroup_size(1) fn touch() { word[0] = word[0] + 1u; }`,
  });
  const pipeline = device.createComputePipeline({ layout: "auto", compute: { module, entryPoint: "touch" } });
  const group = device.createBindGroup({
    layout: pipeline.getBindGroupLayout(0),
    entries: [{ binding: 0, resource: { buffer: word } }],
  });

  /** The time at which a pass of its own ends, which waits for everything before it. Some drivers do not time empty passes. */
  const mark = (i: number): GPUCommandEncoder => {
    const encoder = device.createCommandEncoder();
    const pass = encoder.beginComputePass({ timestampWrites: { querySet: marks, endOfPassWriteIndex: i } });
    pass.setPipeline(pipeline);
    pass.setBindGroup(0, group);
    pass.dispatchWorkgroups(1);
    pass.end();
    return encoder;
  };

  return {
    flush,
    stopwatch() {
      flush();
      device.queue.submit([mark(0).finish()]);
      const read = device.createBuffer({ size: 16, usage: usage.MAP_READ | usage.COPY_DST });
      return {
        stop() {
          const encoder = mark(1);
          encoder.resolveQuerySet(marks, 0, 2, resolved, 0);
          encoder.copyBufferToBuffer(resolved, 0, read, 0, 16);
          device.queue.submit([encoder.finish()]);
        },
        async seconds() {
          await read.mapAsync(1);
          const [start = 0n, end = 0n] = new BigUint64Array(read.getMappedRange());
          read.destroy();
          return Number(end - start) * 1e-9; // nanoseconds
        },
      };
    },
  };
}
